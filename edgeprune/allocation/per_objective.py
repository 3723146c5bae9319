"""Least damage to the objective that suffers most, under one bound of the damage per objective, within a latency budget.

What is minimized is ``(1 - share) * max_t D_t / scale_t + share * sum_t weight_t * D_t / scale_t``, where the damage ``D_t`` of
objective ``t`` is the sum of its own curves. It is the program of `edgeprune.allocation.exact` with one more variable for the
largest; a bound of the damage of one objective is one more row, as any other budget is.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from edgeprune.allocation._base import Allocation, Cost, Damage, Rules, Widths, infeasible
from edgeprune.allocation.exact import Exact
from edgeprune.allocation.proving import Prepared
from edgeprune.allocation.tables import from_terms
from edgeprune.allocation.terms import CostTerm, Floats, Ints, Limit
from edgeprune.errors import BudgetInfeasibleError, ConfigError
from edgeprune.graph.forms import SizeForm

if TYPE_CHECKING:
    from edgeprune.graph.channel_graph import ChannelGroup

MEAN_SHARE = 0.05
"""What the mean counts, so that objectives that are not the worst are not given away."""


@dataclass(frozen=True)
class ObjectiveDamage:
    """What one objective loses by the widths.

    Attributes:
        name: Of the objective.
        curves: Group name to damage by width, shape (size + 1,).
        scale: The damage that counts as 1.
        at_most: Bound of the damage; infinite for none.
        worst: Whether the objective can be the worst; otherwise it counts in the mean alone.
        weight: In the mean; at least 0.
    """

    name: str
    curves: Damage
    scale: float
    at_most: float = math.inf
    worst: bool = True
    weight: float = 1.0

    def at(self, widths: Widths) -> float:
        """The damage at some widths; groups that are left out are dense."""
        return sum(float(self.curves[name][width]) for name, width in widths.items() if name in self.curves)


class _CurveCost:
    """The damage of one objective as a cost that states its terms."""

    def __init__(self, damage: ObjectiveDamage) -> None:
        self._damage = damage

    def value(self, widths: Widths) -> float:
        return self._damage.at(widths)

    def terms(self) -> list[CostTerm]:
        return [
            CostTerm((SizeForm(0, (((name,), 1),)),), _Lookup(np.asarray(curve, dtype=np.float64)))
            for name, curve in self._damage.curves.items()
        ]


@dataclass(frozen=True, eq=False)
class _Lookup:
    curve: Floats

    def __call__(self, width: Ints) -> Floats:
        found: Floats = self.curve[width]
        return found


class PerObjective(Exact):
    """The exact allocator with curves of its own per objective; the damage that it is given does not count.

    Args:
        damages: Of each objective.
        mean_share: What the weighted mean counts in what is minimized, in [0, 1]; the rest is the worst. 1: the mean alone.
        solver: Settings of the solver.

    Raises:
        ConfigError: No objective can be the worst, or a scale is not above 0.
    """

    name: ClassVar[str] = "exact per objective"

    def __init__(
        self, damages: Sequence[ObjectiveDamage], mean_share: float = MEAN_SHARE, solver: Exact | None = None
    ) -> None:
        super().__init__()
        self.settings = (solver or Exact()).settings
        if not 0 <= mean_share <= 1:
            raise ConfigError(f"mean_share must be a share in [0, 1], found {mean_share}.")
        wrong = [one.name for one in damages if not (one.scale > 0 and math.isfinite(one.scale))]
        if wrong or not any(one.worst for one in damages):
            found = f"others for {', '.join(wrong)}" if wrong else "none"
            raise ConfigError(
                f"damage per objective needs finite scales above 0 and an objective that can be the worst, found {found}."
            )
        self.damages, self.mean_share = tuple(damages), mean_share

    def allocate(
        self,
        groups: Sequence[ChannelGroup],
        damage: Damage,
        cost: Cost,
        budget_ms: float,
        rules: Rules | None = None,
        *,
        limits: Sequence[Limit] = (),
    ) -> Allocation:
        """See `Allocator.allocate`; `damage` is not read."""
        return self.prepare(groups, damage, cost, rules, limits).within(budget_ms)

    def prepare(
        self,
        groups: Sequence[ChannelGroup],
        damage: Damage,
        cost: Cost,
        rules: Rules | None = None,
        limits: Sequence[Limit] = (),
    ) -> BoundedDamages:
        """See `Allocator.prepare`; `damage` is not read."""
        return BoundedDamages(groups, cost, rules, limits, self)


class BoundedDamages(Prepared):
    """Tables and program for some damages, for any number of budgets.

    Args:
        groups: All channel groups of the model.
        cost: Latency by widths.
        rules: What widths must respect.
        limits: Further budgets.
        allocator: With the damages.

    Attributes:
        allocator: The same.
        bounds: The damages that have a bound, by objective.
    """

    def __init__(
        self,
        groups: Sequence[ChannelGroup],
        cost: Cost,
        rules: Rules | None,
        limits: Sequence[Limit],
        allocator: PerObjective,
    ) -> None:
        mean, worst = _weighed(allocator)
        super().__init__(groups, mean, cost, rules, limits, allocator.settings, worst)
        self._stated = (tuple(limits), self.limits, tuple(self.tables))
        self._bounded_by(allocator)

    def otherwise(self, allocator: PerObjective) -> BoundedDamages:
        """The same tables of latency for other damages of the same groups."""
        found = copy.copy(self)
        found.__dict__.pop("fastest", None)
        found._bounded_by(allocator)
        return found

    def _bounded_by(self, allocator: PerObjective) -> None:
        self.allocator = allocator
        mean, worst = _weighed(allocator)
        limits, apart, tables = self._stated
        self.bounds = {one.name: one for one in allocator.damages if math.isfinite(one.at_most)}
        bounding = [Limit(f"damage of {name}", _CurveCost(one), one.at_most) for name, one in self.bounds.items()]
        self.problem = self.problem.otherwise(mean, worst, (*limits, *bounding))
        self.limits = (*apart, *bounding)
        terms = [_CurveCost(one).terms() for one in self.bounds.values()]
        self.tables = [*tables, *from_terms(self.problem, self.nodes, terms, self.settings.most_buckets)]
        self._damaged()

    def within(self, budget_ms: float, known: Sequence[tuple[int, ...]] = ()) -> Allocation:
        """See `Prepared.within`.

        Raises:
            BudgetInfeasibleError: No candidate widths meet the latency, or none under all bounds; then `best_ms` is the smallest
                latency that was found under them.
        """
        try:
            return super().within(budget_ms, known)
        except BudgetInfeasibleError:
            if not self.bounds:
                raise
            fastest = self.fastest_bounded()
            if fastest is None:
                raise
            widths, least_ms = fastest
            if least_ms <= budget_ms:
                raise
            raise infeasible(self.cost, widths, least_ms, budget_ms) from None

    def fastest_bounded(self, left_out: str | None = None) -> tuple[Mapping[str, int], float] | None:
        """The widths with the smallest latency that keep all bounds and further budgets, and that latency in milliseconds.

        Args:
            left_out: An objective whose bound does not count.

        Returns:
            None where no widths were found that keep them.
        """
        limits = np.array([np.inf, *(limit.at_most for limit in self.limits)])
        for place, limit in enumerate(self.limits):
            if left_out is not None and limit.name == f"damage of {left_out}":
                limits[1 + place] = np.inf
        vector, constant = self.program.costs[0]
        unit = max(1e-300, float(np.abs(vector).max(initial=0.0)))
        solved = self.program.solve(
            limits.tolist(),
            seconds=self.settings.time_limit_s,
            gap=1e-4,
            objective=vector,
            offset=constant,
            scale=unit,
        )
        states = [self.problem.dense]
        if solved.state is not None:
            states.append(self._state(solved.state))
        kept = [state for state in states if (self._costs(state)[1:] <= limits[1:] * (1 + 1e-9)).all()]
        if not kept:
            return None
        best = min(kept, key=self.problem.ms)
        return self.problem.widths(best), self.problem.ms(best)

    def binding(self) -> str | None:
        """The objective without whose bound the smallest latency falls most; None where none makes a difference."""
        found = {name: self.fastest_bounded(name) for name in self.bounds}
        held = self.fastest_bounded()
        reached = {name: one[1] for name, one in found.items() if one is not None}
        if not reached:
            return None
        name = min(reached, key=lambda one: reached[one])
        return name if held is None or reached[name] < held[1] * (1 - 1e-9) else None


def _weighed(allocator: PerObjective) -> tuple[dict[str, Floats], list[dict[str, Floats]]]:
    """What is added up, and what the largest is taken of."""
    damages, share = allocator.damages, allocator.mean_share
    weights = sum(one.weight for one in damages) or 1.0
    mean = _scaled([(share * one.weight / weights / one.scale, one.curves) for one in damages])
    return mean, [_scaled([((1 - share) / one.scale, one.curves)]) for one in damages if one.worst]


def _scaled(parts: Sequence[tuple[float, Damage]]) -> dict[str, Floats]:
    """Curves times factors, added up by group."""
    found: dict[str, Floats] = {}
    for factor, curves in parts:
        for name, curve in curves.items():
            found[name] = found.get(name, np.zeros(len(curve))) + factor * np.asarray(curve, dtype=np.float64)
    return found
