"""Copying files through the board's shell, for servers without SFTP: dropbear brings none, and small boards install none.

Resumed, checked and renamed as over SFTP; only how bytes get there differs. They go in blocks, each with a command of its own, so
that a link that is lost costs one block, and a copy that stands still is noticed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from edgeprune.boards.ssh_files import FileCopier, Gone, Refused
from edgeprune.boards.transport import CommandResult, Progress
from edgeprune.errors import ConnectError, RemoteTimeoutError, TransferError

_BLOCK_BYTES = 1 << 20
_STALL_S = 120.0  # for one block
_SHORT_S = 30.0
_ABSENT = 44
"""Exit code of the scripts for a file that is not there."""

_MAKE_FOLDER = 'mkdir -p -- "$1"'
_SIZE = '[ -e "$1" ] || exit 44; [ -f "$1" ] || { echo 0; exit; }; wc -c < "$1"'
_REMOVE = 'rm -f -- "$1"'
# dd moves the position that cat and head then start from: it shares it with them. <> neither empties the file nor appends.
# What was there before must still be there: a file that another host has renamed is not begun anew in its middle.
_WRITE = (
    '[ "$2" = 0 ] || [ -f "$1" ] || exit 44; { dd bs=1 seek="$2" count=0 < /dev/null 2> /dev/null && cat; } 1<> "$1"'
)
_READ = '{ dd bs=1 skip="$2" count=0 > /dev/null 2>&1 && head -c "$3"; } < "$1"'


class ShellCopier(FileCopier):
    """Copies files over one link with a POSIX shell, ``cat``, ``dd``, ``head``, ``wc``, ``mkdir``, ``mv`` and ``rm``."""

    @contextmanager
    def _sftp(self) -> Iterator[Any]:
        yield None

    def _make_folder(self, sftp: Any, folder: str) -> None:
        if folder:
            self._require(self._ask(["sh", "-c", _MAKE_FOLDER, "sh", folder]))

    def _size(self, sftp: Any, path: str) -> int | None:
        result = self._ask(["sh", "-c", _SIZE, "sh", path])
        if result.returncode == _ABSENT:
            return None
        self._require(result)
        return int(result.stdout)

    def _remove(self, sftp: Any, path: str) -> None:
        with suppress(Refused):
            self._require(self._ask(["sh", "-c", _REMOVE, "sh", path]))

    def _rename(self, sftp: Any, partial: str, remote: str) -> None:
        self._move(partial, remote)

    def _send(
        self, sftp: Any, local: Path, partial: str, left: int | None, size: int, progress: Progress | None
    ) -> None:
        done = left or 0
        if progress is not None:
            progress(done, size)
        with local.open("rb") as reader:
            reader.seek(done)
            # An empty file is made by writing nothing to it.
            while done < size or left is None:
                block = reader.read(min(_BLOCK_BYTES, size - done))
                if not block and done < size:
                    raise Refused(f"the file has become shorter, {done} of {size} bytes")
                try:
                    result = self._ask(["sh", "-c", _WRITE, "sh", partial, str(done)], block, _STALL_S)
                except ConnectError as error:
                    raise self._lost(done, size, local.name) from error
                if result.returncode == _ABSENT:
                    raise Gone
                self._require(result)
                left = done = done + len(block)
                if progress is not None:
                    progress(done, size)

    def _receive(self, sftp: Any, remote: str, writer: IO[bytes]) -> None:
        while True:
            words = ["sh", "-c", _READ, "sh", remote, str(writer.tell()), str(_BLOCK_BYTES)]
            result = self._ask(words, limit_s=_STALL_S)
            self._require(result)
            if not result.stdout:
                return
            writer.write(result.stdout)

    def _ask(self, argv: Sequence[str], stdin: bytes = b"", limit_s: float = _SHORT_S) -> CommandResult:
        try:
            return self._run(argv, limit_s, stdin)
        except RemoteTimeoutError as error:
            raise TransferError(
                f"{self._address} must go on with the copy, found no answer for {limit_s:g} s.", hint="run it again"
            ) from error

    def _require(self, result: CommandResult) -> None:
        if result.returncode:
            raise Refused(self._complaint(result))
