"""Dense or sparse, layer by layer: tiles stay removed only where the model is predicted to be faster for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from edgeprune.spec import Kernel

if TYPE_CHECKING:
    from edgeprune.lowering.kernel_graph import KernelGraph
    from edgeprune.surgery.plan import PruningPlan


class LatencyModel(Protocol):
    """What prices a network; `edgeprune.Predictor` does."""

    def network_ms(self, kernels: Sequence[Kernel]) -> float:
        """Milliseconds of a network that executes these kernels."""


@dataclass(frozen=True)
class TileChoice:
    """What is left of a plan's tiles.

    Attributes:
        plan: Without the tiles of layers that are faster dense.
        latency_ms: Predicted, of that plan.
        gains_ms: Weight with tiles to what the model is predicted to gain by them, beside the others that were still there when
            it was asked; none above 0 where they were left out.
    """

    plan: PruningPlan
    latency_ms: float
    gains_ms: dict[str, float]


def worthwhile_tiles(kernel_graph: KernelGraph, latency: LatencyModel, plan: PruningPlan) -> TileChoice:
    """Give layers back to the dense form that are predicted to be no slower in it, and lose nothing so.

    Layers are asked in order, each beside the choices made before: what it gains also depends on its neighbors, for instance on
    hidden units that only go where both layers of an MLP have tiles.

    Args:
        kernel_graph: The lowered model.
        latency: For the device, at the batch and thread count of the deployment.
        plan: With tiles.

    Raises:
        UnsupportedKernelError: A kernel cannot be priced; names it.
    """
    best = latency.network_ms(kernel_graph.of_plan(plan))
    gains: dict[str, float] = {}
    for name in list(plan.kept_tiles):
        dense = without_tiles(plan, name)
        dense_ms = latency.network_ms(kernel_graph.of_plan(dense))
        gains[name] = dense_ms - best
        if dense_ms <= best:
            plan, best = dense, dense_ms
    return TileChoice(plan, best, gains)


def without_tiles(plan: PruningPlan, weight: str) -> PruningPlan:
    """A plan that gives a weight all of its tiles back."""
    tiles = {name: kept for name, kept in plan.kept_tiles.items() if name != weight}
    folds = tuple(fold for fold in plan.folds if fold["producer"] in tiles or fold["consumer"] in tiles)
    return replace(plan, kept_tiles=tiles, folds=folds)
