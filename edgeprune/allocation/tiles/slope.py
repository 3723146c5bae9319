"""One price for the cost, the same for all layers: each keeps the tiles that are cheapest at that price.

Source: K. Xu et al., "LPViT: Low-Power Semi-structured Pruning for Vision Transformers", ECCV 2024, section 3; H. Everett III,
"Generalized Lagrange Multiplier Method for Solving Problems of Optimum Allocation of Resources", 1963.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from edgeprune.allocation.tiles.problem import Counts, TileAllocation, TileProblem, TileSearch
from edgeprune.allocation.tiles.published import Published, published_counts

_EXPONENTS = (-200.0, 200.0)
_HALVINGS = 70


class SlopeSearch(TileSearch):
    """The paper's search: one slope for all layers, found by bisection.

    At a price `lambda` of the cost, each layer keeps the number of tiles with the least ``damage + beta * power + lambda *
    cost``: where its objective falls by `lambda` per unit of cost, not per share of the layer. The price is halved until the
    cost is as high as the budget allows; it never exceeds it.

    Args:
        compat: The published form instead (`edgeprune.allocation.tiles.published`), for comparison; it may miss the budget.
    """

    name: ClassVar[str] = "slope"

    def __init__(self, compat: bool | Published = False) -> None:
        self.published = Published() if compat is True else compat or None

    def search(self, problem: TileProblem, budget: float) -> TileAllocation:
        """See `TileSearch.search`."""
        problem.require_reachable(budget)
        if self.published is not None:
            counts = published_counts(problem, budget, self.published)
            missed = problem.cost(counts) / budget - 1 if budget > 0 else 0.0
            return self._found(
                problem, counts, budget, note=f"published form: {missed:+.2%} of the budget of {budget:.6g}."
            )
        counts, _ = at_price(problem, budget)
        return self._found(problem, counts, budget, note="one slope for all layers; nothing is proven.")


def at_price(problem: TileProblem, budget: float) -> tuple[Counts, float]:
    """The best allocation within a budget that one price gives, and the smallest price that keeps it.

    Args:
        problem: Layers.
        budget: At least the smallest cost that can be reached.
    """
    free = priced(problem, 0.0)
    if problem.cost(free) <= budget:
        return free, 0.0
    low, high = _EXPONENTS
    best, price = cheapest(problem), float(np.exp2(high))
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        found = priced(problem, float(np.exp2(middle)))
        if problem.cost(found) <= budget:
            high = middle
            if problem.objective(found) <= problem.objective(best):
                best, price = found, float(np.exp2(middle))
        else:
            low = middle
    return best, price


def priced(problem: TileProblem, price: float) -> Counts:
    """The least objective plus price times cost, layer by layer; of equals the most tiles."""
    found = []
    for layer, objective in zip(problem.layers.values(), problem.objectives, strict=True):
        total = (objective + price * layer.cost)[layer.least :][::-1]
        found.append(layer.curve.tiles - int(np.argmin(total)))
    return np.array(found, dtype=np.int64)


def cheapest(problem: TileProblem) -> Counts:
    """The least cost of each layer; of equals the one with the least objective."""
    found = []
    for layer, objective in zip(problem.layers.values(), problem.objectives, strict=True):
        order = np.lexsort((objective[layer.least :], layer.cost[layer.least :]))
        found.append(layer.least + int(order[0]))
    return np.array(found, dtype=np.int64)
