"""The errors for budgets besides the latency, and for several that cannot hold at once."""

from __future__ import annotations

import math

from edgeprune.allocation._base import ExplainsFloor, rounded_up_ms
from edgeprune.allocation.problem import Problem, State
from edgeprune.allocation.terms import Limit
from edgeprune.errors import BudgetInfeasibleError


def limit_infeasible(problem: Problem, limit: Limit, smallest: State) -> BudgetInfeasibleError:
    """The error for one limit that no widths meet.

    Args:
        problem: Decisions and candidates.
        limit: Which.
        smallest: The widths with the smallest value that was found.
    """
    widths = problem.widths(smallest)
    value = limit.cost.value(widths)
    reason = f" ({limit.cost.held_by(widths)})" if isinstance(limit.cost, ExplainsFloor) else ""
    least = f"{math.ceil(value)}" if limit.unit in ("", "bytes") else rounded_up_ms(value)
    return BudgetInfeasibleError(
        f"{limit.name} must be <= {_with_unit(limit.at_most, limit)}, the smallest plan found has "
        f"{_with_unit(value, limit)}{reason}.",
        best_ms=problem.ms(smallest),
        widths=widths,
        hint=limit.option.format(least) if limit.option else f"a budget of at least {_with_unit(value, limit)}",
    )


def together_infeasible(problem: Problem, budget_ms: float, smallest: State) -> BudgetInfeasibleError:
    """The error for budgets each of which can be met, but not all at once.

    Args:
        problem: Decisions and candidates.
        budget_ms: Latency budget, milliseconds.
        smallest: Widths to report the values of.
    """
    widths = problem.widths(smallest)
    values = [f"{problem.ms(smallest):.4g} ms"]
    values += [f"{limit.name} {_with_unit(limit.cost.value(widths), limit)}" for limit in problem.limits]
    wanted = [f"{budget_ms:.4g} ms", *(f"{limit.name} {_with_unit(limit.at_most, limit)}" for limit in problem.limits)]
    return BudgetInfeasibleError(
        f"all budgets must hold at once ({', '.join(wanted)}), no plan was found that meets them; the smallest widths have "
        f"{', '.join(values)}.",
        best_ms=problem.ms(smallest),
        widths=widths,
        hint="raise one of the budgets",
    )


def _with_unit(value: float, limit: Limit) -> str:
    if limit.unit in ("", "bytes"):
        return f"{value:,.0f} {limit.unit}".rstrip()
    return f"{value:.4g} {limit.unit}"
