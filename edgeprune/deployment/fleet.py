"""One artifact to many boards: first to canaries, then to all others at once, and no further once too many have failed.

Each board is deployed to as if it were alone, with all its gates and its own dead man's handle; nothing here decides about a
board. A board that is away or busy is *pending*, not failed. Called again, boards that run the release already are skipped.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

from edgeprune.boards.board import Board
from edgeprune.deployment.artifact import Artifact
from edgeprune.deployment.deploying import STATES, deploy
from edgeprune.deployment.result import Deployment
from edgeprune.deployment.status import BoardStatus, read_status
from edgeprune.errors import (
    BoardBusyError,
    ConfigError,
    ConnectError,
    EdgepruneError,
    HealthError,
    InconsistentBoardError,
    RemoteTimeoutError,
    UncertainBoardError,
)

DONE = ("deployed", "ran already")
"""States of a board that runs the release."""

Told = Callable[[str, str, int, int, str], None]
"""Called from any thread with (board, state, done, total, what happens); see `edgeprune.deployment.deploying.Progress`."""

_AWAY = (ConnectError, RemoteTimeoutError, BoardBusyError)
_POLL_S = 0.2


class StoppedError(EdgepruneError):
    """A deployment was ended before the switch, because the fleet's was."""


@dataclass(frozen=True)
class Outcome:
    """What became of one board.

    Attributes:
        board: As the user calls it.
        state: ``"deployed"``, ``"ran already"``, ``"pending"`` (away or busy: it runs what it ran), ``"failed"`` (a gate or a
            requirement: it runs what it ran), ``"uncertain"`` (the link was lost as it switched: if it has, it goes back by
            itself), ``"rolled back"``, ``"inconsistent"``, or ``"not tried"``.
        message: What must have held and what was found, where it does not run the release.
        hint: The next step.
        error: Name of the error's class.
        exit_code: What `edgeprune deploy` of this board alone would have ended with.
        seconds: How long it took.
        deployment: Of a board that was deployed to.
    """

    board: str
    state: str
    message: str | None = None
    hint: str | None = None
    error: str | None = None
    exit_code: int = 0
    seconds: float = 0.0
    deployment: Deployment | None = None

    @property
    def failure(self) -> bool:
        """Whether it counts against the failures that are allowed."""
        return self.state in ("failed", "uncertain", "rolled back", "inconsistent")


@dataclass(frozen=True)
class FleetReport:
    """What became of all boards.

    Attributes:
        artifact: The artifact's id.
        release: Name of its release on the boards.
        outcomes: One per board, in the order that was asked for.
        stopped: Why it went no further, or None.
    """

    artifact: str
    release: str
    outcomes: tuple[Outcome, ...]
    stopped: str | None = None

    @property
    def exit_code(self) -> int:
        """0 when every board runs the release, else the gravest of the boards' own."""
        return max((outcome.exit_code for outcome in self.outcomes), default=0)


def deploy_to(
    artifact: Artifact,
    boards: Sequence[str],
    *,
    canary: int = 1,
    max_failures: int = 1,
    at_once: int = 8,
    progress: Told | None = None,
    on_outcome: Callable[[Outcome], None] | None = None,
    **options: Any,
) -> FleetReport:
    """Deploy to many boards.

    Args:
        artifact: The artifact.
        boards: As in `Board.open`; in this order, each once.
        canary: Boards that must run the release before any other is tried. A board that is away is no canary: the next takes
            its place. A canary that fails ends it all.
        max_failures: So many failed boards end it; boards that are being deployed to then end before their switch, or are seen
            to its end.
        at_once: Boards that are deployed to at the same time.
        progress: Told every state of every board.
        on_outcome: Called with each board's outcome as it is known, one at a time.
        options: Of `edgeprune.deployment.deploying.deploy`.

    Raises:
        ConfigError: There are no boards, one is named twice, or a number is below 1.
        KeyboardInterrupt: As Ctrl-C raised it, once every board is at rest.
    """
    _check(boards, canary=canary, max_failures=max_failures, at_once=at_once)
    run = _Fleet(artifact, list(boards), progress, on_outcome, options)
    with ThreadPoolExecutor(max_workers=at_once, thread_name_prefix="edgeprune-deploy") as pool:
        run.canaries(pool, canary, at_once)
        if run.stopped is None:
            run.others(pool, max_failures)
    for board in boards:
        if board not in run.outcomes:
            run.add(Outcome(board, "not tried", message=run.stopped))
    return FleetReport(artifact.id, artifact.release, tuple(run.outcomes[board] for board in boards), run.stopped)


