"""One problem made ready: tables, program and search, and the way from a budget to an allocation with its certificate."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from edgeprune.allocation._base import Allocation, Certificate, Cost, Damage, Rules, infeasible
from edgeprune.allocation.decompose import SAME, TRIALS, decompose
from edgeprune.allocation.descent import Descent
from edgeprune.allocation.enumeration import enumerate_better
from edgeprune.allocation.infeasibility import limit_infeasible, together_infeasible
from edgeprune.allocation.nodes import Nodes
from edgeprune.allocation.problem import Problem, State
from edgeprune.allocation.program import Program, Solved
from edgeprune.allocation.refinement import refine
from edgeprune.allocation.tables import MOST_BUCKETS, CostTable, from_terms
from edgeprune.allocation.terms import CostTerm, Floats, Ints, Limit, StatesTerms

if TYPE_CHECKING:
    from edgeprune.graph.channel_graph import ChannelGroup

_FIRST = 0.7
"""Share of the time that the first solve may take; the rest is for solves of shifted tables."""
_ROUNDING = 1e-6
"""Relative excess that the solver's tolerances let through: such a plan is ruled out by itself."""
_RULED_OUT = 20


@dataclass(frozen=True)
class Settings:
    """See `edgeprune.allocation.exact.Exact`."""

    gap: float = 0.001
    time_limit_s: float = 30.0
    corrections: int = 4
    max_variables: int = 200_000
    max_evaluations: int = 1_000
    most_buckets: int = MOST_BUCKETS


@dataclass
class _Found:
    """What is known about one budget so far.

    Attributes:
        state: The best within the budgets by the cost itself.
        bound: Of the solve that it comes from.
        finished: Whether that reached its gap.
        shift: By how much of the budget the tables had been shifted for it.
        in_blocks: Whether that was solved in blocks.
        rescued: Whether the tables led to no plan, and the fastest one stands in.
    """

    state: State
    bound: float
    finished: bool
    shift: float
    in_blocks: bool = False
    rescued: bool = False


def tabulated(
    problem: Problem, cost: Cost, nodes: Nodes, limits: Sequence[Limit] = (), most_buckets: int = MOST_BUCKETS
) -> tuple[list[CostTable], float, int]:
    """Tables of a latency and of further costs: from the terms that they state, found by looking it up where there are none.

    Returns:
        The tables, the latency's first, the largest relative difference from a cost that was found, and how often costs were
        looked up.
    """
    error, lookups = 0.0, 0
    tables: list[CostTable | None] = []
    stated: list[Sequence[CostTerm]] = []
    for one in (cost, *(limit.cost for limit in limits)):
        if isinstance(one, StatesTerms):
            stated.append(one.terms())
            tables.append(None)
        else:
            found = decompose(problem, one, nodes)  # type: ignore[arg-type]
            error, lookups = max(error, found.error), lookups + found.lookups
            tables.append(found.table)
    rest = iter(from_terms(problem, nodes, stated, most_buckets))
    return [next(rest) if table is None else table for table in tables], error, lookups


