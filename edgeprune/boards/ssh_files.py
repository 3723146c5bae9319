"""Copying files over SFTP: resumed, checked by hash on the board, and renamed into place.

The commands that a copy needs (hash, free space) go through the transport's own `run`.
"""

from __future__ import annotations

import os
import posixpath
import re
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import paramiko
from paramiko.sftp import CMD_DATA, CMD_READ, CMD_WRITE, int64

from edgeprune.boards.ssh_connection import Connection
from edgeprune.boards.ssh_route import one_line
from edgeprune.boards.transport import CommandResult, Progress
from edgeprune.errors import BoardFullError, ConnectError, RemoteError, TransferError
from edgeprune.files import sha256_of

Run = Callable[[Sequence[str], float, bytes], CommandResult]
"""Runs a command on the board within so many seconds, with this standard input."""

_BLOCK_BYTES = 1 << 15  # the largest write that every SFTP server takes
_IN_FLIGHT = 64  # as OpenSSH's sftp
_STALL_S = 60.0
_HASH_BYTES_PER_S = 5e6  # a slow board with a slow card

_HASH = (
    'test -f "$1" || { echo absent; exit 0; }; head -c "$2" < "$1" | '
    "if command -v sha256sum > /dev/null; then sha256sum; elif command -v shasum > /dev/null; then shasum -a 256; "
    "elif command -v openssl > /dev/null; then openssl dgst -sha256 -r; "
    'else python3 -c "import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())"; fi'
)

# mv moves a file into a folder of that name; here the name must be the file's.
_MOVE = 'if [ -d "$2" ]; then echo "$2 is a folder" >&2; exit 1; fi; mv -f -- "$1" "$2" || { [ -e "$1" ] || exit 44; exit 1; }'
_TAKEN_AWAY = 44
"""Exit code of that where another host has renamed the file."""

_TRIES = 5  # of a copy whose partial file somebody else keeps taking away


class NoSftpError(TransferError):
    """The board's SSH server has no SFTP server."""


class Refused(Exception):  # noqa: N818 (it never leaves a copier)
    """The board said no, in so many words."""


class Gone(Exception):  # noqa: N818 (it never leaves a copier)
    """The partial file was renamed or removed, or has just been made, by another host that copies the same content."""


