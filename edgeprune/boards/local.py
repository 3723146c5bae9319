"""This machine as a board, reached without a network: commands are child processes, files are copied.

Commands get a session of their own, so that everything a command started can be killed with it, and so that Ctrl-C in a
terminal reaches this process alone, which then ends the command itself.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from edgeprune.boards.transport import CommandResult, Process, Progress, Transport
from edgeprune.errors import BoardFullError, CommandError, RemoteTimeoutError, TransferError
from edgeprune.files import sha256_of

_CHUNK_BYTES = 1 << 20
_POLL_S = 0.05
_CLOSE_S = 5.0


class LocalTransport(Transport):
    """Runs commands and copies files on this machine, as the user who runs this process."""

    @property
    def address(self) -> str:
        return "local"

    def run(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes = b"",
        timeout_s: float = 60.0,
        on_line: Callable[[str], None] | None = None,
    ) -> CommandResult:
        deadline = time.monotonic() + timeout_s
        child = _spawn(argv)
        if isinstance(child, CommandResult):
            return child
        pipes = _Pipes(child, stdin, on_line)
        try:
            while pipes.pump(_POLL_S):
                if time.monotonic() > deadline:
                    raise RemoteTimeoutError(
                        f"{argv[0]} must finish within {timeout_s:g} s on this machine, found it still running; "
                        "it was killed."
                    )
            child.wait()
        except BaseException:
            _kill(child)
            raise
        finally:
            pipes.close()
        return CommandResult(child.returncode, bytes(pipes.stdout), bytes(pipes.stderr))

    def open_process(self, argv: Sequence[str], *, stdin: bytes = b"") -> Process:
        child = _spawn(argv)
        if isinstance(child, CommandResult):
            raise CommandError(f"{argv[0]} must be a program of this machine, found: {child.stderr.decode().strip()}.")
        assert child.stdin is not None
        # A child that died before reading its input shows as the end of its output, which is where it is asked for.
        with contextlib.suppress(BrokenPipeError):
            child.stdin.write(stdin)
            child.stdin.flush()
        return _LocalProcess(child)

    def put(self, local: Path, remote: str, *, progress: Progress | None = None) -> None:
        target = _absolute(remote)
        try:
            _place(local, target, progress)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise BoardFullError(
                    f"{target.parent} must have room for {local.stat().st_size} bytes, found the disk full.",
                    hint="free some space there, or choose another root folder",
                ) from error
            raise TransferError(f"{local} must be copied to {target}, found: {error.strerror}.") from error

    def get(self, remote: str, local: Path) -> None:
        source = _absolute(remote)
        try:
            _place(source, local, None)
        except OSError as error:
            raise TransferError(f"{source} must be copied to {local}, found: {error.strerror}.") from error

    def close(self) -> None:
        """Nothing is held open between calls."""


class _LocalProcess(Process):
    """A child with an open input."""

    def __init__(self, child: subprocess.Popen[bytes]) -> None:
        self._child = child
        self._pipes = _Pipes(child, None, None)
        self._taken = 0
        self._result: CommandResult | None = None

    def readline(self, timeout_s: float) -> str | None:
        deadline = time.monotonic() + timeout_s
        while True:
            end = self._pipes.stdout.find(b"\n", self._taken)
            if end >= 0:
                line = self._pipes.stdout[self._taken : end]
                self._taken = end + 1
                return line.decode("utf-8", "replace")
            remaining_s = deadline - time.monotonic()
            if remaining_s <= 0:
                raise RemoteTimeoutError(f"the command must print a line within {timeout_s:g} s, found none.")
            if not self._pipes.pump(min(_POLL_S, remaining_s)):
                rest = self._pipes.stdout[self._taken :]
                self._taken = len(self._pipes.stdout)
                return rest.decode("utf-8", "replace") if rest else None

    def close(self) -> CommandResult:
        if self._result is None:
            deadline = time.monotonic() + _CLOSE_S
            try:
                self._pipes.close_input()
                while self._pipes.pump(_POLL_S) and time.monotonic() < deadline:
                    pass
                self._child.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                _kill(self._child)
            except BaseException:
                _kill(self._child)
                raise
            finally:
                self._pipes.close()
            output = bytes(self._pipes.stdout[self._taken :])
            self._result = CommandResult(self._child.returncode, output, bytes(self._pipes.stderr))
        return self._result


class _Pipes:
    """The three pipes of a child, fed and drained in one thread, so that Ctrl-C and deadlines need no help."""

    def __init__(
        self, child: subprocess.Popen[bytes], stdin: bytes | None, on_line: Callable[[str], None] | None
    ) -> None:
        self._child = child
        self._unsent = memoryview(stdin) if stdin is not None else None
        self._on_line = on_line
        self._line_start = 0
        self._selector = selectors.DefaultSelector()
        self.stdout = bytearray()
        self.stderr = bytearray()
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stderr is not None
        for stream, buffer in ((child.stdout, self.stdout), (child.stderr, self.stderr)):
            os.set_blocking(stream.fileno(), False)
            self._selector.register(stream, selectors.EVENT_READ, buffer)
        if self._unsent is not None:
            os.set_blocking(child.stdin.fileno(), False)
            self._selector.register(child.stdin, selectors.EVENT_WRITE)

    def pump(self, wait_s: float) -> bool:
        """Move what can be moved within `wait_s` seconds; False once the output has ended.

        The output has also ended when the child is gone and its pipes are empty, though a process that it left behind
        may hold them open.
        """
        gone = self._child.poll() is not None
        ready = self._selector.select(0 if gone else wait_s)
        for key, _ in ready:
            if key.data is None:
                self._feed()
            else:
                self._drain(key)
        reading = any(key.data is not None for key in self._selector.get_map().values())
        if not reading or (gone and not any(key.data is not None for key, _ in ready)):
            self._deliver(last=True)
            return False
        return True

    def close_input(self) -> None:
        """Let the child see the end of its input."""
        stream = self._child.stdin
        assert stream is not None
        if stream in {key.fileobj for key in self._selector.get_map().values()}:
            self._selector.unregister(stream)
        with contextlib.suppress(BrokenPipeError):
            stream.close()

    def close(self) -> None:
        """Give all three pipes back."""
        self.close_input()
        self._selector.close()
        for stream in (self._child.stdout, self._child.stderr):
            assert stream is not None
            stream.close()

    def _feed(self) -> None:
        assert self._child.stdin is not None
        assert self._unsent is not None
        try:
            sent = os.write(self._child.stdin.fileno(), self._unsent[:_CHUNK_BYTES])
        except BrokenPipeError:
            # The command does not want the rest; its exit code says whether that is right.
            sent = len(self._unsent)
        self._unsent = self._unsent[sent:]
        if not self._unsent:
            self.close_input()

    def _drain(self, key: selectors.SelectorKey) -> None:
        try:
            content = os.read(key.fd, _CHUNK_BYTES)
        except BlockingIOError:
            return
        if not content:
            self._selector.unregister(key.fileobj)
            return
        key.data.extend(content)
        if key.data is self.stdout:
            self._deliver(last=False)

    def _deliver(self, *, last: bool) -> None:
        if self._on_line is None:
            return
        while (end := self.stdout.find(b"\n", self._line_start)) >= 0:
            line, self._line_start = self.stdout[self._line_start : end], end + 1
            self._on_line(line.decode("utf-8", "replace"))
        if last and self._line_start < len(self.stdout):
            line, self._line_start = self.stdout[self._line_start :], len(self.stdout)
            self._on_line(line.decode("utf-8", "replace"))


def _spawn(argv: Sequence[str]) -> subprocess.Popen[bytes] | CommandResult:
    """Start a command in a session of its own; what a shell would say when there is nothing to start."""
    home = Path.home()
    try:
        return subprocess.Popen(
            list(argv),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            cwd=home,
            bufsize=0,
        )
    except (FileNotFoundError, NotADirectoryError) as error:
        if str(error.filename) == str(home):
            raise CommandError(
                f"the home folder {home} must exist for commands to start there, found: {error.strerror}.",
                hint="set HOME to a folder that exists",
            ) from error
        return CommandResult(127, b"", f"{argv[0]}: {error.strerror}\n".encode())
    except (PermissionError, OSError) as error:
        return CommandResult(126, b"", f"{argv[0]}: {error.strerror}\n".encode())


def _kill(child: subprocess.Popen[bytes]) -> None:
    """End a command and everything that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _absolute(remote: str) -> Path:
    """Paths of a board are absolute or relative to the user's home."""
    return Path.home() / remote


