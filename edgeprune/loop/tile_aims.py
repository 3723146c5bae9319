"""From costs per layer that only add up roughly to a plan whose predicted latency, as a whole, is just within the budget."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from edgeprune.allocation.tiles.slope import at_price
from edgeprune.errors import BudgetInfeasibleError
from edgeprune.loop.aims import within_budget
from edgeprune.loop.tile_costs import plan_of
from edgeprune.lowering.tile_choice import worthwhile_tiles
from edgeprune.lowering.tile_clusters import clustered_tiles
from edgeprune.surgery.plan import make_plan

if TYPE_CHECKING:
    from edgeprune.allocation.tiles.problem import TileAllocation, TileProblem, TileSearch
    from edgeprune.criteria.tiles.sums import Floats
    from edgeprune.loop.tile_energy import Pricing
    from edgeprune.lowering.kernel_graph import KernelGraph
    from edgeprune.surgery.plan import PruningPlan


@dataclass(frozen=True)
class Aimed:
    """An allocation, and its plan without the tiles of layers that are faster dense, and with products merged.

    Attributes:
        allocation: Of the search.
        plan: Its plan.
        cost: Predicted latency of the plan as a whole, milliseconds.
        damage: Of the allocation, with the price of its power where it has one, and of merging.
        merged: Weight to products before and after.
    """

    allocation: TileAllocation
    plan: PruningPlan
    cost: float
    damage: float
    merged: Mapping[str, tuple[int, int]] = field(default_factory=dict)


def within_latency(
    problem: TileProblem,
    search: TileSearch,
    kernel_graph: KernelGraph,
    predictor: Pricing,
    budget_ms: float,
    damages: Mapping[str, Floats] | None = None,
) -> Aimed:
    """Search at several aims, each corrected by what the plan of the one before is predicted to take as a whole.

    Of the plans within the budget the one with the least damage is taken.

    Args:
        problem: Layers with their milliseconds, or millijoules where the predictor is one of energies.
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

    def at(aim_ms: float) -> Aimed:
        allocation = search.search(problem, aim_ms)
        if all(count == curves[name].tiles for name, count in allocation.counts.items()):
            dense = make_plan(kernel_graph.graph, {}, allow_empty=True)
            return Aimed(allocation, dense, predictor.network_ms(kernel_graph.at({})), allocation.objective)
        plan = plan_of(kernel_graph, curves, allocation.counts)
        price = at_price(problem, aim_ms)[1] if damages else 0.0
        clusters = clustered_tiles(kernel_graph, predictor, plan, damages or {}, price)
        choice = worthwhile_tiles(kernel_graph, predictor, clusters.plan)
        left = {name: counts for name, counts in clusters.merged.items() if name in choice.plan.kept_tiles}
        return Aimed(allocation, choice.plan, choice.latency_ms, allocation.objective + clusters.damage, left)

    best, fastest = within_budget(at, budget_ms, problem.smallest, problem.dense)
    if best is None:
        assert fastest is not None  # the search refuses an aim that is out of reach
        what, best_of = ("latency", "fastest") if problem.unit == "ms" else ("energy", "most frugal")
        raise BudgetInfeasibleError(
            f"the predicted {what} must be <= {budget_ms:.4g} {problem.unit}, the {best_of} plan of tiles that was found has "
            f"{fastest.cost:.4g} {problem.unit}.",
            best_ms=fastest.cost if problem.unit == "ms" else math.nan,
            widths=fastest.allocation.counts,
            hint="a larger budget, or tiles of another size",
        )
    return best
