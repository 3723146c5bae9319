"""From a model to the kernels that a predictor's device would run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgeprune.errors import TableMismatchError
from edgeprune.latency.chosen import Chosen

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from edgeprune.graph.channel_graph import ChannelGraph
    from edgeprune.latency.predictor import Predictor
    from edgeprune.latency.table import LatencyTable
    from edgeprune.loop.planning import Progress
    from edgeprune.lowering.kernel_graph import KernelGraph
    from edgeprune.spec import Precision


def lowered(
    model: nn.Module,
    example_inputs: Any,
    backend: str,
    predictor: Predictor,
    *,
    graph: ChannelGraph | None,
    folder: Path,
    progress: Progress | None,
) -> KernelGraph:
    """The model's kernels at any widths, on the device of the predictor's table.

    Args:
        model: The dense model.
        example_inputs: Tensor, tuple or dict; fixes the deployment batch.
        backend: Runtime of the engines.
        predictor: Of the board.
        graph: The traced model, where the caller has it.
        folder: For engines; must outlive the result.
        progress: Called with (step, done, in all).
    """
    from edgeprune.graph.tracing import trace
    from edgeprune.lowering.kernel_graph import lower

    device = predictor.table.target()
    if graph is None:
        _tell(progress, "tracing", 0)
        graph = trace(model, example_inputs)
        _tell(progress, "tracing", 1)
    _tell(progress, "lowering", 0)
    precision = precision_of(predictor)
    lowered = lower(graph, backend, model=model, device=device, precision=precision, workdir=folder)
    _tell(progress, "lowering", 1)
    return lowered


def precision_of(predictor: Predictor) -> Precision:
    """Of the latency that a predictor's table is of, and so of the engines that are compared on a board."""
    precision: Precision = Chosen.of(predictor.table.header).precision  # type: ignore[assignment]  # a header has no other
    return precision


def require_backend(table: LatencyTable, backend: str) -> None:
    """Refuse a table that was measured with another runtime.

    Raises:
        TableMismatchError: Names both.
    """
    runtime = table.header["runtime"]
    if runtime != backend:
        raise TableMismatchError(
            f"the latency table must have been measured with {backend}, found {runtime}.",
            hint=f"edgeprune profile --backend {backend}",
        )


def require_runtime(predictor: Predictor, kernel_graph: KernelGraph) -> None:
    """Refuse a table that was measured with another runtime, or in another precision, than the engines are for.

    Raises:
        TableMismatchError: Names both.
    """
    require_backend(predictor.table, kernel_graph.backend.name)
    wanted = Chosen.of(predictor.table.header).precision
    compiled = kernel_graph.backend.precision
    if compiled != wanted:
        raise TableMismatchError(
            f"the latency that is meant must be of engines as {kernel_graph.backend.name} compiles them, in "
            f"{compiled}, found {wanted}.",
            hint=f"a table of {compiled}, or lower(precision={wanted!r})",
        )


def _tell(progress: Progress | None, step: str, done: int) -> None:
    if progress is not None:
        progress(step, done, 1)
