"""What the board says: dense and pruned engine timed interleaved, on the device that the predictor was fitted for."""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

from edgeprune.boards.cores import require_cores
from edgeprune.errors import RemoteError, TableMismatchError
from edgeprune.latency.chosen import Chosen
from edgeprune.latency.identities import differing, told
from edgeprune.loop.result import LatencyCheck
from edgeprune.parts import core_of
from edgeprune.profiling.comparing import Comparison, compare, disturbance
from edgeprune.profiling.levels import COMPARED_PATIENCE
from edgeprune.profiling.sustaining import sustained

if TYPE_CHECKING:
    from torch import nn

    from edgeprune.boards.board import Board
    from edgeprune.latency.table import LatencyTable
    from edgeprune.loop.closing import MakesPlans
    from edgeprune.loop.planning import Progress
    from edgeprune.lowering.kernel_graph import KernelGraph

_log = logging.getLogger("edgeprune.loop")

PRECISION = 0.007
"""Half-width of the interval, as a share of the ratio, that the closed loop measures to."""

_STEP = "measuring on the board"
_MOST_COMPARISONS = 4


def require_same_device(table: LatencyTable, board: Board) -> None:
    """Refuse a board whose latencies the table does not describe.

    Raises:
        ConfigError: It lets us use fewer cores than the table has threads.
        TableMismatchError: Names what differs.
        RemoteError: The board was lost.
    """
    runtime = str(table.header["runtime"])
    fingerprint = board.probe()
    wanted, found = table.header["identity"], fingerprint.identity(runtime)
    if names := differing(wanted, found):
        said = {name: (told(name, wanted.get(name)), told(name, found.get(name))) for name in names}
        values = ", ".join(
            name if None in pair else f"{name} (table: {pair[0]}, board: {pair[1]})" for name, pair in said.items()
        )
        raise TableMismatchError(
            f"the latency table must have been measured on a board like {board.name}, found another {values}.",
            hint=f"edgeprune profile --board {board.name}",
        )
    more = f"edgeprune profile --board {board.name} --threads {fingerprint.cores}, or let its user have more cores"
    require_cores(fingerprint, int(table.header["threads"]), board=board.name, hint=more)


def measure_ratio(
    board: Board,
    kernel_graph: KernelGraph,
    pruned: nn.Module | None,
    *,
    threads: int,
    rounds: int,
    precision: float = 1.0,
    chosen: Chosen | None = None,
    level_ms: float | None = None,
    progress: Progress | None = None,
) -> LatencyCheck:
    """Time the dense engine and that of a pruned model interleaved on a board, which is held meanwhile.

    Networks of many small kernels differ by some percent between processes, others hardly at all, so a comparison that is not
    precise enough is repeated, at most until there are four, and the mean is taken.

    Args:
        board: Where.
        kernel_graph: Holds the dense engine and the inputs.
        pruned: The pruned model; None times the dense engine alone.
        threads: Threads inside one operation.
        rounds: Rounds of each comparison.
        precision: Half-width of the interval, as a share of the ratio, at which no further comparison is made.
        chosen: Which latency is compared; the median when None. Of a percentile, the ratio is that of the two engines'
            percentiles in the same round. For a sustained latency the dense engine heats the board to equilibrium first; the
            comparison, which leaves no pause, follows at once.
        level_ms: `LatencyCheck.level_ms` of an earlier measurement on the same board, with the same dense engine.
        progress: Told the items done.

    Raises:
        ExportError: The pruned model cannot be exported.
        BoardBusyError: Another run holds the board.
        RemoteError: The board was lost.
    """

    def tell(done: int, total: int, left_s: float, message: str) -> None:
        if progress is not None:
            progress(_STEP, done, total)

    with tempfile.TemporaryDirectory(prefix="edgeprune-prune-") as folder:
        backend, suffix = kernel_graph.backend.built_on(board), kernel_graph.dense_engine.suffix
        dense = backend.engine_of(kernel_graph.dense_engine, Path(folder) / f"dense{suffix}")
        engines: dict[str, bytes | Path] = {"dense": dense}
        if pruned is not None:
            path = Path(folder) / f"pruned{suffix}"
            graph = kernel_graph.graph
            backend.export(core_of(pruned, graph.parts), graph.example_inputs, path)
            engines["pruned"] = path
        comparisons: list[Comparison] = []
        checks: list[LatencyCheck] = []
        which = chosen or Chosen()
        heated = ""
        with board.hold("prune"):
            if which.sustained:
                heated = _heat(board, kernel_graph.backend.name, dense, threads)
            while not checks or (len(checks) < _MOST_COMPARISONS and _half_width(mean_of(checks)) > precision):
                try:
                    found = compare(
                        board,
                        engines,
                        "dense",
                        runtime=kernel_graph.backend.name,
                        threads=threads,
                        rounds=rounds,
                        percentile=which.percentile,
                        level_ms=level_ms,
                        patience=0.0 if which.sustained else COMPARED_PATIENCE,
                        progress=tell,
                    )
                except RemoteError:
                    if not checks:
                        raise
                    break  # what was measured before the board was lost is good
                level_ms = found.level_ms
                comparisons.append(found)
                checks.append(check_of(board.name, found, "dense" if pruned is None else "pruned"))
    return replace(
        mean_of(checks),
        percentile=which.percentile,
        heated=heated,
        disturbance=disturbance(comparisons),
        level_ms=level_ms,
    )


