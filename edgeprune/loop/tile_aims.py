"""From costs per layer that only add up roughly to a plan whose predicted latency, as a whole, is just within the budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgeprune.allocation.tiles.slope import at_price
from edgeprune.errors import BudgetInfeasibleError
from edgeprune.loop.tile_costs import plan_of
from edgeprune.lowering.tile_choice import TileChoice, worthwhile_tiles
from edgeprune.lowering.tile_clusters import clustered_tiles

if TYPE_CHECKING:
    from edgeprune.allocation.tiles.problem import TileAllocation, TileProblem, TileSearch
    from edgeprune.criteria.tiles.sums import Floats
    from edgeprune.latency.predictor import Predictor
    from edgeprune.lowering.kernel_graph import KernelGraph

_MOST_AIMS = 10
_UNUSED = 0.01
"""Share of the budget that may be left over."""


@dataclass(frozen=True)
class Aimed:
    """An allocation, and its plan without the tiles of layers that are faster dense, and with products merged.

    Attributes:
        allocation: Of the search.
        choice: Its plan.
        merged: Weight to products before and after.
        damage: Of the allocation, and of merging.
    """

    allocation: TileAllocation
    choice: TileChoice
    merged: Mapping[str, tuple[int, int]]
    damage: float


def within_latency(
    problem: TileProblem,
    search: TileSearch,
    kernel_graph: KernelGraph,
    predictor: Predictor,
    budget_ms: float,
    damages: Mapping[str, Floats] | None = None,
) -> Aimed:
    """Search at several aims, each corrected by what the plan of the one before is predicted to take as a whole.

    Of the plans within the budget the one with the least damage is taken.

    Args:
        problem: Layers with their milliseconds.
        search: Chooses tiles within an aim.
        kernel_graph: The lowered dense model.
        predictor: Of the device.
        budget_ms: Below the predicted latency of the dense model, milliseconds.
        damages: Weight to the damage of each tile alone: products are merged by it (`edgeprune.lowering.tile_clusters`) where
            that is worth its damage at the price of a millisecond. None leaves them as they are.

    Raises:
        BudgetInfeasibleError: No plan was within it; says what the fastest one takes.
    """
    curves = {name: layer.curve for name, layer in problem.layers.items()}
    met, missed = problem.smallest, problem.dense
    aim = max(budget_ms, met) if budget_ms < missed else (met + missed) / 2
    best: Aimed | None = None
    fastest_ms, fastest = float("inf"), {name: curve.tiles for name, curve in curves.items()}
    for _ in range(_MOST_AIMS):
        allocation = search.search(problem, aim)
        if all(count == curves[name].tiles for name, count in allocation.counts.items()):
            latency_ms = predictor.network_ms(kernel_graph.at({}))
        else:
            plan = plan_of(kernel_graph, curves, allocation.counts)
            price = at_price(problem, aim)[1] if damages else 0.0
            clusters = clustered_tiles(kernel_graph, predictor, plan, damages or {}, price)
            choice = worthwhile_tiles(kernel_graph, predictor, clusters.plan)
            latency_ms = choice.latency_ms
            damage = allocation.damage + clusters.damage
        if latency_ms < fastest_ms:
            fastest_ms, fastest = latency_ms, allocation.counts
        if latency_ms <= budget_ms:
            if best is None or damage <= best.damage:
                left = {name: counts for name, counts in clusters.merged.items() if name in choice.plan.kept_tiles}
                best = Aimed(allocation, choice, left, damage)
            if latency_ms >= (1 - _UNUSED) * budget_ms:
                break
            met = aim
        elif aim <= problem.smallest:
            break
        else:
            missed = aim
        wanted = aim * budget_ms / latency_ms
        # Between an aim that was met and one that was missed; the smallest one is tried before it is given up.
        inside = met < wanted < missed
        aim = wanted if inside else met if best is None and wanted <= met else (met + missed) / 2
    if best is None:
        raise BudgetInfeasibleError(
            f"the predicted latency must be <= {budget_ms:.4g} ms, the fastest plan of tiles that was found has "
            f"{fastest_ms:.4g} ms.",
            best_ms=fastest_ms,
            widths=fastest,
            hint="a larger budget, or tiles of another size",
        )
    return best
