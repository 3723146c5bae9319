"""Where and as whom to reach a host: the user's own ssh settings, as OpenSSH would use them.

OpenSSH's client is asked (`ssh -G`) where it is installed, because only it knows all of Include, Match and its own defaults.
Without it, paramiko's parser reads the same files and what it cannot honor is logged.
"""

from __future__ import annotations

import getpass
import logging
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from edgeprune.boards.known_hosts import DEFAULT_PORT
from edgeprune.errors import ConfigError

logger = logging.getLogger("edgeprune.boards.ssh_config")

CONFIG_VARIABLE = "EDGEPRUNE_SSH_CONFIG"
"""Environment variable with the path of an ssh_config file to use instead of the user's."""

_CLIENT_TIMEOUT_S = 15  # a `Match exec` of the user may ask the network

# Settings that would change whom we trust or how we log in, and that nothing here implements.
_NOT_HONORED = ("knownhostscommand", "revokedhostkeys", "certificatefile", "pkcs11provider")

_HONORED = {
    *("hostname", "port", "user", "identityfile", "identitiesonly", "identityagent", "hostkeyalias", "proxyjump"),
    *("proxycommand", "userknownhostsfile", "globalknownhostsfile"),
}


@dataclass(frozen=True)
class SshTarget:
    """``user@host:port`` taken apart; None means "as the settings say"."""

    host: str
    user: str | None = None
    port: int | None = None

    @classmethod
    def parse(cls, text: str) -> SshTarget:
        """Read ``[ssh://][user@]host[:port]``; an IPv6 address with a port stands in brackets.

        Raises:
            ConfigError: If it is none of these, or holds a password.
        """
        body = text.removeprefix("ssh://").removesuffix("/") if text.startswith("ssh://") else text
        user, separator, place = body.rpartition("@")
        if ":" in user:
            # The text is not repeated: it holds a secret.
            raise ConfigError(
                "an ssh target must not hold a password, found one before the '@'.",
                hint="use a key: ssh-copy-id USER@HOST",
            )
        match = re.fullmatch(
            r"\[(?P<v6>[0-9A-Fa-f:.%\w]+)\](?::(?P<p6>\d+))?|(?P<host>[^:\[\]]+)(?::(?P<port>\d+))?", place
        )
        if match is None and place.count(":") > 1 and re.fullmatch(r"[0-9A-Fa-f:.]+(%\w+)?", place):
            host, port_text = place, None
        elif match is not None:
            host, port_text = match["v6"] or match["host"], match["p6"] or match["port"]
        else:
            host, port_text = "", None
        port = int(port_text) if port_text else None
        # A leading dash would be read as an option by the ssh client.
        valid = re.fullmatch(r"[\w%.:][\w%.:-]*", host) and (
            not separator or re.fullmatch(r"[^\s\-'\"@/][^\s'\"@/]*", user)
        )
        if not valid or (port is not None and not 0 < port < 65536):
            raise ConfigError(f"an ssh target must be [user@]host[:port] or an alias of ~/.ssh/config, found {text!r}.")
        return cls(host, user or None, port)


