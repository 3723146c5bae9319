"""From options per section to one plan whose cost, as a whole, is within the budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from edgeprune.allocation.tiles.options import least_damage
from edgeprune.errors import BudgetInfeasibleError
from edgeprune.loop.aims import UNUSED, within_budget
from edgeprune.lowering.tile_choice import worthwhile_tiles
from edgeprune.lowering.tile_clusters import clustered_tiles

if TYPE_CHECKING:
    from edgeprune.criteria.tiles.sums import Floats
    from edgeprune.loop.joint.candidates import Candidates, Option
    from edgeprune.loop.joint.prices import Prices, Timed
    from edgeprune.surgery.plan import PruningPlan

_MOST_TRIES = 24
_STEP = 0.02
"""Share of the dense cost over which the price of a unit is told."""


@dataclass(frozen=True)
class Found:
    """What a search came to.

    Attributes:
        plan: To cut by.
        options: One per section; the plan may have the tiles of layers back that are faster dense.
        cost: Of the plan as a whole.
        damage: Of the options.
        bound: No options whose costs, section by section, add up to the budget have less damage.
        merged: Weight to products before and after some were merged.
        price: Damage that a unit of cost was worth.
    """

    plan: PruningPlan
    options: tuple[Option, ...]
    cost: float
    damage: float
    bound: float
    merged: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    price: float = 0.0


class JointSearch:
    """Chooses options of sections: least damage within a budget.

    The choice among the options is exact where costs add up over sections (multiply-accumulates), to the solver's gap. Predicted
    latencies add up roughly: then what the chosen plan takes as a whole corrects the aim, and what is left of the budget is
    spent on single sections.

    Args:
        candidates: Whose options.
        options: Of each section.
        prices: Of candidates.
        timed: The prices where those are latencies, for layers that are faster dense; else None.
        damages: Weight to the damage of each tile alone, on the scale of the options', by which products are merged.
        factors: Per section by how much the estimated damage of its widths and of its tiles is to be multiplied; by 1 when None.
    """

    def __init__(
        self,
        candidates: Candidates,
        options: Sequence[Sequence[Option]],
        prices: Prices,
        timed: Timed | None,
        damages: Mapping[str, Floats] | None = None,
        factors: Sequence[tuple[float, float]] | None = None,
    ) -> None:
        self.candidates, self.options, self.prices, self.timed = candidates, options, prices, timed
        self.damages = damages or {}
        self.factors = tuple(factors or [(1.0, 1.0)] * len(options))
        self._costs = [np.array([one.cost - prices.dense for one in some]) for some in options]
        self._damages = [
            np.array([wide * one.narrowing + tiled * one.tiling for one in some])
            for some, (wide, tiled) in zip(options, self.factors, strict=True)
        ]

    def without_tiles(self) -> JointSearch:
        """The same among widths alone."""
        options = [[one for one in some if not one.tiles] for some in self.options]
        return JointSearch(self.candidates, options, self.prices, self.timed, self.damages, self.factors)

    def rescaled(self, factors: Sequence[tuple[float, float]]) -> JointSearch:
        """The same with other factors."""
        return JointSearch(self.candidates, self.options, self.prices, self.timed, self.damages, factors)

    @property
    def smallest(self) -> float:
        """The smallest cost, as options add up."""
        return self.prices.dense + sum(float(one.min()) for one in self._costs)

    def within(self, budget: float) -> Found:
        """The options with the least damage whose plan is within a budget.

        Args:
            budget: Below the cost of the dense model, in the unit of the prices.

        Raises:
            BudgetInfeasibleError: No plan was within it; says what the cheapest one costs.
        """
        dense = self.prices.dense
        bounds: dict[float, float] = {}

        def search(aim: float) -> Found | None:
            picked = least_damage(self._costs, self._damages, aim - dense)
            if picked is None:
                return None
            bounds[aim] = picked.bound
            return self._whole(picked.options, self._price(aim, picked.damage))

        best, cheapest = within_budget(search, budget, self.smallest, dense, exact=self.prices.exact)
        if best is None:
            least = float("inf") if cheapest is None else cheapest.cost
            raise BudgetInfeasibleError(
                f"the cost must be <= {budget:.6g} {self.prices.unit}, the smallest plan of widths and tiles that was found has "
                f"{least:.6g} {self.prices.unit}.",
                best_ms=least if self.prices.unit == "ms" else float("nan"),
                hint="a larger budget, tiles of another size, or --blocks",
            )
        best = self._spent(best, budget)
        return replace(best, bound=min(best.damage, bounds.get(budget, 0.0)))

    def _price(self, aim: float, damage: float) -> float:
        """Damage that a unit of cost is worth at an aim: what a slightly smaller one loses."""
        if not self.damages:
            return 0.0
        step = _STEP * self.prices.dense
        less = least_damage(self._costs, self._damages, aim - step - self.prices.dense)
        return 0.0 if less is None else max(0.0, less.damage - damage) / step

    def _whole(self, picks: Sequence[int], price: float = 0.0) -> Found:
        options = tuple(some[at] for some, at in zip(self.options, picks, strict=True))
        plan = self.candidates.plan(options)
        damage = sum(float(one[at]) for one, at in zip(self._damages, picks, strict=True))
        if self.timed is not None:
            if plan.kept_tiles:
                clusters = clustered_tiles(
                    self.timed.kernel_graph, self.timed.predictor, plan, self.damages if price > 0 else {}, price
                )
                choice = worthwhile_tiles(self.timed.kernel_graph, self.timed.predictor, clusters.plan)
                left = {name: counts for name, counts in clusters.merged.items() if name in choice.plan.kept_tiles}
                return Found(choice.plan, options, choice.latency_ms, damage + clusters.damage, 0.0, left, price)
            return Found(plan, options, self.timed.tiled(plan, {}, 0.0), damage, 0.0)
        widths = {group: width for option in options for group, width in option.widths.items()}
        removed = sum(self.candidates.removed(option) for option in options)
        return Found(plan, options, self.prices.tiled(plan, widths, removed), damage, 0.0)

    def _spent(self, best: Found, budget: float) -> Found:
        """What is left of the budget, spent section by section: the largest fall of the damage that fits, as a whole plan."""
        if self.prices.exact:
            return best
        refused: set[tuple[int, int]] = set()
        for _ in range(_MOST_TRIES):
            places = [some.index(option) for some, option in zip(self.options, best.options, strict=True)]
            moves = [
                (float(self._damages[section][place] - self._damages[section][other]), section, other)
                for section, place in enumerate(places)
                for other in range(len(self.options[section]))
                if (section, other) not in refused
                and self._damages[section][other] < self._damages[section][place]
                and self._costs[section][other] - self._costs[section][place] <= budget - best.cost + UNUSED * budget
            ]
            if not moves:
                break
            _, section, other = max(moves)
            found = self._whole([*places[:section], other, *places[section + 1 :]], best.price)
            if found.cost <= budget:
                best = found
            else:
                refused.add((section, other))
        return best
