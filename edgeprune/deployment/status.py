"""Which release a board runs, also while it is away; and the way back to the one before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from edgeprune.boards.board import Board
from edgeprune.deployment import faults, state
from edgeprune.errors import DeployError, RemoteError

_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Release:
    """One release on a board.

    Attributes:
        folder: Its folder below ``releases/`` there.
        name: What a person calls the model.
        created: When its artifact was compiled, UTC.
        size_bytes: Size of its files.
        state: ``"current"``, ``"previous"`` (what `rollback` would put back), ``"former"`` (it ran before), ``"rolled back"``,
            ``"refused"`` (it did not pass a check), or ``"incomplete"`` (its deployment ended before it was switched to);
            empty where this machine remembers what an older version asked for.
        tasks: Where it has several tasks: by task what parity found on the board when the release was confirmed.
        precision: Arithmetic of its engine.
        backend: What runs it.
        predicted: Its manifest's, see `edgeprune.deployment.manifest.PredictedCost`.
        measured: Its manifest's, see `edgeprune.deployment.manifest.MeasuredCost`.
        checked: What was found on this board when it was confirmed: ``measured_ms``, ``ratio``, ``threads``, ``percentile``,
            ``budget``.
    """

    folder: str
    name: str
    created: str
    size_bytes: int
    state: str = ""
    tasks: Mapping[str, str] = field(default_factory=dict)
    precision: str = ""
    backend: str = ""
    predicted: Mapping[str, Any] = field(default_factory=dict)
    measured: Mapping[str, Any] = field(default_factory=dict)
    checked: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.folder} ({self.name})" if self.name else self.folder


@dataclass(frozen=True)
class BoardStatus:
    """What a board holds.

    Attributes:
        board: Its name.
        online: Whether the board itself answered; if not, this is the last known state.
        age_s: Age of that state, seconds; 0 when online.
        current: The release that runs, or None.
        previous: The release that `rollback` would put back, or None.
        confirmed: Whether the current release passed its health check.
        releases: All that are kept there.
        error: Why the board did not answer.
        window: How the trial of the current release goes, where it is on one: ``release``, ``guarded``, ``left_s`` (until the
            board reverts it; None where nobody guards it any more), ``seconds``, ``steady``, ``checks``, ``last``, ``complaint``.
    """

    board: str
    online: bool
    age_s: float
    current: Release | None
    previous: Release | None
    confirmed: bool
    releases: tuple[Release, ...]
    error: str | None = None
    window: Mapping[str, Any] | None = None

    @classmethod
    def from_result(
        cls, board: str, result: Mapping[str, Any], *, age_s: float = 0.0, error: str | None = None
    ) -> BoardStatus:
        """Read the result of the runner's verb ``status``."""
        releases = tuple(
            Release(
                entry["folder"],
                entry["name"],
                entry["created"],
                entry["size_bytes"],
                entry.get("state", ""),
                entry.get("tasks", {}),
                entry.get("precision", ""),
                entry.get("backend", ""),
                entry.get("predicted", {}),
                entry.get("measured", {}),
                entry.get("checked", {}),
            )
            for entry in result["releases"]
        )
        by_folder = {release.folder: release for release in releases}
        return cls(
            board=board,
            online=error is None,
            age_s=age_s,
            current=by_folder.get(result["current"]),
            previous=by_folder.get(result["previous"]),
            confirmed=result["confirmed"],
            releases=releases,
            error=error,
            window=result.get("window"),
        )

    def still_runs(self) -> str:
        """A sentence for errors."""
        return f"Board {self.board} still runs {self.current or 'no release'}."


def status(board: str | Board = "local") -> BoardStatus:
    """Say what a board runs. While it cannot be reached, its last state that this machine knew, with its age.

    Args:
        board: As in `Board.open`.

    Raises:
        RemoteError: It cannot be reached, and this machine has never seen it.
    """
    name = board if isinstance(board, str) else board.name
    try:
        with Board.open(board) as opened:
            return read_status(opened, known_as=name)
    except RemoteError as error:
        known = state.recall(name)
        if known is None:
            raise
        result, age_s = known
        return BoardStatus.from_result(name, result, age_s=age_s, error=str(error))


def rollback(board: str | Board = "local") -> BoardStatus:
    """Put the previous release back: one rename, no upload. The files of what is put back are rehashed first.

    Args:
        board: As in `Board.open`.

    Returns:
        What the board runs then.

    Raises:
        DeployError: There is no earlier release.
        InconsistentBoardError: The earlier release is damaged; nothing was changed.
        BoardBusyError: Another run holds the board.
    """
    name = board if isinstance(board, str) else board.name
    with Board.open(board) as opened:
        seen = read_status(opened, known_as=name)
        with opened.hold("rollback"):
            before = read_status(opened, known_as=name)
            if seen.window is not None and before.current != seen.current:
                # What was to go was on a trial whose host is gone: taking the board has put the former release back.
                return before
            return _back(opened, before, name)


def _back(opened: Board, before: BoardStatus, name: str) -> BoardStatus:
    if before.current is None:
        raise DeployError(f"board {name} must run a release to roll back, found none.", hint="edgeprune deploy")
    request = {"from": before.current.folder, "reason": "asked for", **faults.request_fields()}
    opened.call("rollback", request, timeout_s=_TIMEOUT_S)
    return read_status(opened, known_as=name)


def read_status(board: Board, *, known_as: str | None = None) -> BoardStatus:
    """Ask an open board, and remember the answer on this machine."""
    return remember_status(board, board.call("status", {}, timeout_s=_TIMEOUT_S), known_as=known_as)


def remember_status(board: Board, result: Mapping[str, Any], *, known_as: str | None = None) -> BoardStatus:
    """Keep what a board answered on this machine, by its name and by what the user calls it."""
    for name in {board.name, known_as or board.name}:
        state.remember(name, result)
    return BoardStatus.from_result(board.name, result)
