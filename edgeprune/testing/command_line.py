"""The command line in processes of its own, and what every refusal owes the user: one line, an exit code, and nothing touched."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from edgeprune.testing import forking

_TIMEOUT_S = 300.0
_PARTIAL = re.compile(r"(\.part|\.partial|\.tmp|\.draft)$")

# What a board may gain without anything of the user's having changed: the runner, who held it, what is known of it.
_BOOKKEEPING = ("runner", "lock", "libraries.json", "journal.jsonl")

# The clock of an interrupt starts when edgeprune does: what a signal does to the interpreter's own start is not ours.
_MARKED = (
    "import os, sys\nfrom edgeprune.cli.main import run\n"
    "open(os.environ['EDGEPRUNE_TEST_STARTED'], 'w').close()\nsys.exit(run())"
)


class CommandLine:
    """Runs ``edgeprune`` in a folder with a board, settings, state and temporary files of its own.

    Attributes:
        folder: Working directory.
        board: Root folder of the board ``local``; it may also be given to a board behind a server on this machine.
        temporary: Where processes put their temporary files.
        environment: Of every command.
    """

    def __init__(self, folder: Path, board: Path, **environment: str) -> None:
        self.folder, self.board, self.temporary = folder, board, folder / "temporary"
        self.temporary.mkdir(parents=True, exist_ok=True)
        self.environment = {
            **{name: value for name, value in os.environ.items() if name != "EDGEPRUNE_FAULT"},
            "EDGEPRUNE_CONFIG": str(folder / "boards.toml"),
            "EDGEPRUNE_ROOT": str(board),
            "EDGEPRUNE_STATE": str(folder / "state"),
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "TMPDIR": str(self.temporary),
            **environment,
        }

    def start(
        self, *arguments: str, environment: Mapping[str, str] | None = None, started: Path | None = None
    ) -> subprocess.Popen[str]:
        """A running command, in a process group of its own. It makes the file `started` once its entry point runs."""
        command = [sys.executable, "-m", "edgeprune"] if started is None else [sys.executable, "-c", _MARKED]
        marker = {} if started is None else {"EDGEPRUNE_TEST_STARTED": str(started)}
        return subprocess.Popen(
            [*command, *arguments],
            cwd=self.folder,
            env={**self.environment, **marker, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, *arguments: str, environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """A command that has ended, in a process that was forked ready (`edgeprune.testing.forking`)."""
        return forking.run(arguments, self.folder, {**self.environment, **(environment or {})}, _TIMEOUT_S)

    def succeed(self, *arguments: str, environment: Mapping[str, str] | None = None) -> str:
        """Run a command that must work; returns what it printed."""
        done = self.run(*arguments, environment=environment)
        assert done.returncode == 0, (done.stdout, done.stderr)
        return done.stdout

    def refuse(
        self,
        *arguments: str,
        code: int,
        parts: Sequence[str],
        unsaid: str | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> str:
        """Run a command that must be refused and change nothing on either side, before it says `unsaid`; returns its line."""
        before = self.files(), self.releases()
        done = self.run(*arguments, environment=environment)
        line = one_line(done.returncode, done.stdout, done.stderr, code)
        for part in parts:
            assert part in line, line
        assert " Try: " in line, f"a next step must be named: {line}"
        assert unsaid is None or unsaid not in done.stdout, done.stdout
        assert (self.files(), self.releases()) == before
        self.assert_tidy()
        return line

    def files(self) -> dict[str, str]:
        """What the user's folder holds; temporary files and the remembered state are not the user's."""
        return _contents(self.folder, [self.temporary, self.folder / "state", self.board])

    def releases(self) -> dict[str, str]:
        """What the board holds, bookkeeping left out."""
        return _contents(self.board, [self.board / name for name in _BOOKKEEPING])

    def current(self) -> str | None:
        """Folder of the release that the board runs."""
        link = self.board / "current"
        return link.readlink().name if link.is_symlink() else None

    def assert_tidy(self) -> None:
        """Nothing is half-written on either side, and nobody holds the board."""
        from edgeprune.deployment.artifact import Artifact

        found = [path for path in self.folder.rglob("*") if _PARTIAL.search(path.name)]
        found += [path for path in self.board.rglob("*") if _PARTIAL.search(path.name)]
        found += list(self.temporary.glob("edgeprune-*"))
        incoming = self.board / "incoming"
        found += list(incoming.iterdir()) if incoming.is_dir() else []
        assert not found, found
        for release in (self.board / "releases").glob("*"):
            Artifact.load(release)
        for blob in (self.board / "store").glob("*"):
            assert hashlib.sha256(blob.read_bytes()).hexdigest() == blob.name
        assert self.holder() is None

    def holder(self) -> str | None:
        """Who holds the board, as its lock tells it; None when it is free."""
        path = self.board / "lock"
        if not path.exists():
            return None
        with path.open("r") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return file.read()
        return None


def one_line(returncode: int | None, out: str, err: str, code: int) -> str:
    """The only line on standard error of a command that ended with this exit code, and no traceback anywhere."""
    assert returncode == code, (out, err)
    lines = err.splitlines()
    assert len(lines) == 1, err
    assert "Traceback" not in out + err
    return lines[0]


def _contents(folder: Path, without: Sequence[Path]) -> dict[str, str]:
    """Relative path to the target of a link or the hash of a file, for everything below a folder."""
    found: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        if any(path == other or other in path.parents for other in without):
            continue
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"-> {path.readlink()}"
        else:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
    return found
