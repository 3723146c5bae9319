"""Small improvements of widths by the true cost: raise one, or raise one and lower another."""

from __future__ import annotations

from collections.abc import Sequence

from edgeprune.allocation.problem import Problem, State, moved

VERIFIED_AT_ONCE = 24


def refine(problem: Problem, state: State, budget_ms: float, max_evaluations: int) -> State:
    """Raise widths while the budgets hold, and trade one width against another, until nothing helps.

    Args:
        problem: With its further limits, which hold throughout.
        state: Within the budgets.
        budget_ms: Latency budget, milliseconds.
        max_evaluations: It ends when so many different states have been looked up in all.

    Returns:
        A state within the budgets, of at most the damage of the first.
    """
    while problem.evaluations < max_evaluations:
        better = _refill(problem, state, budget_ms) or _swap(problem, state, budget_ms)
        if better is None:
            break
        state = better
    return state


def moves_down(problem: Problem, state: State) -> list[tuple[int, int]]:
    """(decision, width) of every single step to a smaller candidate."""
    return [(index, width) for index in problem.movable for width in problem.candidates[index] if width < state[index]]


def less_damaging(problem: Problem, best: State | None, others: Sequence[State]) -> State | None:
    """The one with the least damage; None where there is none."""
    return min([*([] if best is None else [best]), *others], key=problem.damage, default=None)


def _refill(problem: Problem, state: State, budget_ms: float) -> State | None:
    """Raise one width: the largest relief that fits, or None."""
    raised = [up for up in _moves_up(problem, state) if problem.damage(up) < problem.damage(state)]
    return less_damaging(problem, None, problem.fitting(raised, budget_ms))


def _swap(problem: Problem, state: State, budget_ms: float) -> State | None:
    """Raise one width and lower another for less damage in all: the best trade that fits, or None."""
    now, before = problem.ms(state), problem.damage(state)
    raised = _moves_up(problem, state)
    lowered = [moved(state, *move) for move in moves_down(problem, state)]
    more = problem.many_ms(raised) - now
    saved = problem.many_ms(lowered) - now
    trades = []
    for up, added_ms in zip(raised, more, strict=True):
        index = _changed(state, up)
        relief = before - problem.damage(up)
        for down, saved_ms in zip(lowered, saved, strict=True):
            other = _changed(state, down)
            gain = relief - (problem.damage(down) - before)
            # The two changes interact, so their sum only sorts out what is far off; what is left is looked up.
            if other != index and gain > 1e-12 and now + added_ms + saved_ms <= budget_ms * 1.02:
                trades.append((-gain, moved(up, other, down[other])))
    trades.sort()
    for start in range(0, min(len(trades), 8 * VERIFIED_AT_ONCE), VERIFIED_AT_ONCE):
        some = [trade for _, trade in trades[start : start + VERIFIED_AT_ONCE]]
        # Of the worst of several damages, changes do not add up either.
        less = [trade for trade in some if problem.damage(trade) < before - 1e-12]
        fitting = problem.fitting(less, budget_ms)
        if fitting:
            return fitting[0]
    return None


def _moves_up(problem: Problem, state: State) -> list[State]:
    return [
        moved(state, index, width)
        for index in problem.movable
        for width in problem.candidates[index]
        if width > state[index]
    ]


def _changed(state: State, other: State) -> int:
    return next(index for index, (one, two) in enumerate(zip(state, other, strict=True)) if one != two)