def _heat(board: Board, runtime: str, dense: Path, threads: int) -> str:
    """Run the dense engine until the board is in equilibrium, or ten minutes are over; one sentence on what that came to."""
    found = sustained(
        board,
        {"dense": dense},
        "dense",
        runtime=runtime,
        threads=threads,
        rest_s=0.0,
    )
    _log.info("%s: %s", board.name, found["statement"])
    return str(found["statement"])


def measured_or_lost(
    board: Board,
    planner: MakesPlans,
    pruned: nn.Module | None,
    *,
    rounds: int,
    level_ms: float | None,
    progress: Progress | None,
) -> tuple[LatencyCheck | None, str]:
    """As `measure_ratio`, to `PRECISION`; None and a clause on what happened where the board is lost.

    Args:
        board: Where.
        planner: Holds the lowered dense model and the table, whose number of threads is used.
        pruned: The pruned model; None times the dense engine alone.
        rounds: Rounds of each comparison.
        level_ms: See `measure_ratio`.
        progress: Told the items done.

    Raises:
        ExportError: The pruned model cannot be exported.
    """
    header = planner.predictor.table.header
    return ratio_or_lost(
        board,
        lambda: measure_ratio(
            board,
            planner.kernel_graph,
            pruned,
            threads=int(header["threads"]),
            rounds=rounds,
            precision=PRECISION,
            chosen=Chosen.of(header),
            level_ms=level_ms,
            progress=progress,
        ),
    )


def ratio_or_lost(board: Board, measured: Callable[[], LatencyCheck]) -> tuple[LatencyCheck | None, str]:
    """What was measured on a board; None and a clause on what happened where the board is lost."""
    try:
        found = measured()
    except RemoteError as error:
        # A lost board must not take the plan or the tuned model along.
        _log.warning("%s could not measure it: %s", board.name, error.message)
        return None, f"{board.name} could not measure it: {error.message}"
    return found, ""


def check_of(board: str, found: Comparison, pruned: str = "pruned") -> LatencyCheck:
    """What a comparison with an engine named ``"dense"`` says of another one."""
    ratio = found.ratios[pruned]
    return LatencyCheck(
        board=board,
        dense_ms=found.measurements["dense"].median_ms,
        pruned_ms=found.measurements[pruned].median_ms,
        ratio=ratio.ratio,
        ratio_low=ratio.low,
        ratio_high=ratio.high,
        disturbance=disturbance([found]),
        level_ms=found.level_ms,
    )


def _half_width(check: LatencyCheck) -> float:
    return (check.ratio_high - check.ratio_low) / 2 / check.ratio


def mean_of(checks: Sequence[LatencyCheck]) -> LatencyCheck:
    """Comparisons of their own processes are independent: the mean, and either half of the interval by adding variances."""
    ratio = mean(check.ratio for check in checks)
    low = math.hypot(*(check.ratio - check.ratio_low for check in checks)) / len(checks)
    high = math.hypot(*(check.ratio_high - check.ratio for check in checks)) / len(checks)
    return replace(
        checks[0],
        dense_ms=mean(check.dense_ms for check in checks),
        pruned_ms=mean(check.pruned_ms for check in checks),
        ratio=ratio,
        ratio_low=ratio - low,
        ratio_high=ratio + high,
    )
