"""One option out of each of several lists, with the least damage within a budget: a multiple-choice knapsack, with a bound.

What an option consists of (widths, tiles, both, nothing at all) is its maker's affair; costs and damages add up over lists.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgeprune.allocation.solver import solve
from edgeprune.criteria.tiles.sums import Floats

Ints = npt.NDArray[np.int64]

_MOST_ROOMS = 4
_ROUNDING = 1e-9
"""Share of a budget by which sums of floats may lie above it."""


@dataclass(frozen=True)
class Picked:
    """One option per list.

    Attributes:
        options: Index of the option in each list.
        cost: Their total.
        damage: Their total.
        bound: No options within the budget have less damage.
    """

    options: tuple[int, ...]
    cost: float
    damage: float
    bound: float


@dataclass(frozen=True)
class Front:
    """Combinations of several lists none of which is beaten in both cost and damage by another one, by ascending cost.

    Attributes:
        cost: Shape [points].
        damage: Falls with the cost, shape [points].
        options: Index of the option in each list, shape [points, lists].
    """

    cost: Floats
    damage: Floats
    options: Ints


def efficient(costs: Floats, damages: Floats) -> Ints:
    """Those that no other one beats in cost and damage, by ascending cost."""
    order = np.lexsort((damages, costs))
    least = np.minimum.accumulate(damages[order])
    better = np.concatenate([[True], damages[order][1:] < least[:-1]])
    found: Ints = order[better].astype(np.int64)
    return found


def thinned(values: Floats, most: int) -> Ints:
    """At most so many indices of ascending values, the ends among them, about evenly spaced in value."""
    if len(values) <= most:
        return np.arange(len(values), dtype=np.int64)
    wanted = np.linspace(values[0], values[-1], most)
    near = np.abs(values[None] - wanted[:, None]).argmin(1)
    return np.unique(near).astype(np.int64)


def front_of(costs: Sequence[Floats], damages: Sequence[Floats], most: int) -> Front:
    """The front of all combinations of one option per list.

    Exact as long as the front of no part of the lists has more than `most` points; longer ones are thinned out, evenly by cost.

    Args:
        costs: Per list those of its options.
        damages: The same.
        most: Points of the front, at most.
    """
    found = Front(np.zeros(1), np.zeros(1), np.zeros((1, 0), dtype=np.int64))
    for cost, damage in zip(costs, damages, strict=True):
        total = (found.cost[:, None] + cost[None]).ravel()
        lost = (found.damage[:, None] + damage[None]).ravel()
        kept = efficient(total, lost)
        kept = kept[thinned(total[kept], most)]
        before, option = np.divmod(kept, len(cost))
        found = Front(total[kept], lost[kept], np.column_stack([found.options[before], option]))
    return found


def least_damage(
    costs: Sequence[Floats], damages: Sequence[Floats], budget: float, *, gap: float = 1e-4, time_limit_s: float = 30.0
) -> Picked | None:
    """The options with the least total damage whose total cost is within a budget; None where there are none.

    Args:
        costs: Per list those of its options, of either sign.
        damages: The same, at least 0.
        budget: Upper bound of the total cost.
        gap: Relative gap at which the solver stops.
        time_limit_s: Of the solver, seconds; the best that was found comes back, with the bound that was proven.

    Source: P. Sinha, A. Zoltners, "The Multiple-Choice Knapsack Problem", 1979; solved by HiGHS.
    """
    kept = [efficient(cost, damage) for cost, damage in zip(costs, damages, strict=True)]
    floor = np.array([cost[some[0]] for cost, some in zip(costs, kept, strict=True)])
    if floor.sum() > budget + 1e-12 * abs(budget):
        return None
    free = [int(some[-1]) for some in kept]
    if sum(float(cost[at]) for cost, at in zip(costs, free, strict=True)) <= budget:
        return _picked(costs, damages, free, None)
    lists = [(cost[some], damage[some]) for cost, damage, some in zip(costs, damages, kept, strict=True)]
    room, bound = budget, None
    for _ in range(_MOST_ROOMS):
        taken, proven = _solved(lists, room - float(floor.sum()), gap, time_limit_s)
        bound = proven if bound is None else bound
        if taken is None:
            break
        picked = _picked(costs, damages, [int(some[at]) for some, at in zip(kept, taken, strict=True)], bound)
        if picked.cost <= budget + _ROUNDING * abs(budget):
            return picked
        # The solver's tolerance is no excuse for a budget that is exceeded.
        room -= 2 * (picked.cost - budget)
    return _picked(costs, damages, [int(some[0]) for some in kept], bound)


def _solved(
    lists: Sequence[tuple[Floats, Floats]], left: float, gap: float, time_limit_s: float
) -> tuple[list[int] | None, float]:
    """Option of each list, or None, and a bound of the damage.

    Args:
        lists: Cost and damage of the options, by ascending cost.
        left: What may be spent beyond the cheapest option of each list.
        gap: Relative.
        time_limit_s: Seconds.
    """
    from scipy.optimize import Bounds, LinearConstraint
    from scipy.sparse import csr_array

    owners = np.repeat(np.arange(len(lists)), [len(cost) for cost, _ in lists])
    cost = np.concatenate([one - one[0] for one, _ in lists])
    damage = np.concatenate([one for _, one in lists])
    left = max(left, 0.0)
    unit, scale = max(left, 1e-300), max(float(damage.max()), 1e-300)
    choose = csr_array((np.ones(len(owners)), (owners, np.arange(len(owners)))), shape=(len(lists), len(owners)))
    found = solve(
        damage / scale,
        integrality=np.ones(len(owners)),
        bounds=Bounds(0, np.where(cost > left, 0, 1)),
        constraints=[
            LinearConstraint(choose, 1, 1),
            LinearConstraint((np.minimum(cost, 2 * left) / unit)[None], -np.inf, left / unit),
        ],
        options={"time_limit": time_limit_s, "mip_rel_gap": gap},
    )
    bound = 0.0 if found.mip_dual_bound is None else max(0.0, float(found.mip_dual_bound) * scale)
    if found.x is None:
        return None, bound
    return [int(np.argmax(found.x[owners == place])) for place in range(len(lists))], bound


def _picked(costs: Sequence[Floats], damages: Sequence[Floats], options: Sequence[int], bound: float | None) -> Picked:
    damage = sum(float(one[at]) for one, at in zip(damages, options, strict=True))
    cost = sum(float(one[at]) for one, at in zip(costs, options, strict=True))
    return Picked(tuple(options), cost, damage, damage if bound is None else min(bound, damage))
