"""Having a board to oneself, or its clocks: what belongs to a live process on the board, and goes with it or with the link."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

from edgeprune.boards.runner_events import crash, error_of, parse_event
from edgeprune.boards.transport import Process
from edgeprune.errors import ConnectError, RemoteError, RemoteTimeoutError

_SETTLING_S = 600.0
"""Putting the former release back rehashes it and runs the user's reload command, before the lock is told to be held."""

logger = logging.getLogger("edgeprune.boards.board")


class Hold:
    """The lock of one board, or of its clocks, as this process has it.

    Args:
        board: Name of the board.
        start: Starts the process on the board that takes the lock, given what it is for.
        what: What is held, for sentences.
        patience_s: How long the board may take to lock, seconds.

    Attributes:
        held: Whether the lock was taken and not given back yet.
        taken: The event that told so.
        released: What the process on the board said at its end; empty where it could say nothing.
    """

    def __init__(
        self, board: str, start: Callable[[str], Process], what: str = "lock", patience_s: float = 30.0
    ) -> None:
        self._board, self._start, self._what, self._patience_s = board, start, what, patience_s
        self.taken: dict[str, Any] = {}
        self.released: dict[str, Any] = {}
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
        if not self.held or (self._process is not None and _alive(self._process)):
            return
        if self._process is not None:  # told once, not with each try while the board is away
            logger.warning("the %s of board %s was lost on the way; it is taken again.", self._what, self._board)
        self._let_go()
        self._process = self._locked(self._purpose)

    def require(self) -> None:
        """Discard what was timed while somebody else may have had the board.

        Raises:
            ConnectError: The lock was lost.
        """
        if self.held and (self._process is None or not _alive(self._process)):
            raise ConnectError(
                f"board {self._board} must be held as long as it measures, its {self._what} was lost on the way.",
                hint="run it again",
            )

    def _locked(self, purpose: str) -> Process:
        process, patience_s = self._start(purpose), self._patience_s
        try:
            while (line := process.readline(patience_s)) is not None:
                event = parse_event(line)
                if event is not None and event["event"] == "settling":
                    patience_s = _SETTLING_S
                if event is not None and event["event"] == "held":
                    self.taken = event
                    return process
                if event is not None and event["event"] == "leftover":
                    done = "were restored" if event["restored"] else "could not be restored"
                    logger.warning("clocks that a killed run left locked on board %s %s.", self._board, done)
                if event is not None and event["event"] == "settled":
                    logger.warning(
                        "release %s on board %s was never confirmed by the run that had switched to it; the board runs %s.",
                        event["release"],
                        self._board,
                        event["current"] or "no release",
                    )
                if event is not None and event["event"] == "error":
                    raise error_of(event)
            raise crash(self._what, process.close())
        except BaseException:
            process.close()
            raise

    def _let_go(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            self.released = {}
            try:
                ended = process.close()
            except RemoteError as error:
                # The link is gone, and the lock with it.
                logger.debug("%s: releasing the %s: %s", self._board, self._what, error)
            else:
                for line in ended.stdout.decode("utf-8", "replace").splitlines():
                    event = parse_event(line)
                    if event is not None and event["event"] == "result":
                        self.released = event["result"]


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