class Prepared:
    """Tables and program of one problem, for any number of budgets.

    Args:
        groups: All channel groups of the model.
        damage: Damage curves.
        cost: Latency by widths.
        rules: What widths must respect.
        limits: Further budgets.
        settings: See `Exact`.
        worst: Further sets of damage curves; the largest of their sums is added to the damage.
    """

    def __init__(
        self,
        groups: Sequence[ChannelGroup],
        damage: Damage,
        cost: Cost,
        rules: Rules | None,
        limits: Sequence[Limit],
        settings: Settings,
        worst: Sequence[Damage] = (),
    ) -> None:
        self.problem = Problem(groups, damage, cost, rules, limits, worst)
        self.cost, self.settings = cost, settings
        self.limits = tuple(one for limit in limits for one in limit.apart())
        self.nodes = Nodes(self.problem.candidates)
        self.tables, self.error, self.lookups = tabulated(
            self.problem, cost, self.nodes, self.limits, settings.most_buckets
        )
        self._damaged()

    def _damaged(self) -> None:
        """Program and quick search for the damages of the problem, and the tables."""
        self.damages = [self.problem.damages(index) for index in range(len(self.problem.choices))]
        further = self.problem.worst()
        self.program = Program(self.nodes.all, self.damages, self.tables, further)
        self.descent = Descent(self.nodes.all, self.damages, self.tables, further)

    @property
    def exact(self) -> bool:
        """Whether no difference between the tables and the costs is known."""
        return self.error <= SAME and all(table.lossless for table in self.tables)

    def within(self, budget_ms: float, known: Sequence[State] = ()) -> Allocation:
        """The allocation for one budget.

        Args:
            budget_ms: Upper bound of the latency, milliseconds.
            known: States that may serve where the solver finds nothing better.

        Raises:
            BudgetInfeasibleError: No candidate widths meet a budget, or all of them at once.
        """
        until = time.monotonic() + self.settings.time_limit_s
        dense = self.problem.dense
        if self.problem.fitting([dense], budget_ms):
            return self._allocation(_Found(dense, 0.0, True, 0.0), budget_ms, "the dense widths meet the budget.")
        found = self._search(budget_ms, until) or self._rescued(budget_ms, until)
        fitting = self.problem.fitting(list(known), budget_ms)
        better = min([found.state, *fitting], key=self.problem.damage)
        # Within the gap by tables that are the cost itself there is next to nothing to gain.
        if self.settings.max_evaluations and not (self.exact and found.finished and not found.rescued):
            most = self.problem.evaluations + self.settings.max_evaluations
            better = refine(self.problem, better, budget_ms, most)
            error = max(self.error, self._off(better))
            better = enumerate_better(self.problem, self.tables[0], better, budget_ms, error, most)
        return self._allocation(replace(found, state=better), budget_ms)

    def front(self, budgets_ms: Sequence[float] | int) -> list[Allocation]:
        """One allocation per budget, in the order of the budgets.

        Raises:
            BudgetInfeasibleError: A budget is out of reach.
        """
        if isinstance(budgets_ms, int):
            ends = (self.problem.ms(self.fastest), self.problem.ms(self.problem.dense))
            every = [float(budget_ms) for budget_ms in np.linspace(*ends, budgets_ms)]
        else:
            every = list(budgets_ms)
        order = sorted(range(len(every)), key=lambda place: every[place])
        found: dict[int, Allocation] = {}
        known: list[State] = []
        for place in order:
            found[place] = self.within(every[place], known[-1:])
            known.append(tuple(found[place].widths[choice.groups[0]] for choice in self.problem.choices))
        return [self._lifted(found, order, place) for place in range(len(every))]

    @cached_property
    def fastest(self) -> State:
        """The state with the smallest latency that is known, limits aside."""
        solved = self.program.least(0, seconds=self.settings.time_limit_s)
        states = [tuple(widths[-1] for widths in self.problem.candidates)]
        if solved.state is not None:
            states.append(self._state(solved.state))
        return min(states, key=self.problem.ms)

    def _lifted(self, found: dict[int, Allocation], order: Sequence[int], place: int) -> Allocation:
        """What is out of reach within a larger budget is out of reach within a smaller one too: the best bound counts."""
        allocation = found[place]
        bound = allocation.certificate.bound
        if self.error > SAME or bound is None:
            return allocation
        larger = [found[other].certificate.bound or 0.0 for other in order[order.index(place) :]]
        bound = min(max(bound, *larger), allocation.certificate.damage)
        return replace(allocation, certificate=replace(allocation.certificate, bound=bound))

    def _search(self, budget_ms: float, until: float) -> _Found | None:
        """Solve, look the plan up, shift the tables by what they were wrong there, and solve again."""
        limits = np.array([budget_ms, *(limit.at_most for limit in self.limits)])
        target, best = limits.copy(), None
        forbidden: list[Ints] = []
        seen: set[State] = set()
        shifts, lowest = 0, np.inf
        while True:
            share = _FIRST if not shifts else 1.0
            solved = self._solve(target, forbidden, share * (until - time.monotonic()))
            if solved.state is None:
                return best
            state = self._state(solved.state)
            true, said = self._costs(state), self.descent.costs(solved.state)
            lowest = min(lowest, solved.bound)
            # Terms are never overestimated: what was proven before they were shifted is true, what came after is not.
            shifted_terms = (target[1:] != limits[1:]).any() or self.error <= SAME
            bound = lowest if shifted_terms else solved.bound
            if (true <= limits).all():
                shift = float(limits[0] - target[0]) / budget_ms
                if best is None or self.problem.damage(state) < self.problem.damage(best.state):
                    best = _Found(state, bound, solved.finished, shift, solved.in_blocks)
            off = np.abs(true - said) > SAME * np.abs(true)
            if not off.any():
                if best is not None or len(forbidden) >= _RULED_OUT:
                    return best
                # Equal to the tables and yet above a limit: the solver's tolerance let it through.
                forbidden.append(solved.state)
                if ((true - limits) / np.maximum(np.abs(limits), 1e-300)).max() > _ROUNDING:
                    target = target - np.maximum(true - limits, 0.0)
                continue
            if shifts >= self.settings.corrections or time.monotonic() >= until or state in seen:
                return best
            seen.add(state)
            shifts += 1
            target = limits - (true - said)

    def _solve(self, limits: Floats, forbidden: Sequence[Ints], seconds: float) -> Solved:
        """The least damage by the tables.

        A quick search makes a state, the linear relaxation a bound; often they are within the gap. Where not, what cannot
        be part of a better state (its reduced cost alone makes up the difference) is left out, and the rest is solved.
        """
        until = time.monotonic() + max(0.01, seconds)
        start = self.descent.start(limits)
        if any(start is not None and (start == state).all() for state in forbidden):
            start = None
        scale = (self._largest() if start is None else max(1e-300, self.descent.damage(start))) / 100
        relaxed = self.program.relax(limits.tolist(), seconds=seconds, scale=scale)
        if not relaxed.feasible:
            return Solved(None, np.inf, False, True)
        open_ = np.ones(self.program.variables, dtype=bool)
        if start is None:
            threshold = np.inf
        else:
            threshold = self.descent.damage(start) * (1 - self.settings.gap)
            if relaxed.bound >= threshold:
                return Solved(start, relaxed.bound, True, True)
            if len(relaxed.reduced):
                open_ = relaxed.bound + relaxed.reduced <= threshold + _ROUNDING * scale
            if int(open_.sum()) > self.settings.max_variables:
                state = self.descent.in_blocks(self.program, start, limits, until, self.settings.gap)
                finished = relaxed.bound >= self.descent.damage(state) * (1 - self.settings.gap)
                return Solved(state, relaxed.bound, True, finished, in_blocks=True)
        solved = self.program.solve(
            limits.tolist(),
            seconds=until - time.monotonic(),
            gap=self.settings.gap,
            open_=open_,
            forbidden=forbidden,
            scale=scale,
        )
        if start is None:
            return replace(solved, bound=max(solved.bound, relaxed.bound))
        bound = max(relaxed.bound, min(threshold, solved.bound if solved.feasible else np.inf))
        if solved.state is None or self.descent.damage(start) <= self.descent.damage(solved.state):
            return Solved(start, bound, True, solved.finished)
        return replace(solved, bound=bound)

    def _rescued(self, budget_ms: float, until: float) -> _Found:
        """A plan where the tables lead to none: the fastest, refined by the cost itself; or the reason why there is none."""
        floor = tuple(widths[-1] for widths in self.problem.candidates)
        fitting = self.problem.fitting([self.fastest, floor], budget_ms)
        if fitting:
            best = min(fitting, key=self.problem.damage)
            return _Found(best, -np.inf, time.monotonic() < until, 0.0, rescued=True)
        least = self.fastest
        if self.problem.ms(least) > budget_ms:
            raise infeasible(self.cost, self.problem.widths(least), self.problem.ms(least), budget_ms)
        for limit in self.problem.limits:
            states = [floor]
            if limit in self.limits:
                seconds = max(1.0, until - time.monotonic())
                solved = self.program.least(1 + self.limits.index(limit), seconds=seconds)
                states += [] if solved.state is None else [self._state(solved.state)]
            # The largest of several sums is least where all widths are: no sum falls where a width grows.
            values = [limit.cost.value(self.problem.widths(state)) for state in states]
            if min(values) > limit.at_most:
                raise limit_infeasible(self.problem, limit, states[values.index(min(values))])
        raise together_infeasible(self.problem, budget_ms, floor)

    def _largest(self) -> float:
        return max(1e-300, float(sum(curve.max() for curve in self.descent.damages)))

    def _state(self, options: Ints) -> State:
        return tuple(widths[option] for widths, option in zip(self.problem.candidates, options, strict=True))

    def _costs(self, state: State) -> Floats:
        widths = self.problem.widths(state)
        return np.array([self.problem.ms(state), *(limit.cost.value(widths) for limit in self.limits)])

    def _off(self, state: State) -> float:
        """By what share the table of the latency is wrong at a state."""
        options = [widths.index(width) for widths, width in zip(self.problem.candidates, state, strict=True)]
        said, true = float(self.tables[0].total(np.array([options]))[0]), self.problem.ms(state)
        return abs(said / true - 1) if true > 0 else 0.0

    def _allocation(self, found: _Found, budget_ms: float, note: str = "") -> Allocation:
        damage = self.problem.damage(found.state)
        predicted_ms, off = self.problem.ms(found.state), self._off(found.state)
        exact = self.error <= SAME and off <= SAME
        # Damage is never negative, whatever the solver proved.
        proven = max(0.0, found.bound)
        contradicted = proven > damage and not exact and proven - damage > _ROUNDING * proven
        bound = None if contradicted else min(proven, damage)
        certificate = Certificate(
            method="exact",
            budget_ms=budget_ms,
            predicted_ms=predicted_ms,
            damage=damage,
            bound=bound,
            evaluations=self.problem.evaluations + self.lookups,
            note=note or self._note(found, bound, exact, off),
            table_error=0.0 if exact else max(off, self.error),
        )
        return Allocation(self.problem.widths(found.state), certificate)

    def _note(self, found: _Found, bound: float | None, exact: bool, off: float) -> str:
        if isinstance(self.cost, StatesTerms) and self.error <= SAME:
            note = "the bound is proven among the candidate widths."
            if not self.exact:
                note = "the bound is proven among the candidate widths, with ranges of sums at their lowest cost."
        elif exact:
            note = (
                "the bound is proven among the candidate widths, with tables that equal the cost model at this plan and at "
                f"{TRIALS} random ones."
            )
        elif bound is None:
            note = f"no bound: the plan is better than what tables {off:.1%} off at it take to be possible."
        else:
            shifted = f", shifted by {found.shift:+.1%} of the budget," if abs(found.shift) >= 5e-4 else ""
            note = (
                f"the bound is that of tables{shifted} that differ from the cost model by {off:.1%} at this plan and by up to "
                f"{self.error:.1%} at {TRIALS} random ones."
            )
        if found.rescued:
            return f"{note} The tables led to no plan within the budget: the fastest one was refined."
        if found.in_blocks:
            return f"{note} The program was too large for one solve: solved in blocks, bound of the linear relaxation."
        if not found.finished:
            return f"{note} The time limit of {self.settings.time_limit_s:g} s ended the search."
        return note
