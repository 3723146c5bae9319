"""The two checks that a staged release must pass on the board before it is activated: numbers, then milliseconds."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.deployment import agreement
from edgeprune.deployment.agreement import Parity
from edgeprune.deployment.artifact import Artifact
from edgeprune.errors import LatencyGateError, ParityError, UnstableMeasurementError

if TYPE_CHECKING:
    from edgeprune.boards.board import Board
    from edgeprune.budget import Budget

PARITY_TIMEOUT_S = 900.0

_NEW, _DENSE = "release", "dense"
_MORE_ROUNDS = 3

_log = logging.getLogger("edgeprune.deployment.gates")


@dataclass(frozen=True)
class Latency:
    """Latency of a release on the board, measured interleaved with the dense model where there is one.

    Attributes:
        measured_ms: Median of the release, milliseconds, as timed.
        dense_ms: Median of the dense engine in the same rounds; None without a reference.
        ratio: Release over dense; None without a reference.
        ratio_low: Lower end of its 95 % confidence interval.
        ratio_high: Upper end.
        latency_ms: What the budget is held against: ratio times the dense latency, or the median without a reference.
        low_ms: Lower end of its 95 % confidence interval.
        high_ms: Upper end.
        conditions: State of the board before and after.
        disturbance: Where rounds were disturbed, a clause on how many; else empty.
        level_ms: What the reference usually takes, milliseconds, for a further measurement; None where it is not known.
    """

    measured_ms: float
    dense_ms: float | None
    ratio: float | None
    ratio_low: float | None
    ratio_high: float | None
    latency_ms: float
    low_ms: float
    high_ms: float
    conditions: Mapping[str, Any]
    disturbance: str = ""
    level_ms: float | None = None


def check_parity(board: Board, artifact: Artifact, release: str, *, threads: int, cases: int | None = None) -> Parity:
    """Run a release on its golden inputs on the board.

    Args:
        board: The board.
        artifact: What the release is made of.
        release: Folder of the release, or ``"current"``.
        threads: Threads inside one operation.
        cases: Run only the first so many golden cases.
    """
    request = {"release": release, **agreement.request(artifact.manifest, threads=threads, cases=cases)}
    return Parity.from_result(board.call("parity", request, timeout_s=PARITY_TIMEOUT_S), artifact.manifest)


def require_parity(parity: Parity, artifact: Artifact, board: Board) -> None:
    """Refuse a release whose numbers are off.

    Raises:
        ParityError: Says how far off it is, and which tolerance would have passed.
    """
    if not parity.passed:
        exported = artifact.manifest.export_parity
        # The engine of a host that could run it was compared there; of any other it is known what it was made of.
        located = f"; exported to ONNX it was within {exported['relative']:.2g} on its host" if exported else ""
        raise ParityError(
            f"the engine of {artifact.manifest.name!r} on board {board.name} {parity.complaint()}{located}.",
            hint="edgeprune doctor; compile again with the pruned module that was checked",
        )


def measure_latency(
    board: Board,
    engine: Path,
    reference: Path | None,
    *,
    runtime: str,
    threads: int,
    dense_ms: float | None = None,
    rounds: int = 20,
    percentile: int = 50,
    level_ms: float | None = None,
    progress: Callable[[int, int, float, str], None] | None = None,
) -> Latency:
    """Time an engine on the board, in the same rounds as a reference where there is one.

    Args:
        board: The board; it must be held.
        engine: Engine file of the release.
        reference: Engine file of the dense model.
        runtime: Runtime that executes both.
        threads: Threads inside one operation.
        dense_ms: Dense latency that ratios are multiplied with, milliseconds; by default as timed beside the release.
        rounds: Rounds of the comparison; more rounds are shared by more processes, see `compare`.
        percentile: What is compared, and told in place of medians, see `compare`.
        level_ms: `Latency.level_ms` of an earlier measurement of the same two.
        progress: See `edgeprune.profiling.comparing.compare`.
    """
    from edgeprune.profiling.comparing import ALONE_PROCESS_SPREAD, compare, disturbance
    from edgeprune.profiling.statistics import median_ratio

    engines: dict[str, bytes | Path] = {_NEW: engine}
    if reference is not None:
        engines[_DENSE] = reference
    against = _NEW if reference is None else _DENSE
    found = compare(
        board,
        engines,
        against,
        runtime=runtime,
        threads=threads,
        rounds=rounds,
        percentile=percentile,
        level_ms=level_ms,
        progress=progress,
    )
    timed = found.measurements[_NEW]
    if reference is None:
        interval = median_ratio(
            timed.rounds_ms,
            [1.0] * len(timed.rounds_ms),
            processes=found.processes,
            process_spread=ALONE_PROCESS_SPREAD,
        )
        return Latency(
            measured_ms=timed.median_ms,
            dense_ms=None,
            ratio=None,
            ratio_low=None,
            ratio_high=None,
            latency_ms=interval.ratio,
            low_ms=interval.low,
            high_ms=interval.high,
            conditions=found.conditions,
            disturbance=disturbance([found]),
            level_ms=found.level_ms,
        )
    ratio = found.ratios[_NEW]
    scale_ms = found.measurements[_DENSE].median_ms if dense_ms is None else dense_ms
    return Latency(
        measured_ms=timed.median_ms,
        dense_ms=found.measurements[_DENSE].median_ms,
        ratio=ratio.ratio,
        ratio_low=ratio.low,
        ratio_high=ratio.high,
        latency_ms=ratio.ratio * scale_ms,
        low_ms=ratio.low * scale_ms,
        high_ms=ratio.high * scale_ms,
        conditions=found.conditions,
        disturbance=disturbance([found]),
        level_ms=found.level_ms,
    )


def check_latency(
    measure: Callable[[int], Latency],
    budget: Budget | None,
    *,
    tolerance: float,
    rounds: int,
    name: str,
    board: str,
) -> Latency:
    """Measure, and hold the confidence interval against the budget; an interval that straddles it is measured longer once.

    Args:
        measure: Measures with so many rounds, in more processes the more rounds there are.
        budget: None measures and reports only.
        tolerance: Share by which the budget may be exceeded.
        rounds: Rounds of the first measurement.
        name: What errors call the release.
        board: What errors call the board.

    Raises:
        LatencyGateError: The release is too slow.
        UnstableMeasurementError: The board is too noisy to tell.
    """
    latency = measure(rounds)
    if budget is None:
        return latency
    verdict = _verdict(latency, budget, tolerance)
    if verdict is None:
        _log.info("%s: the interval straddles the budget, measuring longer", board)
        latency = measure(_MORE_ROUNDS * rounds)
        verdict = _verdict(latency, budget, tolerance)
    if verdict is True:
        return latency
    low, found, high, unit, limit = _against(latency, budget)
    said = f"found {found:.4g} {unit} (95 % interval {low:.4g} to {high:.4g})"
    if verdict is None:
        raise UnstableMeasurementError(
            f"latency of {name!r} on board {board} must be told apart from {limit:.4g} {unit} (+{tolerance:.0%}), {said}.",
            hint="stop other work on the board, then deploy again",
        )
    raise LatencyGateError(
        f"latency of {name!r} on board {board} must be at most {limit:.4g} {unit} (+{tolerance:.0%}), {said}.",
        hint=f"a budget of {found * 1.02:.3g} {unit}, or prune further",
    )


def _against(latency: Latency, budget: Budget) -> tuple[float, float, float, str, float]:
    """(low, value, high, unit, limit) in the unit of the budget."""
    if budget.latency_ms is not None:
        return latency.low_ms, latency.latency_ms, latency.high_ms, "ms", budget.latency_ms
    low, value, high = (100 * (share or 0.0) for share in (latency.ratio_low, latency.ratio, latency.ratio_high))
    return low, value, high, "% of dense", 100 * (budget.latency_ratio or 0.0)


def _verdict(latency: Latency, budget: Budget, tolerance: float) -> bool | None:
    """Whether the budget is met; None when the interval straddles the limit."""
    low, _, high, _, limit = _against(latency, budget)
    if high <= limit * (1 + tolerance):
        return True
    return False if low > limit * (1 + tolerance) else None
