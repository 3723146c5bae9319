"""Having the board to oneself, with patience."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from edgeprune.boards.board import Board
from edgeprune.errors import BoardBusyError

PATIENCE_S = 900.0
"""How long a board that another run has is waited for, seconds."""


@contextmanager
def held(board: Board, said: Callable[[str], None]) -> Iterator[None]:
    """The board to oneself; where another run has it, it is waited for, because minutes of work are behind us.

    Args:
        board: An open one.
        said: Told once that it is waited for, and for whom.

    Raises:
        BoardBusyError: It was not free in time.
    """
    until = time.monotonic() + PATIENCE_S
    told = False
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(board.hold("quickstart"))
                break
            except BoardBusyError as error:
                if time.monotonic() > until:
                    raise
                if not told:
                    said(f"waiting for up to {PATIENCE_S / 60:.0f} minutes: {error.message}")
                told = True
                time.sleep(1.0)
        yield
