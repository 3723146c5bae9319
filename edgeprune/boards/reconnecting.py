"""A board that drops off the network in the middle of a run: it is waited for, and the run goes on with what it has."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from edgeprune.errors import BoardBusyError, ConnectError

if TYPE_CHECKING:
    from edgeprune.boards.board import Board

WAIT_S = 300.0
"""How long a run waits for a board: it can start anew meanwhile."""

_FRUITLESS = 3
"""A link that is lost so often with nothing measured in between is not waited for again."""

_PAUSES_S = (1.0, 2.0, 4.0, 8.0, 15.0)
"""Between tries to reach the board; the last one again and again."""

logger = logging.getLogger("edgeprune.boards.reconnecting")


class Reconnector:
    """Waits for the board of one run whenever their link is lost.

    Args:
        board: Where the run measures.
        wait_s: For how long a lost board is waited for, seconds; 0 gives up at once.
    """

    def __init__(self, board: Board, wait_s: float) -> None:
        self.board, self.wait_s = board, wait_s
        self._measured, self._fruitless = -1, 0

    def wait(self, lost: ConnectError, measured: int, waiting: Callable[[float], None]) -> float:
        """Return once the board answers again, and is held again where it was.

        It may be busy at first: what it did for us when the link was lost holds it until it notices.

        Args:
            lost: The error that told so.
            measured: How many samples there are by now.
            waiting: Told before each try how many seconds are left.

        Returns:
            How long that took, seconds.

        Raises:
            ConnectError: `lost` itself: the board did not come back in time, or the link does not hold.
            BoardBusyError: It did come back, and another run has it.
            AuthError: It lets nobody in any more.
            HostKeyError: It shows another key.
        """
        self._fruitless = self._fruitless + 1 if measured == self._measured else 0
        self._measured = measured
        if not self.wait_s or self._fruitless == _FRUITLESS:
            raise lost
        last: ConnectError | BoardBusyError = lost
        logger.warning("the link to board %s is lost; waiting for it for up to %.0f s.", self.board.name, self.wait_s)
        begun, tries = time.monotonic(), 0
        while (left_s := self.wait_s - (time.monotonic() - begun)) > 0:
            waiting(left_s)
            time.sleep(min(_PAUSES_S[min(tries, len(_PAUSES_S) - 1)], left_s))
            tries += 1
            try:
                self.board.call("kept", {"forget": []})
            except (ConnectError, BoardBusyError) as error:
                logger.info("board %s is not back yet: %s", self.board.name, error.message)
                last = error
            else:
                return time.monotonic() - begun
        raise last if isinstance(last, BoardBusyError) else lost
