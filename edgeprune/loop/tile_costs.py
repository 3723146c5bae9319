"""What tiles cost, layer by layer: multiply-accumulates, or milliseconds that a predictor gives whole networks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from edgeprune.allocation.resources import MultiplyAccumulates
from edgeprune.allocation.tiles.costs import measured
from edgeprune.allocation.tiles.problem import TileLayer, TileProblem, least_kept
from edgeprune.errors import TableMismatchError, UnsupportedKernelError
from edgeprune.surgery.kept_tiles import KeptTiles
from edgeprune.surgery.plan import PruningPlan, make_plan

if TYPE_CHECKING:
    from edgeprune.criteria.tiles.curves import TileCurve
    from edgeprune.latency.predictor import Predictor
    from edgeprune.loop.planning import Progress
    from edgeprune.lowering.kernel_graph import KernelGraph

PRICED = (0.25, 0.5, 0.75)
"""Shares of the tiles of a layer without which it is priced, beside none and as many as may go; straight lines between."""

Curves = Mapping[str, "TileCurve"]


def counted(kernel_graph: KernelGraph, curves: Curves, tokens: Mapping[str, int]) -> TileProblem:
    """Layers that cost their multiply-accumulates; what has no tiles (attention, convolutions, the classifier) is fixed.

    Args:
        kernel_graph: The lowered dense model.
        curves: Damage by weight.
        tokens: Rows that enter each layer.

    Raises:
        UnsupportedKernelError: The multiply-accumulates of the model cannot be counted.
    """
    layers = {
        name: TileLayer(curve, tokens[name] * curve.weights, least=least_kept(curve)) for name, curve in curves.items()
    }
    total = MultiplyAccumulates(kernel_graph).value({})
    tiled = sum(float(layer.cost[-1]) for layer in layers.values())
    return TileProblem(layers, unit="multiply-accumulates", fixed=max(0.0, total - tiled))


def priced(
    kernel_graph: KernelGraph, predictor: Predictor, curves: Curves, *, progress: Progress | None = None
) -> TileProblem:
    """Layers that cost what the predicted network is slower than with the fewest tiles of this layer, all others dense.

    What two layers gain only together (hidden units that neither needs) is not in it: price the plan as a whole in the end.

    Args:
        kernel_graph: The lowered dense model.
        predictor: Of the device.
        curves: Damage by weight.
        progress: Told the layers done.

    Raises:
        TableMismatchError: The table cannot price the kernels of tiles; names the families that are missing.
        UnsupportedKernelError: The backend's kernels of tiles are not known.
    """
    least = {name: least_kept(curve) for name, curve in curves.items()}
    smallest = plan_of(kernel_graph, curves, least)
    require_kernels(kernel_graph, predictor, smallest)
    dense_ms = predictor.network_ms(kernel_graph.at({}))
    layers: dict[str, TileLayer] = {}
    saved_ms = 0.0
    for done, (name, curve) in enumerate(curves.items()):
        if progress is not None:
            progress("pricing tiles", done, len(curves))
        figures = {curve.tiles: dense_ms}
        for count in {least[name], *(max(least[name], curve.kept_at(share)) for share in PRICED)} - {curve.tiles}:
            alone = {name: KeptTiles.of(curve.grid, curve.kept(count))}
            figures[count] = predictor.network_ms(kernel_graph.of_plan(_with_tiles(smallest, alone)))
        lowest = min(figures.values())
        saved_ms += dense_ms - lowest
        cost = measured(curve, {count: ms - lowest for count, ms in figures.items()})
        layers[name] = TileLayer(curve, cost, least=least[name])
    return TileProblem(layers, unit="ms", fixed=max(0.0, dense_ms - saved_ms))


def plan_of(kernel_graph: KernelGraph, curves: Curves, counts: Mapping[str, int]) -> PruningPlan:
    """The plan that keeps so many tiles of each weight, the best ones.

    Raises:
        EmptyPlanError: They are all.
    """
    tiles = {name: KeptTiles.of(curve.grid, curve.kept(counts[name])) for name, curve in curves.items()}
    return make_plan(kernel_graph.graph, {}, kept_tiles=tiles)


def require_kernels(kernel_graph: KernelGraph, predictor: Predictor, plan: PruningPlan) -> None:
    """Refuse a table by which a plan's kernels cannot be priced.

    Raises:
        TableMismatchError: Names the families of kernels that it must hold.
        UnsupportedKernelError: The backend's kernels of tiles are not known.
    """
    missing: dict[str, None] = {}
    for kernel in dict.fromkeys(kernel_graph.of_plan(plan)):
        try:
            predictor.kernel_ms([kernel])
        except UnsupportedKernelError:
            missing[f"{kernel.op} ({kernel.family}, {kernel.precision})"] = None
    if missing:
        raise TableMismatchError(
            f"the latency table must hold the kernels of a model with tiles, found none to judge {', '.join(missing)} by.",
            hint="edgeprune profile with this model, or --macs 50%, which needs no table",
        )


def _with_tiles(plan: PruningPlan, tiles: Mapping[str, KeptTiles]) -> PruningPlan:
    folds = tuple(fold for fold in plan.folds if fold["producer"] in tiles or fold["consumer"] in tiles)
    return replace(plan, kept_tiles=dict(tiles), folds=folds)
