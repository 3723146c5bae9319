"""The user's boards, by name, in one TOML file of the user's own: connections, no secrets."""

from __future__ import annotations

import builtins
import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import parse_qsl

import platformdirs
from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError, ValidationInfo, field_validator

from edgeprune.boards.cores import core_list
from edgeprune.boards.ssh_config import SshTarget, jumps_of
from edgeprune.boards.toml_files import read_toml
from edgeprune.errors import ConfigError, UnknownBoardError
from edgeprune.files import write_text

_HEADER = "# Boards of edgeprune. You may edit this file; `edgeprune device add|remove` rewrites it without comments.\n"
_URL_OPTIONS = ("python", "root", "identity", "host_key", "jump", "cores")
_Text = Annotated[str, StringConstraints(min_length=1)]


class BoardEntry(BaseModel):
    """One configured board.

    Attributes:
        ssh: ``user@host:port``, or an alias of the user's ssh configuration.
        type: Device type, e.g. ``"jetson-orin-nano"``, or None.
        python: Python of the board, >= 3.6; a leading ``~/`` is the board's user's home.
        root: Folder on the board; a leading ``~`` is the board's user's home.
        host_key: ``SHA256:...`` fingerprint that the user accepted, or None to go by known_hosts alone.
        identity: Private key file on this machine, or None for the agent and the usual keys.
        jump: Hosts to go through, nearest first, with commas between them, as ``ssh -J`` takes them; None for those of the ssh
            configuration. What they need (keys, users) stands there too.
        signers: File on this machine with those who may sign what is deployed there (``ssh-keygen``'s allowed signers), or None.
        cores: The board's cores that engines are timed on, as ``taskset -c`` takes them, or None for all that its user has.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    ssh: _Text
    type: _Text | None = None
    python: _Text = "python3"
    root: _Text = "~/.edgeprune"
    host_key: str | None = None
    identity: _Text | None = None
    jump: _Text | None = None
    signers: _Text | None = None
    cores: _Text | None = None

    @field_validator("host_key")
    @classmethod
    def _is_fingerprint(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"SHA256:[A-Za-z0-9+/]{43}=?", value):
            raise ValueError("a fingerprint has 43 characters after SHA256:; ssh-keygen -lf KEY.pub prints it")
        return value

    @field_validator("ssh")
    @classmethod
    def _is_address(cls, value: str) -> str:
        SshTarget.parse(value)
        return value

    @field_validator("jump")
    @classmethod
    def _are_addresses(cls, value: str | None) -> str | None:
        if value is not None:
            jumps_of(value)
        return value

    @field_validator("cores")
    @classmethod
    def _are_cores(cls, value: str | None) -> str | None:
        if value is not None:
            core_list(value)
        return value


class _File(BaseModel):
    """The whole file."""

    model_config = ConfigDict(extra="forbid")
    boards: dict[str, BoardEntry] = {}
    groups: dict[str, list[_Text]] = {}

    @field_validator("boards", "groups")
    @classmethod
    def _are_names(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name in value:
            check_name(name)
        return value

    @field_validator("groups")
    @classmethod
    def _are_no_boards(cls, value: dict[str, Any], told: ValidationInfo) -> dict[str, Any]:
        taken = sorted(set(value) & set(told.data.get("boards", {})))
        if taken:
            raise ValueError(f"a group must not be called as a board is, found {taken[0]!r}")
        return value


def config_path() -> Path:
    """``$EDGEPRUNE_CONFIG`` where it is set, else ``boards.toml`` in the user's configuration folder."""
    override = os.environ.get("EDGEPRUNE_CONFIG")
    return Path(override) if override else platformdirs.user_config_path("edgeprune") / "boards.toml"


def check_name(name: str) -> str:
    """A name that may be given to a board.

    Raises:
        ConfigError: If it may not.
    """
    if not re.fullmatch(r"[A-Za-z0-9._-]+", name):
        raise ConfigError(
            f"a board's name must consist of letters, digits, dots, dashes and underscores, found {name!r}.",
            hint="edgeprune device add my-board --ssh user@host",
        )
    if name == "local":
        raise ConfigError(
            "a board's name must not be 'local', which is this machine.",
            hint="edgeprune device add my-board --ssh user@host",
        )
    return name


