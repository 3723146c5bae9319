"""Greedy descent from the dense widths, then repair: fast, good, and without a proof of how good."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from edgeprune.allocation._base import Allocation, Allocator, Cost, Damage, Rules, infeasible
from edgeprune.allocation.problem import Problem, State, moved
from edgeprune.allocation.refinement import VERIFIED_AT_ONCE, less_damaging, moves_down, refine
from edgeprune.errors import ConfigError

if TYPE_CHECKING:
    from edgeprune.graph.channel_graph import ChannelGroup

_EXHAUSTIVE_MOVES = 160
"""Up to so many open moves every one is looked up again after each step; above, only those that look best."""
_PAIR_DEPTH = 3


class Greedy(Allocator):
    """Least added damage per millisecond saved, move by move, until the budget is met.

    A move takes one decision to any smaller candidate width, so plateaus of the latency are crossed in one move; where no
    single move saves anything (two layers that must shrink together), pairs are tried. At each step the single moves that
    would meet the budget at once are remembered, and the least damaging of these and of the path's own end is refined:
    widths are raised again while the budget holds, and one width is traded against another.

    Source: the descent is the classical greedy for multiple-choice knapsack problems (P. Sinha, A. Zoltners, 1979), here on
    a cost that is not additive.

    Args:
        max_evaluations: Refinement ends when so many different widths were looked up.
    """

    name: ClassVar[str] = "greedy"

    def __init__(self, max_evaluations: int = 20_000) -> None:
        if max_evaluations < 1:
            raise ConfigError(f"max_evaluations must be at least 1, found {max_evaluations}.")
        self.max_evaluations = max_evaluations

    def allocate(
        self, groups: Sequence[ChannelGroup], damage: Damage, cost: Cost, budget_ms: float, rules: Rules | None = None
    ) -> Allocation:
        """See `Allocator.allocate`."""
        problem = Problem(groups, damage, cost, rules)
        if problem.ms(problem.dense) <= budget_ms:
            return problem.unproven(self.name, problem.dense, budget_ms, "the dense widths meet the budget.")
        state = _descend(problem, budget_ms)
        if state is None:
            widths, best_ms = problem.fastest_seen()
            raise infeasible(cost, problem.widths(widths), best_ms, budget_ms)
        complete = refine(problem, state, budget_ms, self.max_evaluations)
        note = "a greedy search proves no bound."
        if problem.evaluations >= self.max_evaluations:
            note = f"refinement ended after {problem.evaluations} evaluations; {note}"
        return problem.unproven(self.name, complete, budget_ms, note)


def _descend(problem: Problem, budget_ms: float) -> State | None:
    """Follow the best ratio down; the least damaging state within the budget on the way, or None."""
    state, complete = problem.dense, None
    saved: dict[tuple[int, int], float] = {}
    stale = moves_down(problem, state)
    while problem.ms(state) > budget_ms:
        moves = moves_down(problem, state)
        if len(moves) <= _EXHAUSTIVE_MOVES:
            stale = moves
        chosen = _best_move(problem, state, moves, set(stale), saved)
        complete = less_damaging(problem, complete, _completions(problem, state, moves, saved, budget_ms))
        following = moved(state, *chosen) if chosen is not None else _pair_down(problem, state)
        if following is None:
            break
        changed = [index for index in problem.movable if following[index] != state[index]]
        state = following
        stale = [move for move in moves_down(problem, state) if move[0] in changed]
    if problem.ms(state) <= budget_ms:
        complete = less_damaging(problem, complete, [state])
    if complete is None:
        floor = tuple(widths[-1] for widths in problem.candidates)
        complete = floor if problem.ms(floor) <= budget_ms else None
    return complete


def _best_move(
    problem: Problem,
    state: State,
    moves: list[tuple[int, int]],
    stale: set[tuple[int, int]],
    saved: dict[tuple[int, int], float],
) -> tuple[int, int] | None:
    """The move with the least added damage per ms saved; what is not stale is taken as it was last seen, until it leads."""
    now = problem.ms(state)

    def refresh(some: Sequence[tuple[int, int]]) -> None:
        latencies = problem.many_ms([moved(state, *move) for move in some])
        saved.update(zip(some, (now - float(value) for value in latencies), strict=True))

    def ratio(move: tuple[int, int]) -> float:
        added = problem.added(move[0], state[move[0]], move[1])
        return added / saved[move] if saved[move] > 0 else math.inf

    refresh([move for move in moves if move in stale or move not in saved])
    fresh = {move for move in moves if move in stale}
    while True:
        leading = sorted(moves, key=lambda move: (ratio(move), -saved[move]))[:VERIFIED_AT_ONCE]
        if not leading:
            return None
        if leading[0] in fresh and ratio(leading[0]) < math.inf:
            return leading[0]
        if len(fresh) == len(moves):
            return None
        # Nothing known saves anything: what was seen at an earlier state may save now.
        if leading[0] in fresh:
            leading = moves
        refresh([move for move in leading if move not in fresh])
        fresh.update(leading)


def _completions(
    problem: Problem,
    state: State,
    moves: Sequence[tuple[int, int]],
    saved: dict[tuple[int, int], float],
    budget_ms: float,
) -> list[State]:
    """The least damaging single moves that meet the budget, looked up again."""
    needed = problem.ms(state) - budget_ms
    enough = [move for move in moves if saved[move] >= needed]
    enough.sort(key=lambda move: problem.added(move[0], state[move[0]], move[1]))
    states = [moved(state, *move) for move in enough[:VERIFIED_AT_ONCE]]
    latencies = problem.many_ms(states)
    return [found for found, latency in zip(states, latencies, strict=True) if latency <= budget_ms]


def _pair_down(problem: Problem, state: State) -> State | None:
    """Two decisions that save only together: the pair with the best ratio, each a few candidates deep; None if none saves."""
    now = problem.ms(state)
    nearby = {
        index: [width for width in problem.candidates[index] if width < state[index]][:_PAIR_DEPTH]
        for index in problem.movable
    }
    pairs = [
        moved(moved(state, first, one), second, other)
        for position, first in enumerate(problem.movable)
        for second in problem.movable[position + 1 :]
        for one in nearby[first]
        for other in nearby[second]
    ]
    before = problem.damage(state)
    saving = [
        ((problem.damage(pair) - before) / (now - float(latency)), pair)
        for pair, latency in zip(pairs, problem.many_ms(pairs), strict=True)
        if latency < now
    ]
    return min(saving)[1] if saving else None