def _place(source: Path, target: Path, progress: Progress | None) -> None:
    """Copy through a partial file next to the target, check what reached it, and rename it into place."""
    size = source.stat().st_size
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.partial")
    with _exclusive(partial) as writer:
        try:
            wanted = _copy(source, writer, size, progress)
            if sha256_of(partial) != wanted:
                raise TransferError(f"the copy at {target} must equal {source}, found other content.")
            partial.chmod(0o644)
            partial.replace(target)
        except BaseException:
            # It stays only when this process is killed outright; whoever can clean up does, as copying is cheap here.
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise
    _sync_folder(target.parent)


@contextlib.contextmanager
def _exclusive(partial: Path) -> Iterator[BinaryIO]:
    """Open a partial file for this process alone; another one that copies the same file has it to the end first."""
    while True:
        with partial.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            # The one before may have renamed it into place meanwhile: then this handle is the finished file.
            if _is_at(partial, file):
                yield file
                return


def _is_at(path: Path, file: BinaryIO) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _copy(source: Path, writer: BinaryIO, total: int, progress: Progress | None) -> str:
    """Bring the open partial file to the content of `source` and to disk; the sha256 of the source.

    What a killed process left in it is kept as far as it is a prefix of the source.
    """
    digest = hashlib.sha256()
    done = 0
    writer.seek(0)
    with source.open("rb") as reader:
        while chunk := reader.read(_CHUNK_BYTES):
            if writer.read(len(chunk)) != chunk:
                writer.truncate(done)
                writer.seek(done)
                writer.write(chunk)
            digest.update(chunk)
            done += len(chunk)
            if progress is not None:
                progress(done, total)
    writer.truncate(done)
    writer.flush()
    os.fsync(writer.fileno())
    return digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    """A rename is atomic at once, but lasts only when its folder is on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