@dataclass(frozen=True)
class SshSettings:
    """Everything that is needed to reach one host.

    Attributes:
        host: Address to connect to.
        port: TCP port.
        user: Login name on the board.
        identities: Private key files, in the order to try.
        only_identities: Whether keys of the agent count only where they are among `identities`.
        agent: Socket of the ssh agent; None for none.
        known_hosts: Files with trusted host keys, the user's first.
        host_key_alias: Name under which the host stands in those files, if another.
        jumps: Hosts to go through, nearest first.
        command: Shell command whose standard input and output are the link, instead of a TCP connection.
        target: What the user calls it.
    """

    host: str
    port: int
    user: str
    identities: tuple[Path, ...] = ()
    only_identities: bool = False
    agent: str | None = None
    known_hosts: tuple[Path, ...] = ()
    host_key_alias: str | None = None
    jumps: tuple[str, ...] = ()
    command: str | None = None
    target: str = ""

    @property
    def address(self) -> str:
        """``user@host:port``, for messages and hints."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.user}@{host}:{self.port}"


def resolve(target: str, *, config: Path | None = None) -> SshSettings:
    """Settings of one host, from the user's ssh configuration.

    Args:
        target: ``[user@]host[:port]`` or an alias; what it says wins over the files.
        config: ssh_config file to use instead of the user's and the system's.

    Raises:
        ConfigError: If the target or the configuration is not valid.
    """
    parsed = SshTarget.parse(target)
    named = os.environ.get(CONFIG_VARIABLE)
    path = config or (Path(named) if named else None)
    if path is not None and not path.is_file():
        raise ConfigError(f"the ssh configuration must be a file, found none at {path}.")
    client = shutil.which("ssh")
    values = _ask_client(client, parsed, path) if client else _ask_parser(parsed, path)
    ignored = [name for name in _NOT_HONORED if values.get(name, ["none"]) != ["none"]]
    if ignored:
        logger.warning("ssh settings of %s that are not used here: %s.", parsed.host, ", ".join(ignored))
    return replace(_settings(parsed, values), target=target.removeprefix("ssh://").rstrip("/"))


def _ask_client(client: str, target: SshTarget, config: Path | None) -> dict[str, list[str]]:
    argv = [client, "-G"]
    argv += ["-F", str(config)] if config else []
    argv += ["-l", target.user] if target.user else []
    argv += ["-p", str(target.port)] if target.port else []
    try:
        done = subprocess.run(
            [*argv, "--", target.host], stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
            timeout=_CLIENT_TIMEOUT_S, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise ConfigError(
            f"ssh -G {target.host} must answer within {_CLIENT_TIMEOUT_S} s, it did not.",
            hint="look for a slow 'Match exec' in the ssh configuration",
        ) from error
    if done.returncode != 0:
        reason = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise ConfigError(f"the ssh configuration must be valid, ssh -G {target.host} says: {reason}.")
    values: dict[str, list[str]] = {}
    for line in done.stdout.splitlines():
        name, _, value = line.partition(" ")
        values.setdefault(name, []).append(value)
    return values


def _ask_parser(target: SshTarget, config: Path | None) -> dict[str, list[str]]:
    import paramiko

    paths = [config] if config else [Path("~/.ssh/config").expanduser(), Path("/etc/ssh/ssh_config")]
    values: dict[str, list[str]] = {}
    ignored: list[str] = []
    for path in paths:
        try:
            text = path.read_text(errors="replace")
        except FileNotFoundError:
            continue
        except OSError as error:
            raise ConfigError(f"the ssh configuration {path} must be readable, found: {error.strerror}.") from error
        includes = re.findall(r"(?im)^\s*(include\b.*)$", text)
        ignored += [f"{line.strip()!r} of {path}" for line in includes]
        _own_name()  # paramiko asks for it too, and leaves the failure to its caller
        try:
            found = paramiko.SSHConfig.from_text(text).lookup(target.host)
        except (paramiko.SSHException, ImportError) as error:
            # Match exec needs a package that paramiko imports only then.
            reason = " ".join(str(error).split())
            raise ConfigError(f"the ssh configuration {path} must be valid, found: {reason}.") from error
        if found.get("hostname") == target.host:
            # paramiko names the target itself where the file has no HostName, which would hide the next file's.
            del found["hostname"]
        for name, value in found.items():
            values.setdefault(name, value if isinstance(value, list) else [str(value)])
        ignored += [f"{name} of {path}" for name in found if name not in _HONORED]
    if target.user:
        values["user"] = [target.user]
    if target.port:
        values["port"] = [str(target.port)]
    if ignored:
        logger.warning("there is no ssh client, and without it these settings are ignored: %s.", ", ".join(ignored))
    return values


def _settings(target: SshTarget, values: Mapping[str, list[str]]) -> SshSettings:
    def last_word(name: str) -> str | None:
        value = values.get(name, ["none"])[0]
        return None if value.lower() == "none" else value

    host = last_word("hostname") or target.host
    port = int(last_word("port") or DEFAULT_PORT)
    own = _own_name()
    user = last_word("user") or own
    tokens = {
        "%%": "%",
        "%d": str(Path("~").expanduser()),
        "%h": host,
        "%n": target.host,
        "%p": str(port),
        "%r": user,
        "%u": own,
    }

    def path(text: str) -> Path:
        expanded = re.sub(r"%.", lambda found: tokens.get(found[0], found[0]), text)
        expanded = re.sub(r"\$\{(\w+)\}", lambda found: os.environ.get(found[1], found[0]), expanded)
        return Path(expanded).expanduser()

    default_keys = [f"~/.ssh/id_{kind}" for kind in ("rsa", "ecdsa", "ed25519")]
    known = _paths(values.get("userknownhostsfile", ["~/.ssh/known_hosts ~/.ssh/known_hosts2"]))
    known += _paths(values.get("globalknownhostsfile", ["/etc/ssh/ssh_known_hosts /etc/ssh/ssh_known_hosts2"]))
    agent = last_word("identityagent") if "identityagent" in values else "SSH_AUTH_SOCK"
    if agent and (agent == "SSH_AUTH_SOCK" or agent.startswith("$")):
        agent = os.environ.get(agent.lstrip("$") or "SSH_AUTH_SOCK")
    jump = last_word("proxyjump")
    command = None if jump else last_word("proxycommand")
    return SshSettings(
        host=host,
        port=port,
        user=user,
        identities=tuple(path(name) for name in values.get("identityfile", default_keys) if name.lower() != "none"),
        only_identities=last_word("identitiesonly") == "yes",
        agent=str(path(agent)) if agent else None,
        known_hosts=tuple(path(name) for name in known if name.lower() != "none"),
        host_key_alias=last_word("hostkeyalias"),
        jumps=tuple(hop.strip() for hop in jump.split(",")) if jump else (),
        command=re.sub(r"%.", lambda found: tokens.get(found[0], found[0]), command) if command else None,
    )


def _own_name() -> str:
    """Login name of whoever runs this.

    Raises:
        ConfigError: The system knows no name of this user, as in many containers.
    """
    try:
        return getpass.getuser()
    except (OSError, KeyError) as error:
        raise ConfigError(
            f"the user who connects must have a login name, found none of user id {os.getuid()}.",
            hint="set the environment variable LOGNAME",
        ) from error


def _paths(lines: Sequence[str]) -> list[str]:
    """Take a list of files apart; `ssh -G` prints names with spaces unquoted, so words are joined where that names a file."""
    found: list[str] = []
    for line in lines:
        words = re.findall(r'"[^"]*"|\S+', line)
        while words:
            size = next(
                (size for size in range(len(words), 1, -1) if Path(" ".join(words[:size])).expanduser().is_file()), 1
            )
            found.append(" ".join(words[:size]).strip('"'))
            del words[:size]
    return found


def jumps_of(text: str) -> tuple[str, ...]:
    """Hosts of ``[user@]host[:port],...``, nearest first.

    Raises:
        ConfigError: One of them is no address.
    """
    hops = tuple(hop.strip() for hop in text.split(","))
    for hop in hops:
        SshTarget.parse(hop)
    return hops


def with_overrides(
    settings: SshSettings,
    *,
    identity: Path | None = None,
    known_hosts: Path | None = None,
    jumps: tuple[str, ...] = (),
) -> SshSettings:
    """The same settings with the key, the known_hosts file and the jump hosts that the caller names instead of the configured."""
    if identity is not None:
        settings = replace(settings, identities=(identity.expanduser(),), only_identities=True)
    if known_hosts is not None:
        settings = replace(settings, known_hosts=(known_hosts.expanduser(),))
    if jumps:
        settings = replace(settings, jumps=jumps, command=None)
    return settings