class BoardConfig:
    """The boards of one file. Every change is written at once, whole or not at all.

    Args:
        path: The file; `config_path` when None. It need not exist.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path if path is not None else config_path()

    def list(self) -> dict[str, BoardEntry]:
        """All boards, by name, sorted.

        Raises:
            ConfigError: The file cannot be read or is not valid; the message names the line or the key.
        """
        return dict(sorted(self._read().boards.items()))

    def groups(self) -> dict[str, builtins.list[str]]:
        """Groups of boards, by name: each a list of names of boards, ``local``, and addresses.

        Raises:
            ConfigError: As `list`.
        """
        return dict(sorted(self._read().groups.items()))

    def members(self, words: Sequence[str]) -> builtins.list[str]:
        """The boards that a user means, each once, in the order in which they were named.

        Args:
            words: Each a name of a board or a group, several with commas between them, or one address.

        Raises:
            UnknownBoardError: There is neither board nor group of a name.
            ConfigError: As `list`.
        """
        content = self._read()
        found: dict[str, None] = {}
        for word in words:
            for name in [word] if "://" in word else [part.strip() for part in word.split(",")]:
                for member in content.groups.get(name, [name]):
                    if "://" in member:
                        entry_of_url(member)
                    elif member != "local" and member not in content.boards:
                        raise _unknown(member, ["local", *sorted(content.boards), *sorted(content.groups)])
                    found[member] = None
        return [*found]

    def _read(self) -> _File:
        if not self.path.exists():
            return _File()
        return read_toml(self.path, _File, ConfigError, hint=f"mend it, or remove it: {self.path}")

    def get(self, name: str) -> BoardEntry:
        """One board.

        Raises:
            UnknownBoardError: There is none of that name; the message lists those that there are.
        """
        boards = self.list()
        if name not in boards:
            raise _unknown(name, ["local", *boards])
        return boards[name]

    def add(self, name: str, entry: BoardEntry, *, replace: bool = False) -> None:
        """Add a board.

        Raises:
            ConfigError: The name is not one, or is taken and `replace` is not set.
        """
        check_name(name)
        boards = self.list()
        if name in boards and not replace:
            raise ConfigError(
                f"a new board's name must be free, but {name!r} is {boards[name].ssh}.",
                hint=f"edgeprune device remove {name}",
            )
        if name in self.groups():
            raise ConfigError(f"a new board's name must be free, but {name!r} is a group.", hint="another name")
        self._write({**boards, name: entry})

    def remove(self, name: str) -> None:
        """Remove a board; nothing on the board itself changes.

        Raises:
            UnknownBoardError: There is none of that name.
        """
        self.get(name)
        groups = {key: [member for member in members if member != name] for key, members in self.groups().items()}
        self._write({key: entry for key, entry in self.list().items() if key != name}, groups)

    def _write(self, boards: dict[str, BoardEntry], groups: dict[str, builtins.list[str]] | None = None) -> None:
        import tomli_w

        kept = {name: members for name, members in (self.groups() if groups is None else groups).items() if members}

        content: dict[str, Any] = {
            "boards": {name: entry.model_dump(exclude_none=True) for name, entry in sorted(boards.items())},
            **({"groups": kept} if kept else {}),
        }
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.path, _HEADER + tomli_w.dumps(content), mode=0o600)
        except OSError as error:
            raise ConfigError(
                f"{self.path} must be writable, found: {error.strerror}.", hint="set EDGEPRUNE_CONFIG to another file"
            ) from error


def entry_of_url(url: str) -> tuple[str, BoardEntry]:
    """Name and settings of ``ssh://user@host:port?python=/usr/bin/python3``.

    Raises:
        ConfigError: It is no such address, holds a password, or has an option that is not known.
    """
    target, _, query = url.partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    wrong = [name for name, value in options.items() if name not in _URL_OPTIONS or not value]
    if not target.startswith("ssh://") or wrong:
        raise ConfigError(
            f"a board's address must read ssh://user@host:port with the options {', '.join(_URL_OPTIONS)}, "
            + (f"found the option {wrong[0]}." if wrong else f"found {url.partition('://')[0]}://."),
            hint="ssh://user@host:22?python=/usr/bin/python3",
        )
    name = target.removeprefix("ssh://").rstrip("/")
    # Checked before the schema, whose errors would repeat a password.
    SshTarget.parse(name)
    if "host_key" in options:
        # A plus sign of the fingerprint arrives as a space, as in any query.
        options["host_key"] = options["host_key"].replace(" ", "+")
    try:
        return name, BoardEntry(ssh=name, **options)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ConfigError(
            f"{first['loc'][0]} of a board's address breaks a rule ({first['msg']}), found {first['input']!r}."
        ) from error


def require_known(spec: str) -> None:
    """Refuse the address of a board that nobody added, without reaching for any; asked before long steps.

    Args:
        spec: As in `edgeprune.boards.board.Board.open`.

    Raises:
        ConfigError: It is no address; `UnknownBoardError`: no board of that name is configured.
    """
    if "://" in spec:
        entry_of_url(spec)
    elif spec != "local":
        BoardConfig().get(spec)


def _unknown(name: str, known: list[str]) -> UnknownBoardError:
    near = difflib.get_close_matches(name, known, n=1)
    return UnknownBoardError(
        f"the board must be one of {', '.join(known)}, found {name!r}"
        + (f"; did you mean {near[0]!r}?" if near else "."),
        hint=near[0] if near else f"edgeprune device add {name} --ssh user@host",
    )
