"""Having a board to oneself: a lock that belongs to a live process on the board, and goes with it or with the link."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator

from edgeprune.boards.runner_events import crash, error_of, parse_event
from edgeprune.boards.transport import Process
from edgeprune.errors import ConnectError, RemoteError, RemoteTimeoutError

logger = logging.getLogger("edgeprune.boards.board")


class Hold:
    """The lock of one board, as this process has it.

    Args:
        board: Name of the board.
        start: Starts the process on the board that takes the lock, given what it is for.

    Attributes:
        held: Whether the lock was taken and not given back yet.
    """

    def __init__(self, board: str, start: Callable[[str], Process]) -> None:
        self._board, self._start = board, start
        self._times = 0
        self._process: Process | None = None
        self._purpose = ""

    @property
    def held(self) -> bool:
        return self._times > 0

    @contextlib.contextmanager
    def take(self, purpose: str) -> Iterator[None]:
        """Hold it for as long as the block lasts; a second time inside the first changes nothing.

        Raises:
            BoardBusyError: Another run holds it.
        """
        if self._times == 0:
            self._process, self._purpose = self._locked(purpose), purpose
        self._times += 1
        try:
            yield
        finally:
            self._times -= 1
            if self._times == 0:
                self._let_go()

    def renew(self) -> None:
        """See that the lock is still held; take it again where it went with a lost link.

        Raises:
            BoardBusyError: Somebody else has it by now.
        """
        if self._process is None or _alive(self._process):
            return
        logger.warning("the lock of board %s was lost on the way; it is taken again.", self._board)
        self._let_go()
        self._process = self._locked(self._purpose)

    def require(self) -> None:
        """Discard what was timed while somebody else may have had the board.

        Raises:
            ConnectError: The lock was lost.
        """
        if self._process is not None and not _alive(self._process):
            raise ConnectError(
                f"board {self._board} must be held as long as it measures, its lock was lost on the way.",
                hint="run it again",
            )

    def _locked(self, purpose: str) -> Process:
        process = self._start(purpose)
        try:
            while (line := process.readline(30.0)) is not None:
                event = parse_event(line)
                if event is not None and event["event"] == "held":
                    return process
                if event is not None and event["event"] == "error":
                    raise error_of(event)
            raise crash("lock", process.close())
        except BaseException:
            process.close()
            raise

    def _let_go(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            try:
                process.close()
            except RemoteError as error:
                # The link is gone, and the lock with it.
                logger.debug("%s: releasing the lock: %s", self._board, error)


def _alive(process: Process) -> bool:
    """Whether the lock's process lives, as far as this end has heard."""
    try:
        while process.readline(0.001) is not None:
            pass
    except RemoteTimeoutError:
        # Nothing new to read, and no end.
        return True
    except RemoteError as error:
        logger.debug("the lock's process: %s", error)
    return False
