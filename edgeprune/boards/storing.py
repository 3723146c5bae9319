"""Files into a board's store, each under its hash: what is there already is not sent again."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from edgeprune.errors import BoardFullError, TransferError
from edgeprune.files import sha256_of

if TYPE_CHECKING:
    from edgeprune.boards.board import Board
    from edgeprune.boards.transport import Progress

_RESERVE_BYTES = 1 << 20


def stored(board: Board, content: Path | bytes, *, progress: Progress | None = None) -> str:
    """Bring a file into a board's store, ``<root>/store/<sha256>``.

    Args:
        board: Which.
        content: The file, or what is in it.
        progress: Called with (bytes there, bytes in all).

    Returns:
        Its sha256.

    Raises:
        BoardFullError: It does not fit; nothing was sent.
        TransferError: What arrived is not what was sent.
    """
    if isinstance(content, bytes):
        with temporary(content) as path:
            return stored(board, path, progress=progress)
    size = content.stat().st_size
    sha256 = sha256_of(content)
    state = board.call("store", {"action": "missing", "blobs": {sha256: size}})
    if not state["missing"]:
        if progress is not None:
            progress(size, size)
        return sha256
    needed = size - state["incoming_bytes"] + _RESERVE_BYTES
    if state["free_bytes"] < needed:
        raise BoardFullError(
            f"board {board.name} must have {needed / 1e6:.1f} MB free under {board.root} to take {size / 1e6:.1f} MB, "
            f"found {state['free_bytes'] / 1e6:.1f} MB.",
            hint="free some space there, or give the board another root folder",
        )
    try:
        board.transport.put(content, f"{board.root}/incoming/{sha256}", progress=progress)
    except TransferError:
        # Another host that pushed the same file may have been faster, and moved it on into the store.
        if board.call("store", {"action": "missing", "blobs": {sha256: size}})["missing"]:
            raise
        return sha256
    # Hashing is at least 20 MB/s on the slowest board that counts.
    board.call("store", {"action": "adopt", "blobs": [sha256]}, timeout_s=60.0 + size / 20e6)
    return sha256


@contextlib.contextmanager
def temporary(content: bytes) -> Iterator[Path]:
    """A file with this content for as long as the block lasts."""
    with tempfile.TemporaryDirectory(prefix="edgeprune-") as folder:
        path = Path(folder) / "content"
        path.write_bytes(content)
        yield path
