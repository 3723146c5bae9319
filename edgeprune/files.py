"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path


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


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
