"""Where the journals of a run lie: beside its table, or, where that was given no place, in this machine's state for a day."""

from __future__ import annotations

import contextlib
import logging
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.boards import state_folder
from edgeprune.profiling.journal import request_hash

if TYPE_CHECKING:
    from edgeprune.boards.board import Board

FORGOTTEN_S = 24 * 3600.0
"""What an interrupted run left in the state is not gone on with later than this: nobody remembers it."""

logger = logging.getLogger("edgeprune.profiling")


@contextlib.contextmanager
def journals(out: Path | None, board: Board, request: Mapping[str, Any]) -> Iterator[Path | None]:
    """The path beside which the journals of a run lie as long as the block lasts.

    In the state they are removed when the block ends well; an interrupted run leaves them, for the same one to go on from.

    Args:
        out: Where the table is saved, or None.
        board: Where it is measured; another one, or another folder on it, is another run.
        request: What two runs must have in common for one to go on from the other.

    Yields:
        `out` where there is one; None where the state cannot be written.
    """
    if out is not None:
        yield out
        return
    folder = _in_state(board, request)
    if folder is None:
        yield None
        return
    if any(folder.iterdir()):
        logger.info("a run that was interrupted is gone on with, from %s", folder)
    yield folder / "table.parquet"
    shutil.rmtree(folder, ignore_errors=True)


def _in_state(board: Board, request: Mapping[str, Any]) -> Path | None:
    """A folder for the journals of one run; None where none can be made."""
    runs = state_folder.folder() / "profiles"
    folder = runs / request_hash({"request": request, "place": [board.transport.address, board.root]})[:16]
    try:
        _forget(runs)
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        logger.debug("a run that is interrupted begins anew, %s cannot be written: %s", folder, error)
        return None
    return folder


def _forget(runs: Path) -> None:
    """Remove what was left too long ago."""
    for folder in runs.iterdir() if runs.is_dir() else ():
        with contextlib.suppress(OSError):  # another run may end just now
            written = [path.stat().st_mtime for path in (folder, *folder.iterdir())]
            if time.time() - max(written) > FORGOTTEN_S:
                shutil.rmtree(folder, ignore_errors=True)
