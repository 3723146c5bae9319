"""One allocation problem in index form: what every search over candidate widths needs."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from edgeprune.allocation._base import Allocation, Cost, Damage, Rules, unproven
from edgeprune.allocation.choices import Choice, choices, expand
from edgeprune.allocation.terms import Limit

if TYPE_CHECKING:
    from edgeprune.graph.channel_graph import ChannelGroup

State = tuple[int, ...]
"""One width per decision."""


class Problem:
    """Decisions, their candidate widths and damages, and a memo of latencies.

    Args:
        groups: All channel groups of the model.
        damage: Damage curves, which are added up.
        cost: Latency by widths.
        rules: What widths must respect.
        limits: Budgets besides the latency.
        worst: Further sets of damage curves; the largest of their sums is added to the damage.

    Attributes:
        choices: The decisions, frozen ones included.
        candidates: Per decision its candidate widths, descending.
        movable: Indices of the decisions with more than one candidate.
        dense: The state with every width at full size; at 0 where it can only be that.
        limits: Budgets besides the latency.
    """

    def __init__(
        self,
        groups: Sequence[ChannelGroup],
        damage: Damage,
        cost: Cost,
        rules: Rules | None,
        limits: Sequence[Limit] = (),
        worst: Sequence[Damage] = (),
    ) -> None:
        self.choices: tuple[Choice, ...] = choices(groups, rules)
        self.candidates = [choice.candidates(cost) for choice in self.choices]
        self.movable = [index for index, widths in enumerate(self.candidates) if len(widths) > 1]
        self.dense: State = tuple(choice.widest for choice in self.choices)
        self._damage = [choice.damage(damage) for choice in self.choices]
        self._worst = [[choice.damage(one) for choice in self.choices] for one in worst]
        self.limits = tuple(limits)
        self._cost = cost
        self._seen: dict[State, float] = {}

    def otherwise(self, damage: Damage, worst: Sequence[Damage], limits: Sequence[Limit]) -> Problem:
        """The same decisions and latencies with other damages and limits."""
        found = copy.copy(self)
        found._damage = [choice.damage(damage) for choice in self.choices]
        found._worst = [[choice.damage(one) for choice in self.choices] for one in worst]
        found.limits = tuple(limits)
        return found

    @property
    def evaluations(self) -> int:
        """Number of different states whose latency was looked up."""
        return len(self._seen)

    def widths(self, state: State) -> dict[str, int]:
        """One width per group."""
        return expand(self.choices, state)

    def ms(self, state: State) -> float:
        """Latency of a state, milliseconds."""
        return float(self.many_ms([state])[0])

    def many_ms(self, states: Sequence[State]) -> npt.NDArray[np.float64]:
        """Latencies of several states, milliseconds; unseen ones are asked for together."""
        unseen = [state for state in dict.fromkeys(states) if state not in self._seen]
        if unseen:
            found = self._cost.many_ms([self.widths(state) for state in unseen])
            self._seen.update(zip(unseen, (float(value) for value in found), strict=True))
        return np.array([self._seen[state] for state in states], dtype=np.float64)

    def fitting(self, states: Sequence[State], budget_ms: float) -> list[State]:
        """Those of the states that meet the latency budget and all limits, in order."""
        within = [state for state in states if self.keeps_limits(state)]
        return [state for state, ms in zip(within, self.many_ms(within), strict=True) if ms <= budget_ms]

    def keeps_limits(self, state: State) -> bool:
        """Whether a state meets the budgets besides the latency."""
        if not self.limits:
            return True
        widths = self.widths(state)
        return all(limit.cost.value(widths) <= limit.at_most for limit in self.limits)

    def damage(self, state: State) -> float:
        """Total damage of a state."""
        total = sum(curve[width] for curve, width in zip(self._damage, state, strict=True))
        sums = (sum(curve[width] for curve, width in zip(one, state, strict=True)) for one in self._worst)
        return total + max(sums, default=0.0)

    def added(self, index: int, old: int, new: int) -> float:
        """Damage that one decision adds, of what is added up, from one width to another; negative when it recovers."""
        return self._damage[index][new] - self._damage[index][old]

    def damages(self, index: int) -> npt.NDArray[np.float64]:
        """Damage of each candidate of one decision, in the order of the candidates."""
        return np.array([self._damage[index][width] for width in self.candidates[index]])

    def worst(self) -> list[list[npt.NDArray[np.float64]]]:
        """The same of each further set of curves, by decision."""
        return [
            [np.array([curve[width] for width in widths]) for curve, widths in zip(one, self.candidates, strict=True)]
            for one in self._worst
        ]

    def damages_at(self, options: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """Total damage of many states, shape (states,), given as indices into the candidates, shape (states, decisions)."""

        def added(curves: Sequence[npt.NDArray[np.float64]]) -> npt.NDArray[np.float64]:
            total = np.zeros(len(options))
            for index, curve in enumerate(curves):
                total += curve[options[:, index]]
            return total

        total = added([self.damages(index) for index in range(len(self.candidates))])
        return total + np.max([added(curves) for curves in self.worst()], axis=0) if self._worst else total

    def unproven(self, method: str, state: State, budget_ms: float, note: str) -> Allocation:
        """A state as the result of a search that proves nothing."""
        return unproven(
            method,
            self.widths(state),
            budget_ms=budget_ms,
            predicted_ms=self.ms(state),
            damage=self.damage(state),
            evaluations=self.evaluations,
            note=note,
        )

    def fastest_seen(self) -> tuple[State, float]:
        """The state with the smallest latency of all that were looked up, and that latency in milliseconds."""
        state = min(self._seen, key=lambda seen: self._seen[seen])
        return state, self._seen[state]


def moved(state: State, index: int, width: int) -> State:
    """The state with one width changed."""
    return (*state[:index], width, *state[index + 1 :])
