"""``edgeprune doctor``: what this machine and a board lack, and the command that mends it."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import typer

from edgeprune.cli.console import Output, command_line
from edgeprune.cli.inputs import FORM
from edgeprune.cli.options import BackendOption, JsonOption, VerboseOption, given
from edgeprune.errors import ConfigError, EdgepruneError, PowerUnavailableError

if TYPE_CHECKING:
    from edgeprune.boards.power import BoardPower

_PACKAGES = (("torch", "pip install torch"), ("onnx", "pip install onnx"), ("onnxscript", "pip install onnxscript"))
_BOARD_FREE_BYTES = 200 << 20
_INCOMPATIBLE = 4


class Check(NamedTuple):
    """One line: where, what, how it is, what was found, and the command that mends it."""

    where: str
    name: str
    state: Literal["ok", "warn", "missing"]
    found: str
    mend: str = ""


def doctor(
    board: Annotated[
        str | None, typer.Option("--board", help="Look at this board too: local, a name, or ssh://user@host:port.")
    ] = None,
    backend: BackendOption = "onnxruntime",
    json_output: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Say what this machine and a board have, what they lack, and the command that mends it."""
    out = Output(json_output)
    checks = [*_host(), *_backends(backend)]
    code = 0
    if board is not None:
        with out.step(f"look at {board}"):
            try:
                checks += _board(board, backend)
            except EdgepruneError as error:
                code = error.exit_code
                checks.append(Check(board, "connection", "missing", error.message, error.hint or ""))
    for check in checks:
        # One line each and never wrapped: the command at its end must survive being copied.
        out.say(
            f"{check.state:<8} {check.where}: {check.name}: {check.found}" + (f" -> {check.mend}" if check.mend else "")
        )
    missing = [check for check in checks if check.state == "missing"]
    code = code or (_INCOMPATIBLE if missing else 0)
    if missing:
        out.say(f"missing: {', '.join(f'{check.name} on {check.where}' for check in missing)}")
    out.finish(
        {"healthy": not missing, "exit_code": code, "checks": [check._asdict() for check in checks]},
        next_command=None if missing else _following(board, backend),
    )
    if code:
        raise typer.Exit(code)


def _following(board: str | None, backend: str) -> str:
    if board is None:
        return command_line("edgeprune", "quickstart")
    other = given(backend=backend if backend != "onnxruntime" else None)
    return command_line("edgeprune", "profile", "MODEL", "--input", FORM, "--board", board, *other)


def _host() -> Iterator[Check]:
    here = "this machine"
    version = platform.python_version()
    new_enough = sys.version_info >= (3, 10)
    yield Check(
        here, "python", "ok" if new_enough else "missing", version, "" if new_enough else "Python 3.10 or newer"
    )
    for package, install in _PACKAGES:
        try:
            yield Check(here, package, "ok", metadata.version(package))
        except metadata.PackageNotFoundError:
            yield Check(here, package, "missing", "not installed", install)
    client = shutil.which("ssh")
    if client is not None:
        yield Check(here, "ssh client", "ok", client)
    else:
        lacking = "none: Include and Match in ~/.ssh/config are not read"
        yield Check(here, "ssh client", "warn", lacking, "apt-get install openssh-client")
    server = shutil.which("sshd") or shutil.which("sshd", path="/usr/sbin:/sbin:/usr/local/sbin")
    if server is not None:
        yield Check(here, "ssh server", "ok", f"{server} (only the tests need it)")
    else:
        yield Check(here, "ssh server", "warn", "none (only the tests need it)", "apt-get install openssh-server")
    yield _config(here)
    folder = Path.cwd()
    writable = os.access(folder, os.W_OK)
    yield Check(
        here, "write access", "ok" if writable else "missing", str(folder), "" if writable else "another folder"
    )


def _config(where: str) -> Check:
    from edgeprune.boards.config import BoardConfig

    config = BoardConfig()
    try:
        boards = config.list()
    except ConfigError as error:
        return Check(where, "board list", "missing", error.message, error.hint or "")
    parent = next(path for path in config.path.parents if path.exists())
    if not os.access(config.path if config.path.exists() else parent, os.W_OK):
        return Check(where, "board list", "warn", f"{config.path} cannot be written", "set EDGEPRUNE_CONFIG")
    return Check(where, "board list", "ok", f"{config.path} ({len(boards)} board{'' if len(boards) == 1 else 's'})")


def _backends(wanted: str) -> Iterator[Check]:
    from edgeprune.backends import registry

    known = registry.describe()
    if wanted not in registry.names():
        raise ConfigError(f"--backend must be one of {', '.join(registry.names())}, found {wanted!r}.")
    for name, reason, install in known:
        if reason is None:
            yield Check("this machine", f"backend {name}", "ok", "can export and compile")
        else:
            state: Literal["warn", "missing"] = "missing" if name == wanted else "warn"
            yield Check("this machine", f"backend {name}", state, reason, install)


def _board(spec: str, backend: str) -> list[Check]:
    import edgeprune
    from edgeprune.backends import registry
    from edgeprune.boards.installing import for_board

    with edgeprune.Board.open(spec) as board:
        fingerprint = board.probe()
        power = board.power()
        address, root = board.transport.address, board.root
    checks = [
        Check(spec, "connection", "ok", address),
        Check(spec, "python", "ok", fingerprint.python),
    ]
    absences = list(fingerprint.absences)
    for requirement in registry.get(backend).requirements(fingerprint):
        found = requirement.found
        if not requirement.met:  # the probe's own sentence on it says why; one line is enough for one lack
            for sentence in [one for one in absences if one.startswith(f"{requirement.field} ")]:
                absences.remove(sentence)
                found = sentence.rstrip(".")
        mend = "" if requirement.met else for_board(requirement.hint, spec)
        state: Literal["ok", "missing"] = "ok" if requirement.met else "missing"
        checks.append(Check(spec, requirement.field, state, f"{found} (needed {requirement.needed})", mend))
    free = fingerprint.free_disk_bytes
    enough = free >= _BOARD_FREE_BYTES
    checks.append(
        Check(
            spec,
            "disk",
            "ok" if enough else "missing",
            f"{free / 2**20:.0f} MiB free for {root}",
            "" if enough else "free some space, or edgeprune device add ... --root",
        )
    )
    checks.append(_power(spec, power))
    checks += [Check(spec, "lacks", "warn", sentence) for sentence in absences]
    checks += [Check(spec, "disturbance", "warn", sentence) for sentence in fingerprint.disturbances]
    return checks


def _power(where: str, power: BoardPower) -> Check:
    """Power is only needed for energy, so its lack is a warning."""
    try:
        return Check(where, "power", "ok", power.scope().covers)
    except PowerUnavailableError as error:
        return Check(where, "power", "warn", error.message, error.hint or "")
