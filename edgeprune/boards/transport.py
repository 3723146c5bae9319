"""How edgeprune reaches a board: run a command, put a file, get a file. One subclass per kind of connection.

A transport knows nothing of pruning or latency. What it promises, and what `edgeprune.testing.transport` proves of
every subclass: arguments reach the command unchanged whatever characters they hold (over SSH with a login shell of the
POSIX sh family, and with fish unless they hold backslashes); every call has a deadline; a file
that was `put` is on the board either whole (its hash was checked there) or not at all, and a second `put` after a lost
link goes on where the first one stopped.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""


@dataclass(frozen=True)
class CommandResult:
    """What a command on the board left behind.

    Attributes:
        returncode: Exit status; minus the signal number where a signal ended it.
        stdout: Standard output, whole.
        stderr: Standard error, whole.
    """

    returncode: int
    stdout: bytes
    stderr: bytes


class Process(ABC):
    """A command on the board that lives as long as its standard input stays open: how a lock is held there.

    When this machine dies or the link is lost, the command sees the end of its input and goes.
    """

    @abstractmethod
    def readline(self, timeout_s: float) -> str | None:
        """Next line of standard output without its line end, or None when the output has ended.

        Raises:
            RemoteTimeoutError: No whole line arrived within `timeout_s` seconds; the command runs on.
            ConnectError: The link was lost.
        """

    @abstractmethod
    def close(self) -> CommandResult:
        """Close its input, give it a few seconds to end, then kill it with its children; a second call changes nothing.

        Returns:
            Exit status, the output that `readline` did not take, and the standard error.
        """


class Transport(ABC):
    """A connection to one board. Use it as a context manager, or `close` it."""

    @property
    @abstractmethod
    def address(self) -> str:
        """What a person calls the other end, e.g. ``"local"`` or ``"nvidia@10.0.0.7:22"``."""

    @abstractmethod
    def run(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes = b"",
        timeout_s: float = 60.0,
        on_line: Callable[[str], None] | None = None,
    ) -> CommandResult:
        """Run one command and wait for it. A program that is missing or cannot be run gives 127 or 126, as in a shell.

        Args:
            argv: Program and arguments; nothing in them is interpreted by a shell.
            stdin: What the command reads.
            timeout_s: Deadline for the whole command, seconds. Past it the command is killed on the board.
            on_line: Called with each line of standard output as it arrives (without the line end); exceptions that it
                raises end the command on the board and propagate.

        Raises:
            RemoteTimeoutError: Past the deadline.
            ConnectError: The link was lost; the command is dead or will die.
        """

    @abstractmethod
    def open_process(self, argv: Sequence[str], *, stdin: bytes = b"") -> Process:
        """Start a command, write `stdin` to it and keep its input open until `Process.close`.

        Args:
            argv: As in `run`.
            stdin: What it reads first; at most 64 KiB.

        Raises:
            ConnectError: The link was lost.
        """

    @abstractmethod
    def put(self, local: Path, remote: str, *, progress: Progress | None = None) -> None:
        """Copy a file to the board: resumed where an earlier try stopped, hash-checked there, then renamed into place.

        Args:
            local: A file of this machine.
            remote: Absolute path on the board, or one relative to the user's home; missing folders are made.
            progress: Told the bytes that are on the board.

        Raises:
            BoardFullError: No space left on the board; `remote` is as it was.
            TransferError: The copy's hash is wrong, or the board refuses; `remote` is as it was.
        """

    @abstractmethod
    def get(self, remote: str, local: Path) -> None:
        """Copy a file from the board; `local` appears whole or not at all.

        Raises:
            TransferError: The file is missing or cannot be read.
        """

    @abstractmethod
    def close(self) -> None:
        """Close the connection; a second call does nothing."""

    def __enter__(self) -> Transport:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
