"""Least damage within one or several budgets, with a bound that says how far from the least it can be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from edgeprune.allocation._base import Allocation, Allocator, Cost, Damage, Rules
from edgeprune.allocation.proving import Prepared, Settings
from edgeprune.allocation.tables import MOST_BUCKETS
from edgeprune.allocation.terms import Limit
from edgeprune.errors import ConfigError

if TYPE_CHECKING:
    from edgeprune.graph.channel_graph import ChannelGroup


class Exact(Allocator):
    """A mixed-integer linear program over candidate widths, solved by HiGHS to a proven gap.

    The cost becomes tables over the candidates of one or two decisions, or over sums and products of several
    (`edgeprune.allocation.tables`); a cost that states its terms is taken at its word, any other is taken apart by looking it
    up (`edgeprune.allocation.decompose`). Whatever the tables say, a plan counts only when the cost itself says that it meets
    every budget: where it does not, the tables are shifted by what they were wrong at that plan, and solved again.

    `Certificate.bound` is the solver's dual bound. It holds among the candidate widths, for the tables; `table_error` and
    `note` say how far those are from the cost.

    Args:
        gap: Relative gap at which to stop.
        time_limit_s: Time for the solver, seconds, over all solves of one budget; the tables come on top. The best that was
            found comes back.
        corrections: How often the tables are shifted at most.
        max_variables: Programs with more columns are solved in blocks of decisions, with the bound of the linear
            relaxation.
        max_evaluations: Latencies that may be looked up at the end, where tables are not the cost itself: for single widths
            that are raised and traded, and for all states that could be better where there are few; 0 leaves it out.
        most_buckets: Most ranges of a sum over three or more decisions; more are tighter and slower.
    """

    name: ClassVar[str] = "exact"
    keeps_limits: ClassVar[bool] = True

    def __init__(
        self,
        gap: float = 0.001,
        time_limit_s: float = 30.0,
        corrections: int = 4,
        max_variables: int = 200_000,
        max_evaluations: int = 1_000,
        most_buckets: int = MOST_BUCKETS,
    ) -> None:
        if not 0 <= gap < 1:
            raise ConfigError(f"gap must be a share in [0, 1), found {gap}.")
        if time_limit_s <= 0:
            raise ConfigError(f"time_limit_s must be greater than 0 s, found {time_limit_s}.")
        for what, number, least in (
            ("corrections", corrections, 0),
            ("max_variables", max_variables, 1),
            ("max_evaluations", max_evaluations, 0),
            ("most_buckets", most_buckets, 2),
        ):
            if number < least:
                raise ConfigError(f"{what} must be at least {least}, found {number}.")
        self.settings = Settings(gap, time_limit_s, corrections, max_variables, max_evaluations, most_buckets)

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
        """See `Allocator.allocate`.

        Args:
            groups: All channel groups of the model.
            damage: Damage curve of each group that is not frozen.
            cost: Latency by widths.
            budget_ms: Upper bound of the latency, milliseconds.
            rules: What widths must respect, by group name.
            limits: Further budgets, which hold at the same time.

        Raises:
            BudgetInfeasibleError: No candidate widths meet a budget, or all of them at once.
            ConstraintError: Rules contradict each other.
        """
        return Prepared(groups, damage, cost, rules, limits, self.settings).within(budget_ms)

    def prepare(
        self,
        groups: Sequence[ChannelGroup],
        damage: Damage,
        cost: Cost,
        rules: Rules | None = None,
        limits: Sequence[Limit] = (),
    ) -> Prepared:
        """See `Allocator.prepare`: one set of tables serves all budgets."""
        return Prepared(groups, damage, cost, rules, limits, self.settings)

    def front(
        self,
        groups: Sequence[ChannelGroup],
        damage: Damage,
        cost: Cost,
        budgets_ms: Sequence[float] | int = 20,
        rules: Rules | None = None,
        *,
        limits: Sequence[Limit] = (),
    ) -> list[Allocation]:
        """The Pareto front of damage and latency: one allocation per budget, on one set of tables.

        A plan for a smaller budget meets every larger one, so none has more damage than its neighbor below.

        Args:
            groups: All channel groups of the model.
            damage: Damage curve of each group that is not frozen.
            cost: Latency by widths.
            budgets_ms: Latency budgets, milliseconds; a number stands for so many, evenly from the smallest reachable
                latency to the dense one.
            rules: What widths must respect, by group name.
            limits: Further budgets, which hold for every point.

        Returns:
            One allocation per budget, in the order of the budgets.

        Raises:
            BudgetInfeasibleError: A budget is out of reach.
        """
        return Prepared(groups, damage, cost, rules, limits, self.settings).front(budgets_ms)
