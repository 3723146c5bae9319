"""What the board says: dense and pruned engine timed interleaved, on the device that the predictor was fitted for."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from edgeprune.errors import TableMismatchError
from edgeprune.loop.result import LatencyCheck
from edgeprune.parts import core_of
from edgeprune.profiling.comparing import compare

if TYPE_CHECKING:
    from torch import nn

    from edgeprune.boards.board import Board
    from edgeprune.latency.table import LatencyTable
    from edgeprune.loop.planning import Progress
    from edgeprune.lowering.kernel_graph import KernelGraph

_STEP = "measuring on the board"


def require_same_device(table: LatencyTable, board: Board) -> None:
    """Refuse a board whose latencies the table does not describe.

    Raises:
        TableMismatchError: Names what differs.
        RemoteError: The board was lost.
    """
    runtime = str(table.header["runtime"])
    wanted, found = table.header["identity"], board.probe().identity(runtime)
    differing = sorted(name for name in {*wanted, *found} if wanted.get(name) != found.get(name))
    if differing:
        # Instruction sets and hashes are long: their names say enough.
        values = ", ".join(
            f"{name} {found.get(name)!r} instead of {wanted.get(name)!r}" if len(str(found.get(name))) < 40 else name
            for name in differing
        )
        raise TableMismatchError(
            f"the latency table must have been measured on a board like {board.name}, found another {values}.",
            hint=f"edgeprune profile --board {board.name}",
        )


def measure_ratio(
    board: Board,
    kernel_graph: KernelGraph,
    pruned: nn.Module | None,
    *,
    threads: int,
    rounds: int,
    progress: Progress | None = None,
) -> LatencyCheck:
    """Time the dense engine and that of a pruned model interleaved on a board, which is held meanwhile.

    Args:
        board: Where.
        kernel_graph: Holds the dense engine and the inputs.
        pruned: The pruned model; None times the dense engine alone.
        threads: Threads inside one operation.
        rounds: Rounds of the comparison.
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
        engines: dict[str, bytes | Path] = {"dense": kernel_graph.dense_engine}
        if pruned is not None:
            path = Path(folder) / f"pruned{kernel_graph.dense_engine.suffix}"
            graph = kernel_graph.graph
            kernel_graph.backend.export(core_of(pruned, graph.parts), graph.example_inputs, path)
            engines["pruned"] = path
        with board.hold("prune"):
            found = compare(
                board,
                engines,
                "dense",
                runtime=kernel_graph.backend.name,
                threads=threads,
                rounds=rounds,
                progress=tell,
            )
    last = "dense" if pruned is None else "pruned"
    ratio = found.ratios[last]
    return LatencyCheck(
        board=board.name,
        dense_ms=found.measurements["dense"].median_ms,
        pruned_ms=found.measurements[last].median_ms,
        ratio=ratio.ratio,
        ratio_low=ratio.low,
        ratio_high=ratio.high,
    )