class FileCopier:
    """Copies files over one link."""

    def __init__(self, connection: Connection, run: Run, timeout_s: float) -> None:
        self._connection = connection
        self._run = run
        self._timeout_s = timeout_s

    @property
    def _address(self) -> str:
        return self._connection.settings.address

    def put(self, local: Path, remote: str, progress: Progress | None) -> None:
        """`Transport.put`."""
        remote = home_relative(remote)
        size, digest = _local_hash(local)
        partial = f"{remote}.partial-{digest[:16]}"
        with self._sftp() as sftp:
            try:
                self._make_folder(sftp, posixpath.dirname(remote))
                for _ in range(_TRIES):
                    try:
                        self._put_once(sftp, local, size, digest, partial, remote, progress)
                        return
                    except Gone:
                        # Hosts that copy the same content write the same bytes into one partial file; the first renames it.
                        if self._remote_hash(remote, size + 1) == digest:
                            if progress is not None:
                                progress(size, size)
                            return
                raise Refused(f"its partial file gone {_TRIES} times")
            except Refused as error:
                free = self._free_bytes(posixpath.dirname(remote) or ".")
                self._remove(sftp, partial)
                if free is not None and free < _BLOCK_BYTES:
                    raise self._full(posixpath.dirname(remote), size, free) from error
                raise TransferError(
                    f"{local} must be copied to {remote} on {self._address}, found: {error}."
                ) from error

    def _put_once(
        self, sftp: Any, local: Path, size: int, digest: str, partial: str, remote: str, progress: Progress | None
    ) -> None:
        left = self._resume_at(sftp, local, partial, size)
        done = left or 0
        self._need_space(sftp, partial, posixpath.dirname(remote) or ".", size - done)
        try:
            self._send(sftp, local, partial, left, size, progress)
            # One byte more than there should be, so that a longer file is told apart.
            found = self._remote_hash(partial, size + 1)
            if found is None:
                raise Gone
            if found != digest and self._remote_hash(remote, size + 1) == digest:
                # What was written to has been renamed; this partial file is the next host's, who is not through yet.
                raise Gone
            if found != digest:
                raise Refused(f"a copy with the hash {found}, not {digest}")
            self._rename(sftp, partial, remote)
        except Refused as error:
            if isinstance(error.__cause__, FileNotFoundError):
                raise Gone from error
            raise

    def get(self, remote: str, local: Path) -> None:
        """`Transport.get`."""
        remote = home_relative(remote)
        handle, name = tempfile.mkstemp(prefix=f".{local.name}.", suffix=".partial", dir=local.parent)
        temporary = Path(name)
        try:
            with os.fdopen(handle, "wb") as writer, self._sftp() as sftp:
                try:
                    self._receive(sftp, remote, writer)
                except Refused as error:
                    raise TransferError(
                        f"{remote} on {self._address} must be a file that can be read, found: {error}."
                    ) from error
            # mkstemp makes files for the owner alone; a copy is made as any new file is.
            mask = os.umask(0)
            os.umask(mask)
            temporary.chmod(0o666 & ~mask)
            temporary.replace(local)
        finally:
            temporary.unlink(missing_ok=True)

    @contextmanager
    def _sftp(self) -> Iterator[Any]:
        with self._connection.translated():
            channel = self._connection.open_session(self._timeout_s)
        try:
            with self._connection.translated(self._no_sftp):
                channel.settimeout(self._timeout_s)
                channel.invoke_subsystem("sftp")
                sftp = paramiko.SFTPClient(channel)
                channel.settimeout(_STALL_S)
            yield sftp
        finally:
            self._connection.close_channel(channel, 2.0)

    def _no_sftp(self, reason: str) -> RemoteError:
        if not self._connection.alive:
            return ConnectError(
                f"the link to {self._address} must stay up, it was lost ({reason}).", hint="run it again"
            )
        return NoSftpError(
            f"{self._address} must have an SFTP server, found: {reason}.",
            hint="install openssh-sftp-server on the board",
        )

    @contextmanager
    def _asked(self) -> Iterator[None]:
        """Tell a refusal of the server, which is an answer, from a link that is lost."""
        try:
            yield
        except TimeoutError as error:
            raise TransferError(
                f"{self._address} must go on with the copy, found no answer for {_STALL_S:g} s.", hint="run it again"
            ) from error
        except (paramiko.SSHException, EOFError, OSError) as error:
            if self._connection.alive and isinstance(error, OSError):
                raise Refused(error.strerror or one_line(error)) from error
            with self._connection.translated():
                raise

    def _make_folder(self, sftp: Any, folder: str) -> None:
        missing = []
        while folder and self._size(sftp, folder) is None:
            missing.append(folder)
            folder = posixpath.dirname(folder)
        for name in reversed(missing):
            try:
                with self._asked():
                    sftp.mkdir(name)
            except Refused:
                # Somebody else may have made it meanwhile.
                if self._size(sftp, name) is None:
                    raise

    def _resume_at(self, sftp: Any, local: Path, partial: str, size: int) -> int | None:
        """Bytes of an earlier try that can be kept: all that it left, if they are how the file begins; None without a file.

        Another host may be writing to it right now: what it adds beyond these bytes does no harm.
        """
        left = self._size(sftp, partial)
        if left is None:
            return None
        if left <= size and (left == 0 or self._remote_hash(partial, left) in (sha256_of(local, left), None)):
            return left
        self._remove(sftp, partial)
        return None

    def _size(self, sftp: Any, path: str) -> int | None:
        """Bytes of a file of the board; None where there is none."""
        try:
            with self._asked():
                size: int = sftp.stat(path).st_size
        except Refused as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return None
            raise
        return size

    def _need_space(self, sftp: Any, partial: str, folder: str, needed: int) -> None:
        free = self._free_bytes(folder)
        if free is not None and free < needed:
            self._remove(sftp, partial)
            raise self._full(folder, needed, free)

    def _full(self, folder: str, needed: int, free: int) -> BoardFullError:
        return BoardFullError(
            f"{folder or 'the home folder'} on {self._address} must have {needed} bytes free, found {free}.",
            hint="free some space on the board",
        )

    def _free_bytes(self, folder: str) -> int | None:
        result = self._run(["sh", "-c", 'df -Pk -- "$1" || df -Pk "$1"', "sh", folder], 30.0, b"")
        # Used, available, capacity; names before and after them may hold spaces.
        found = re.findall(r"\s(\d+)\s+(-?\d+)\s+(?:\d+%|-)\s", result.stdout.decode("utf-8", "replace"))
        return int(found[-1][1]) * 1024 if found else None

    def _open_partial(self, sftp: Any, partial: str, left: int | None) -> Any:
        """Open for writing what is there, and keep it; or make it, but never empty what another host has just made."""
        try:
            with self._asked():
                return sftp.open(partial, "wbx" if left is None else "r+b")
        except Refused as error:
            # SFTP has no status of its own for a file that exists.
            if left is None and self._size(sftp, partial) is not None:
                raise Gone from error
            raise

    def _send(
        self, sftp: Any, local: Path, partial: str, left: int | None, size: int, progress: Progress | None
    ) -> None:
        """Write the rest of the file, so many blocks under way at a time.

        paramiko's own pipelined writes are not used: they drop the errors of the last blocks.
        """
        start = left or 0
        file = self._open_partial(sftp, partial, left)
        sent: deque[tuple[int, int]] = deque()
        done = start
        try:
            if progress is not None:
                progress(done, size)
            with local.open("rb") as reader:
                reader.seek(start)
                position = start
                while sent or position < size:
                    block = reader.read(_BLOCK_BYTES) if position < size and len(sent) < _IN_FLIGHT else b""
                    if block:
                        with self._asked():
                            number = sftp._async_request(type(None), CMD_WRITE, file.handle, int64(position), block)
                        position += len(block)
                        sent.append((number, position))
                        continue
                    if not sent:
                        raise Refused(f"the file has become shorter, {position} of {size} bytes")
                    number, end = sent.popleft()
                    with self._asked():
                        sftp._read_response(number)
                    done = end
                    if progress is not None:
                        progress(done, size)
        except ConnectError as error:
            raise self._lost(done, size, local.name) from error
        finally:
            # A link that is gone takes the handle with it.
            with suppress(RemoteError, Refused), self._asked():
                file.close()

    def _lost(self, done: int, size: int, name: str) -> ConnectError:
        return ConnectError(
            f"the link to {self._address} must stay up, it was lost after {done} of {size} bytes of {name}"
            f" ({self._connection.lost or 'the connection was closed'}).",
            hint="run it again: the copy goes on where it stopped",
        )

    def _receive(self, sftp: Any, remote: str, writer: IO[bytes]) -> None:
        """Read a file, so many blocks under way at a time.

        paramiko's own read-ahead is not used: it asks in a thread, which prints a traceback when the link is lost.
        """
        with self._asked():
            file = sftp.open(remote, "rb")
            size: int = file.stat().st_size
        asked: deque[int] = deque()
        position = 0
        try:
            while asked or position < size:
                if position < size and len(asked) < _IN_FLIGHT:
                    with self._asked():
                        length = min(_BLOCK_BYTES, size - position)
                        number = sftp._async_request(type(None), CMD_READ, file.handle, int64(position), length)
                    position += length
                    asked.append(number)
                    continue
                expected = min(_BLOCK_BYTES, size - writer.tell())
                with self._asked():
                    block = _block(sftp, asked.popleft())
                writer.write(block)
                if len(block) < expected:
                    # Servers may send less than was asked for, though those of files seldom do: the rest one by one.
                    while asked:
                        with self._asked():
                            _block(sftp, asked.popleft())
                    break
            # What has been added since, and files such as those in /proc that say they are empty.
            file.seek(writer.tell())
            while True:
                with self._asked():
                    block = file.read(_BLOCK_BYTES)
                if not block:
                    return
                writer.write(block)
        finally:
            with suppress(RemoteError, Refused), self._asked():
                file.close()

    def _remote_hash(self, path: str, size: int) -> str | None:
        """Hash of the first `size` bytes of a file of the board; None where there is no file."""
        result = self._run(["sh", "-c", _HASH, "sh", path, str(size)], 60.0 + size / _HASH_BYTES_PER_S, b"")
        if result.stdout.strip() == b"absent":
            return None
        found = re.match(rb"\\?([0-9a-f]{64})\b", result.stdout)
        if found is None:
            text = " ".join(result.stderr.decode("utf-8", "replace").split()) or f"exit code {result.returncode}"
            raise TransferError(
                f"{self._address} must be able to hash {path}, found: {text}.",
                hint="install coreutils or python3 there",
            )
        return found[1].decode()

    def _rename(self, sftp: Any, partial: str, remote: str) -> None:
        with self._asked():
            try:
                sftp.posix_rename(partial, remote)
            except OSError as error:
                if "unsupported" not in str(error).lower():
                    raise
                # Plain SFTP renames never replace a file; rename(2) of mv does.
                self._move(partial, remote)

    def _move(self, partial: str, remote: str) -> None:
        moved = self._run(["sh", "-c", _MOVE, "sh", partial, remote], 30.0, b"")
        if moved.returncode == _TAKEN_AWAY:
            raise Gone
        if moved.returncode:
            raise Refused(self._complaint(moved))

    def _complaint(self, result: CommandResult) -> str:
        text = " ".join(result.stderr.decode("utf-8", "replace").split()).rstrip(".")
        return text or f"exit code {result.returncode}"

    def _remove(self, sftp: Any, path: str) -> None:
        with suppress(Refused), self._asked():
            sftp.remove(path)


def home_relative(remote: str) -> str:
    """A path as SFTP and commands both read it: they start in the home folder, and neither expands ``~``."""
    return remote[2:].lstrip("/") if remote.startswith("~/") else remote


def _block(sftp: Any, number: int) -> bytes:
    try:
        kind, message = sftp._read_response(number)
    except EOFError:
        # The status "end of file" of this block; a lost link is an SSHException here.
        return b""
    if kind != CMD_DATA:
        raise paramiko.SFTPError(f"an answer of type {kind}")
    content: bytes = message.get_string()
    return content


def _local_hash(local: Path) -> tuple[int, str]:
    try:
        size = local.stat().st_size
        return size, sha256_of(local, size)
    except OSError as error:
        raise TransferError(f"{local} must be a file that can be read, found: {error.strerror}.") from error
