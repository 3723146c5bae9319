"""Files that appear whole or not at all, and what identifies their content."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path

_BLOCK_BYTES = 1 << 20


@contextlib.contextmanager
def replacing(path: Path, *, mode: int = 0o666) -> Iterator[Path]:
    """A file to write, next to `path`, that takes its place when the block ends well and vanishes when it does not.

    The file and its folder are synced, so that after a power loss `path` is the old file or the new one. A symbolic link
    at `path` stays one.

    Args:
        path: File to create or to replace; its folder must exist.
        mode: Permissions, less the process's umask.
    """
    path = path.resolve()
    partial = path.with_name(f".{path.name}.{secrets.token_hex(6)}.partial")
    # Created here, not by the block: whatever ends the block, there is a file of this name, and it is ours.
    partial.touch(mode, exist_ok=False)
    try:
        yield partial
        _sync(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    # Some network file systems refuse to sync folders; the file itself is safe by now.
    with contextlib.suppress(OSError):
        _sync(path.parent)


def write_text(path: Path, text: str, *, mode: int = 0o666) -> None:
    """Write a UTF-8 text file whole or not at all."""
    with replacing(path, mode=mode) as partial:
        partial.write_text(text, encoding="utf-8")


def sha256_of(path: Path, size: int | None = None) -> str:
    """SHA-256 of a file, or of its first `size` bytes; read in pieces, so that a large file needs no memory.

    Raises:
        OSError: The file cannot be read.
    """
    digest = hashlib.sha256()
    left = sys.maxsize if size is None else size
    with path.open("rb") as reader:
        while left > 0 and (block := reader.read(min(left, _BLOCK_BYTES))):
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
