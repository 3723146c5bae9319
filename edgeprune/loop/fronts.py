"""A Pareto front each point of which is priced at about its own latency.

What a kernel pays for its weights among others depends on how long the network takes (`edgeprune.latency.calibration`), while
solvers need prices that add up, which hold for networks of one length. So the range of latencies is cut into bands in which that
makes little difference, the budgets of each band are solved with the prices of its slowest networks, and what was found in all
of them is then looked at as what it is: each plan priced at its own length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from edgeprune.allocation._base import Allocation, Ready
from edgeprune.errors import BudgetInfeasibleError

if TYPE_CHECKING:
    from edgeprune.allocation.cost import CostModel

WIDTH = 0.02
"""Share of the dense latency by which prices may differ inside a band."""

_SHORTEST = 0.01
"""No plan is shorter than this share of the dense model."""
_HALVINGS = 20
_TURNS = 3
"""How often the smallest latency is looked for with the prices of the one before."""
_SAME = 1e-9


@dataclass(frozen=True)
class _Point:
    """An allocation, and its latency at its own length, milliseconds."""

    allocation: Allocation
    ms: float

    @property
    def damage(self) -> float:
        return self.allocation.certificate.damage


@dataclass(frozen=True)
class _Asked:
    """What the prices of a band came to for one budget: an allocation, or None where they put the budget out of reach."""

    priced: CostModel
    allocation: Allocation | None


def front_by_bands(
    cost: CostModel, prepare: Callable[[CostModel], Ready], points: int, width: float = WIDTH
) -> list[Allocation]:
    """Allocations along the front of damage and latency, from the fastest to the dense one.

    Each has more latency and less damage than the one before. `Certificate.predicted_ms` is that of the plan at its own length,
    at most `Certificate.budget_ms`. The bound is proven for the prices of a band; by how much they are off at the plan is part
    of `Certificate.table_error`, and the note says so. Where a plan is better than what those prices take to be possible there
    is no bound.

    Args:
        cost: Latency by widths, priced at the length of the dense model. Where what weights cost does not depend on the length
            of a network there is one band.
        prepare: Makes the problem ready with some prices.
        points: Number of budgets, evenly from the smallest latency that was found to the dense one; an allocation that is the
            best at several of them is there once.
        width: Share of the dense latency by which prices may differ inside a band.

    Raises:
        BudgetInfeasibleError: Budgets besides the latency are out of reach.
    """
    dense_ms, ready = cost.dense_ms, prepare(cost)
    if abs(_dense_priced(cost, _SHORTEST * dense_ms) - dense_ms) <= _SAME * dense_ms:
        return _distinct(ready.front(points))
    found = _fastest(cost, prepare, ready)
    smallest_ms = min(point.ms for point in found)
    budgets = [float(budget_ms) for budget_ms in np.linspace(smallest_ms, dense_ms, points)]
    asked: dict[float, _Asked] = {}
    lengths = _bands(cost, smallest_ms, width * dense_ms)
    for about_ms, faster_ms in zip(lengths, (*lengths[1:], 0.0), strict=True):
        mine = [budget_ms for budget_ms in budgets if faster_ms < budget_ms <= about_ms]
        if not mine:
            continue
        priced = cost if about_ms == dense_ms else cost.about(about_ms)
        problem = ready if priced is cost else prepare(priced)
        reached = _reached(problem, mine)
        asked |= {budget_ms: _Asked(priced, reached.get(budget_ms)) for budget_ms in mine}
        found += [_point(cost, allocation) for allocation in reached.values()]
    return _distinct([_best(found, budget_ms, asked[budget_ms]) for budget_ms in budgets])


def _dense_priced(cost: CostModel, about_ms: float) -> float:
    """What the dense model would take at the prices of another length: how much the length matters."""
    return cost.about(about_ms).dense_ms


def _fastest(cost: CostModel, prepare: Callable[[CostModel], Ready], ready: Ready) -> list[_Point]:
    """The fastest allocations at the prices of the dense model, and at their own."""
    found = [_point(cost, ready.front(2)[0])]
    for _ in range(_TURNS):
        best_ms = min(point.ms for point in found)
        found.append(_point(cost, prepare(cost.about(best_ms)).front(2)[0]))
        if found[-1].ms >= best_ms * (1 - WIDTH / 10):
            break
    return found


def _bands(cost: CostModel, smallest_ms: float, step_ms: float) -> list[float]:
    """Latencies of the slowest networks of each band, descending from the dense one.

    What the dense model would take differs by at most `step_ms` between the prices of the slowest and the fastest of a band.
    """
    found = [cost.dense_ms]
    while (here_ms := _dense_priced(cost, found[-1])) - _dense_priced(cost, smallest_ms) > step_ms:
        low, high = smallest_ms, found[-1]
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            if here_ms - _dense_priced(cost, middle) > step_ms:
                low = middle
            else:
                high = middle
        found.append(high)
    return found


def _reached(problem: Ready, budgets_ms: Sequence[float]) -> dict[float, Allocation]:
    """Allocations by budget, for ascending ones; without those that the prices of a band put out of reach."""
    for start in range(len(budgets_ms)):
        within = budgets_ms[start:]
        try:
            return dict(zip(within, problem.front(within), strict=True))
        except BudgetInfeasibleError:
            continue
    return {}


def _point(cost: CostModel, allocation: Allocation) -> _Point:
    return _Point(allocation, cost.as_long_as(allocation.widths).ms(allocation.widths))


def _best(found: Sequence[_Point], budget_ms: float, asked: _Asked) -> Allocation:
    """The least damage within a budget of all that was found, with what is proven for the budget."""
    fitting = [point for point in found if point.ms <= budget_ms]
    point = min(fitting, key=lambda one: (one.damage, one.ms))
    own = point.allocation.certificate
    known = own if asked.allocation is None else asked.allocation.certificate
    bound, note, error = known.bound, known.note, known.table_error
    if asked.allocation is None and bound is not None:
        bound, note = None, "no bound: the prices of its band put the budget out of reach."
    elif bound is not None and bound > point.damage * (1 + _SAME):
        bound, note = None, "no bound: the plan is better than what the prices of its band take to be possible."
    priced_ms = asked.priced.ms(point.allocation.widths)
    off = abs(priced_ms / point.ms - 1)
    if error is not None and off > _SAME:
        error = max(error, off)
        note = f"{note} The prices of its band have the plan at {priced_ms:.4g} ms instead of {point.ms:.4g} ms."
    certificate = replace(
        own,
        budget_ms=budget_ms,
        predicted_ms=point.ms,
        bound=bound if bound is None else min(bound, point.damage),
        table_error=error,
        note=note,
    )
    return Allocation(point.allocation.widths, certificate)


def _distinct(every: Sequence[Allocation]) -> list[Allocation]:
    """Each once, where it is first the best."""
    found: dict[tuple[int, ...], Allocation] = {}
    for allocation in every:
        found.setdefault(tuple(allocation.widths.values()), allocation)
    return list(found.values())
