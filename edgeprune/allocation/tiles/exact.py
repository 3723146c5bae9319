"""The least damage within the budget, with a proof: one option per layer, as a mixed-integer linear program.

A multiple-choice knapsack. The best price of the cost (the Lagrangian dual) bounds the optimum from below; an option whose
reduced cost alone exceeds the gap to the best that is known cannot be part of anything better and is left out; HiGHS solves
what is left.

Source: P. Sinha, A. Zoltners, "The Multiple-Choice Knapsack Problem", 1979 (the relaxation and the reduction).
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import numpy.typing as npt

from edgeprune.allocation.solver import solve
from edgeprune.allocation.tiles.problem import Counts, TileAllocation, TileProblem, TileSearch
from edgeprune.allocation.tiles.slope import at_price, priced
from edgeprune.criteria.tiles.sums import Floats
from edgeprune.errors import ConfigError

_HALVINGS = 60


class ExactTiles(TileSearch):
    """Proves its allocation to a gap.

    Args:
        gap: Relative gap at which to stop.
        time_limit_s: Of the solver, seconds. The best that was found comes back, with the bound that was proven.
    """

    name: ClassVar[str] = "exact"

    def __init__(self, gap: float = 1e-4, time_limit_s: float = 30.0) -> None:
        if not 0 <= gap < 1:
            raise ConfigError(f"gap must be a share in [0, 1), found {gap}.")
        if time_limit_s <= 0:
            raise ConfigError(f"time_limit_s must be greater than 0 s, found {time_limit_s}.")
        self.gap, self.time_limit_s = gap, time_limit_s

    def search(self, problem: TileProblem, budget: float) -> TileAllocation:
        """See `TileSearch.search`."""
        problem.require_reachable(budget)
        start, price = at_price(problem, budget)
        best = _filled(problem, start, budget)
        if price == 0.0:
            return self._found(
                problem, best, budget, problem.objective(best), "no price on the cost: nothing is better."
            )
        price, bound = _dual(problem, budget, price)
        bound = min(bound, problem.objective(best))
        if problem.objective(best) - bound > self.gap * abs(problem.objective(best)):
            best, bound = self._solve(problem, budget, best, price, bound)
        proven = problem.objective(best) - bound <= max(self.gap, 1e-9) * abs(problem.objective(best))
        note = (
            "proven among all numbers of tiles." if proven else f"the time limit of {self.time_limit_s:g} s ended it."
        )
        return self._found(problem, best, budget, bound, note)

    def _solve(
        self, problem: TileProblem, budget: float, best: Counts, price: float, bound: float
    ) -> tuple[Counts, float]:
        from scipy.optimize import Bounds, LinearConstraint
        from scipy.sparse import csr_array

        known = problem.objective(best)
        options = _options(problem, price, known - bound)
        owners = np.repeat(np.arange(len(options)), [len(some) for some in options])
        counts = np.concatenate(options)
        objective = np.concatenate([values[some] for values, some in zip(problem.objectives, options, strict=True)])
        costs = np.concatenate([one.cost[some] for one, some in zip(problem.layers.values(), options, strict=True)])
        # What is cheapest in each layer counts for nothing, so that the solver's tolerance is of what can be chosen.
        base = np.array([one.cost[some].min() for one, some in zip(problem.layers.values(), options, strict=True)])
        left = budget - problem.fixed - float(base.sum())
        scale = max(abs(known), 1e-300) / 100
        unit = max(left, 1e-300)
        size = len(counts)
        choose = csr_array((np.ones(size), (owners, np.arange(size))), shape=(len(options), size))
        found = solve(
            objective / scale,
            integrality=np.ones(size),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(choose, 1, 1),
                LinearConstraint(((costs - base[owners]) / unit)[None], -np.inf, left / unit),
            ],
            options={"time_limit": self.time_limit_s, "mip_rel_gap": self.gap},
        )
        if found.status == 2 or (found.mip_dual_bound is None and found.x is None):
            # Nothing better than what was known is left among the options.
            return best, known if found.status == 2 else bound
        if found.mip_dual_bound is not None and np.isfinite(found.mip_dual_bound):
            # Options that were left out are part of nothing better than what was known.
            bound = max(bound, min(known, float(found.mip_dual_bound) * scale))
        if found.x is not None:
            taken = np.array(
                [int(counts[owners == one][np.argmax(found.x[owners == one])]) for one in range(len(options))]
            )
            if problem.cost(taken) <= budget:
                taken = _filled(problem, taken, budget)
                if problem.objective(taken) < known:
                    best = taken
        return best, min(bound, problem.objective(best))


def _dual(problem: TileProblem, budget: float, price: float) -> tuple[float, float]:
    """The price with the best bound, and that: ``min of objective + price * (cost - budget)``, concave in the price."""

    def bound_at(one: float) -> float:
        counts = priced(problem, one)
        return problem.objective(counts) + one * (problem.cost(counts) - budget)

    # The cost steps over the budget between two prices; the bound is best at the step.
    low, high = 0.0, price
    best = max((bound_at(one), one) for one in (low, high))
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        best = max(best, (bound_at(middle), middle))
        if problem.cost(priced(problem, middle)) <= budget:
            high = middle
        else:
            low = middle
    return best[1], best[0]


def _options(problem: TileProblem, price: float, gap: float) -> list[npt.NDArray[np.int64]]:
    """Per layer, the numbers of tiles that can be part of an allocation that is better than what is known."""
    found = []
    slack = gap * (1 + 1e-6)
    for layer, objective in zip(problem.layers.values(), problem.objectives, strict=True):
        counts = np.arange(layer.least, layer.curve.tiles + 1)
        total = objective[counts] + price * layer.cost[counts]
        near = counts[total - total.min() <= slack]
        found.append(near[_efficient(layer.cost[near], objective[near])])
    return found


def _efficient(costs: Floats, objective: Floats) -> npt.NDArray[np.int64]:
    """Those that no other beats in both."""
    order = np.lexsort((objective, costs))
    kept, least = [], np.inf
    for place in order:
        if objective[place] < least:
            kept.append(place)
            least = objective[place]
    return np.array(sorted(kept), dtype=np.int64)


def _filled(problem: TileProblem, counts: Counts, budget: float) -> Counts:
    """An allocation, and what is left of the budget spent: move by move the largest fall of the objective that fits."""
    counts = counts.copy()
    while True:
        left = budget - problem.cost(counts)
        best: tuple[float, int, int] | None = None
        for place, (layer, objective) in enumerate(zip(problem.layers.values(), problem.objectives, strict=True)):
            gains = objective[counts[place]] - objective[layer.least :]
            gains = np.where(layer.cost[layer.least :] - layer.cost[counts[place]] <= left, gains, -np.inf)
            choice = int(np.argmax(gains))
            if gains[choice] > 0 and (best is None or gains[choice] > best[0]):
                best = (float(gains[choice]), place, layer.least + choice)
        if best is None:
            return counts
        counts[best[1]] = best[2]
