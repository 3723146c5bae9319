"""What tiles cost, layer by layer: multiply-accumulates, or milliseconds that a predictor gives whole networks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from edgeprune.allocation.resources import MultiplyAccumulates
from edgeprune.allocation.tiles.costs import measured, modelled_power
from edgeprune.allocation.tiles.problem import TileLayer, TileProblem, least_kept
from edgeprune.allocation.tiles.published import balanced_beta
from edgeprune.errors import TableMismatchError, UnsupportedKernelError
from edgeprune.surgery.kept_tiles import KeptTiles
from edgeprune.surgery.plan import PruningPlan, make_plan

if TYPE_CHECKING:
    from edgeprune.criteria.tiles.curves import TileCurve
    from edgeprune.loop.planning import Progress
    from edgeprune.loop.tile_energy import Pricing
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
    kernel_graph: KernelGraph,
    predictor: Pricing,
    curves: Curves,
    *,
    unit: str = "ms",
    progress: Progress | None = None,
) -> TileProblem:
    """Layers that cost what the predicted network is slower than with the fewest tiles of this layer, all others dense.

    What two layers gain only together (hidden units that neither needs) is not in it: price the plan as a whole in the end.

    Args:
        kernel_graph: The lowered dense model.
        predictor: Of the device; or of energies (`edgeprune.loop.tile_energy.Energies`).
        curves: Damage by weight.
        unit: Of what it gives networks.
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
    return TileProblem(layers, unit=unit, fixed=max(0.0, dense_ms - saved_ms))


def powered(
    problem: TileProblem, tokens: Mapping[str, int], weight: float, energies: TileProblem | None = None
) -> TileProblem:
    """The same layers with a price on their power.

    Without energies it is *modelled* (`edgeprune.allocation.tiles.costs.modelled_power`); there a tile counts by its weights, so
    that layers with tiles of other sizes compare.

    Args:
        problem: Layers with their damage and cost.
        tokens: Rows that enter each layer.
        weight: What power is worth, in the paper's scale between damage and power (`balanced_beta`).
        energies: The same layers with predicted millijoules as their cost, where the table holds energies.

    Raises:
        ConfigError: No layer's power changes with its tiles.
    """
    layers = {}
    for name, layer in problem.layers.items():
        curve = layer.curve
        power = (
            modelled_power(curve, tokens[name], energy=float(curve.weights[-1]) / curve.tiles)
            if energies is None
            else energies.layers[name].cost
        )
        layers[name] = replace(layer, power=power)
    # A layer of one tile keeps it: what its removal would do is no slope that anything is weighed by.
    movable = {name: layer for name, layer in layers.items() if layer.curve.tiles > 1}
    beta = balanced_beta(replace(problem, layers=movable or layers, beta=0.0))
    return replace(problem, layers=layers, beta=weight * beta)


def power_share(problem: TileProblem, plan: PruningPlan, fixed: float = 0.0) -> float | None:
    """Power of a plan as a share of that of all tiles; None where the layers have none.

    Args:
        problem: Of `powered`.
        plan: Of these layers.
        fixed: What neither has less of, in the unit of the layers' power.
    """
    dense = problem.power(problem.every()) + fixed
    if not dense:
        return None
    counts = [
        int(plan.kept_tiles[name].array().sum()) if name in plan.kept_tiles else layer.curve.tiles
        for name, layer in problem.layers.items()
    ]
    return (problem.power(np.array(counts, dtype=np.int64)) + fixed) / dense


def plan_of(kernel_graph: KernelGraph, curves: Curves, counts: Mapping[str, int]) -> PruningPlan:
    """The plan that keeps so many tiles of each weight, the best ones.

    Raises:
        EmptyPlanError: They are all.
    """
    tiles = {name: KeptTiles.of(curve.grid, curve.kept(counts[name])) for name, curve in curves.items()}
    return make_plan(kernel_graph.graph, {}, kept_tiles=tiles)


def require_kernels(kernel_graph: KernelGraph, predictor: Pricing, plan: PruningPlan) -> None:
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
            hint="edgeprune profile MODEL --table TABLE --tiles ROWSxCOLUMNS adds them; --macs 50% needs no table",
        )


def _with_tiles(plan: PruningPlan, tiles: Mapping[str, KeptTiles]) -> PruningPlan:
    folds = tuple(fold for fold in plan.folds if fold["producer"] in tiles or fold["consumer"] in tiles)
    return replace(plan, kept_tiles=dict(tiles), folds=folds)
