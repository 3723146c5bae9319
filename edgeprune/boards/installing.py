"""The command that brings a runtime onto a board, for hints of code that does not know what the user calls the board."""

from __future__ import annotations

import re
import shlex

SETUP = "edgeprune device setup BOARD"


def for_board(hint: str | None, board: str) -> str:
    """A hint with the board's name in place of ``BOARD``.

    Args:
        hint: A command, or None.
        board: What the user calls the board.
    """
    return re.sub(r"\bBOARD\b", lambda _: shlex.quote(board), hint or "")
