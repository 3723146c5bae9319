"""Where tables are not the cost itself: all states of a small problem that could be better, by the cost itself."""

from __future__ import annotations

import math

import numpy as np

from edgeprune.allocation.problem import Problem, State
from edgeprune.allocation.refinement import VERIFIED_AT_ONCE
from edgeprune.allocation.tables import CostTable

MOST_STATES = 50_000
"""Problems with more states are not enumerated."""
_MARGIN = 2.0
"""How many times the largest known difference between table and cost a state may be above the budget by the table."""


def enumerate_better(
    problem: Problem, table: CostTable, state: State, budget_ms: float, table_error: float, max_evaluations: int
) -> State:
    """The least damage within the budgets among all states, as far as a table does not put them clearly above the budget.

    States are looked up by ascending damage, so the first that fits ends it.

    Args:
        problem: With its further limits, which hold.
        table: Of the latency; sorts out what is far off.
        state: Within the budgets: only what has less damage is looked up.
        budget_ms: Latency budget, milliseconds.
        table_error: Largest relative difference between table and latency that is known.
        max_evaluations: It ends when so many different states have been looked up in all.

    Returns:
        A state within the budgets, of at most the damage of the first; `state` itself for problems of more than `MOST_STATES`.
    """
    counts = [len(widths) for widths in problem.candidates]
    if math.prod(counts) > MOST_STATES:
        return state
    options = np.indices(counts).reshape(len(counts), -1).T
    damages = problem.damages_at(options)
    open_ = np.flatnonzero(damages < problem.damage(state) * (1 - 1e-12))
    open_ = open_[table.total(options[open_]) <= budget_ms * (1 + _MARGIN * table_error)]
    open_ = open_[np.argsort(damages[open_], kind="stable")]
    for start in range(0, len(open_), VERIFIED_AT_ONCE):
        if problem.evaluations >= max_evaluations:
            break
        rows = options[open_[start : start + VERIFIED_AT_ONCE]]
        states = [
            tuple(widths[option] for widths, option in zip(problem.candidates, row, strict=True))
            for row in rows.tolist()
        ]
        if fitting := problem.fitting(states, budget_ms):
            return fitting[0]
    return state