class _Fleet:
    """The run over all boards; `outcomes` is only touched by the thread that called."""

    def __init__(
        self,
        artifact: Artifact,
        boards: list[str],
        progress: Told | None,
        on_outcome: Callable[[Outcome], None] | None,
        options: dict[str, Any],
    ) -> None:
        self.artifact, self.waiting, self.options = artifact, boards, options
        self.outcomes: dict[str, Outcome] = {}
        self.stopped: str | None = None
        self._tell: Told = progress or (lambda board, state, done, total, message: None)
        self._on_outcome = on_outcome or (lambda outcome: None)
        self._halt = threading.Event()

    def canaries(self, pool: ThreadPoolExecutor, wanted: int, at_once: int) -> None:
        """Deploy to the first boards that answer, until so many run the release."""
        good = 0
        while self.waiting and good < wanted and self.stopped is None:
            count = min(wanted - good, at_once)
            now, self.waiting = self.waiting[:count], self.waiting[count:]
            self._run(pool, now, max_failures=1)
            good += sum(self.outcomes[board].state in DONE for board in now if board in self.outcomes)
        if self.stopped is not None:
            self.stopped = self.stopped.replace("board", "canary board", 1)

    def others(self, pool: ThreadPoolExecutor, max_failures: int) -> None:
        """Deploy to all boards that are left."""
        now, self.waiting = self.waiting, []
        self._run(pool, now, max_failures=max_failures)

    def add(self, outcome: Outcome) -> None:
        """Keep a board's outcome, and tell it."""
        self.outcomes[outcome.board] = outcome
        self._on_outcome(outcome)

    def _run(self, pool: ThreadPoolExecutor, boards: Iterable[str], *, max_failures: int) -> None:
        left = {pool.submit(self._one, board) for board in boards}
        broken: BaseException | None = None
        while left:
            try:
                for future in wait(left, timeout=_POLL_S, return_when=FIRST_COMPLETED).done:
                    left.remove(future)
                    self._collect(future, max_failures)
            except KeyboardInterrupt as interrupt:
                # Boards that are being switched are seen to their end, and all others are left as they are.
                broken, self.stopped = interrupt, "it was interrupted"
                self._halt.set()
            except Exception as error:  # noqa: BLE001 - raised again below
                # Whatever it was, of one board or in telling of it: what became of the others is told before it is raised.
                broken, self.stopped = broken or error, "it broke off"
                self._halt.set()
        if broken is not None:
            raise broken

    def _collect(self, future: Future[Outcome], max_failures: int) -> None:
        self.add(future.result())
        failed = [name for name, outcome in self.outcomes.items() if outcome.failure]
        if len(failed) >= max_failures and self.stopped is None:
            self.stopped = f"board{'s' * (len(failed) > 1)} {', '.join(failed)} failed"
            self._halt.set()

    def _one(self, board: str) -> Outcome:
        """Deploy to one board; in a thread of its own."""
        started = time.monotonic()

        def progress(state: str, done: int, total: int, message: str) -> None:
            if self._halt.is_set() and STATES.index(state) < STATES.index("activate"):
                raise StoppedError(f"the deployment to board {board} was ended before the switch.")
            self._tell(board, state, done, total, message)

        try:
            if self._halt.is_set():
                raise StoppedError(f"the deployment to board {board} was not begun.")
            progress("probe", 0, 0, "connecting")
            with Board.open(board) as opened:
                if _runs(read_status(opened, known_as=board), self.artifact):
                    return Outcome(board, "ran already", seconds=time.monotonic() - started)
                done = deploy(self.artifact, opened, progress=progress, **self.options)
                if board != opened.name:
                    read_status(opened, known_as=board)
        except StoppedError as stopped:
            return Outcome(board, "not tried", message=stopped.message, seconds=time.monotonic() - started)
        except EdgepruneError as error:
            return Outcome(
                board,
                _state(error),
                message=error.message,
                hint=error.hint,
                error=type(error).__name__,
                exit_code=error.exit_code,
                seconds=time.monotonic() - started,
            )
        except OSError as error:
            # E.g. of a file of this machine: one board's trouble must not hide what became of the others.
            message = f"the system refused: {error.strerror or error}."
            seconds = time.monotonic() - started
            return Outcome(board, "failed", message=message, error=type(error).__name__, exit_code=1, seconds=seconds)
        return Outcome(board, "deployed", deployment=done, seconds=time.monotonic() - started)


def _check(boards: Sequence[str], **numbers: int) -> None:
    if not boards:
        raise ConfigError("a fleet must have at least one board, found none.", hint="edgeprune device list")
    twice = sorted({board for board in boards if list(boards).count(board) > 1})
    if twice:
        raise ConfigError(f"each board of a fleet must be named once, found {twice[0]!r} twice.")
    for name, number in numbers.items():
        if number < 1:
            raise ConfigError(f"{name.replace('_', '-')} must be at least 1, found {number}.")


def _runs(found: BoardStatus, artifact: Artifact) -> bool:
    """Whether a board runs just this release, for good."""
    now = found.current
    return now is not None and now.folder[:16] == artifact.release and found.confirmed and found.window is None


def _state(error: EdgepruneError) -> str:
    if isinstance(error, InconsistentBoardError):
        return "inconsistent"
    if isinstance(error, HealthError):
        return "rolled back"
    if isinstance(error, UncertainBoardError):
        return "uncertain"
    return "pending" if isinstance(error, _AWAY) else "failed"
