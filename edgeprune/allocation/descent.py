"""Good states quickly, by tables alone: prices on the costs, one decision at a time, then blocks of decisions by the solver."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from edgeprune.allocation.nodes import Decision, Node
from edgeprune.allocation.program import Program
from edgeprune.allocation.tables import CostTable
from edgeprune.allocation.terms import Floats, Ints

_SWEEPS = 20
_HALVINGS = 24
_REWEIGHTINGS = 4
_REBALANCINGS = 4
_BLOCK = 16
"""Decisions that are solved together while all others stay."""


class Descent:
    """Searches states of one set of tables.

    Args:
        nodes: Decisions first.
        damages: Damage by option, per decision.
        tables: One per cost.
        worst: Further damages by option, per set and decision; the largest of their sums is added to the damage. What guides
            a descent is a weighted mean of them, with more and more weight on the largest.

    Attributes:
        neighbors: Per decision those that share a table with it.
    """

    def __init__(
        self,
        nodes: Sequence[Node],
        damages: Sequence[Floats],
        tables: Sequence[CostTable],
        worst: Sequence[Sequence[Floats]] = (),
    ) -> None:
        self.nodes, self.damages, self.tables = tuple(nodes), tuple(damages), tuple(tables)
        self._added, self._worst = self.damages, tuple(worst)
        self._guided_by(np.ones(len(self._worst)))
        count = len(damages)
        self._single = [np.zeros((len(tables), len(curve))) for curve in damages]
        self._pairs: list[list[tuple[int, int, Floats]]] = [[] for _ in range(count)]
        self._wide: list[list[tuple[int, tuple[int, ...], Floats]]] = [[] for _ in range(count)]
        near: list[set[int]] = [set() for _ in range(count)]
        for cost, table in enumerate(tables):
            entries = [((node,), values) for node, values in table.single.items()]
            for places, values in [*entries, *table.pairs.items()]:
                scope = sorted({index for place in places for index in self.nodes[place].scope})
                for index in scope:
                    near[index] |= set(scope) - {index}
                if any(not isinstance(self.nodes[place], Decision) for place in places):
                    for index in scope:
                        self._wide[index].append((cost, tuple(places), values))
                elif len(places) == 1:
                    self._single[places[0]][cost] += values
                else:
                    self._pairs[places[0]].append((cost, places[1], values))
                    self._pairs[places[1]].append((cost, places[0], values.T))
        self.neighbors = [tuple(sorted(some)) for some in near]

    def damage(self, state: Ints) -> float:
        """Total damage of a state."""
        return _sum(self._added, state) + float(self._sums(state).max(initial=0.0))

    def costs(self, state: Ints) -> Floats:
        """Every cost of a state, shape (costs,)."""
        return np.array([table.total(state[None, :])[0] for table in self.tables])

    def by_option(self, index: int, state: Ints) -> Floats:
        """What depends on one decision, by its options while all others stay, shape (costs, options)."""
        found: Floats = self._single[index].copy()
        for cost, other, values in self._pairs[index]:
            found[cost] += values[:, state[other]]
        if self._wide[index]:
            count = len(self.damages[index])
            states = np.repeat(state[None, :], count, axis=0)
            states[:, index] = np.arange(count)
            options: dict[int, Ints] = {}
            for cost, places, values in self._wide[index]:
                for place in places:
                    if place not in options:
                        options[place] = self.nodes[place].option(states)
                found[cost] += values[tuple(options[place] for place in places)]
        return found

    def start(self, limits: Floats) -> Ints | None:
        """A state within the limits, found by pricing the costs; None where no price leads to one."""
        if not self._worst:
            return self._started(limits)
        best, weights = None, np.ones(len(self._worst))
        for _ in range(_REBALANCINGS):
            self._guided_by(weights)
            state = self._started(limits)
            if state is None:
                break
            if best is None or self.damage(state) < self.damage(best):
                best = state
            sums = self._sums(state)
            weights = weights * np.maximum(sums, 1e-3 * sums.max()) if sums.max() > 0 else weights
        return best

    def _guided_by(self, weights: Floats) -> None:
        """What is lowered: what is added up, and the mean of the further sets by these weights."""
        if self._worst:
            shares = weights / weights.sum()
            self.damages = tuple(
                own + sum(share * one[index] for share, one in zip(shares, self._worst, strict=True))
                for index, own in enumerate(self._added)
            )

    def _sums(self, state: Ints) -> Floats:
        """Of each further set, shape (sets,)."""
        return np.array([_sum(one, state) for one in self._worst])

    def _started(self, limits: Floats) -> Ints | None:
        bounded = np.isfinite(limits)
        weights = np.where(bounded, 1.0 / np.maximum(np.abs(np.where(bounded, limits, 1.0)), 1e-300), 0.0)
        best: Ints | None = None
        for _ in range(_REWEIGHTINGS if bounded.sum() > 1 else 1):
            state, excess = self._priced(weights, limits)
            if state is not None:
                state = self.filled(state, limits)
                if best is None or self.damage(state) < self.damage(best):
                    best = state
            # What is bounded most tightly gets a higher price in the next round.
            weights = weights * np.clip(excess, 0.25, 4.0) ** 2
        return best

    def filled(self, state: Ints, limits: Floats) -> Ints:
        """Change one decision after another while that lowers the damage and the limits hold."""
        state, costs = state.copy(), self.costs(state)
        while True:
            best = (-1e-12 * max(1.0, self.damage(state)), -1, -1, costs)
            for index, curve in enumerate(self.damages):
                relief = curve - curve[state[index]]
                if relief.min() >= best[0]:
                    continue
                by_option = self.by_option(index, state)
                after = costs[:, None] + by_option - by_option[:, state[index]][:, None]
                relief = np.where((after <= limits[:, None]).all(axis=0), relief, np.inf)
                option = int(np.argmin(relief))
                if relief[option] < best[0]:
                    best = (float(relief[option]), index, option, after[:, option])
            if best[1] < 0:
                return state
            state[best[1]], costs = best[2], best[3]

    def in_blocks(self, program: Program, state: Ints, limits: Floats, until: float, gap: float) -> Ints:
        """Solve one block of neighboring decisions after another while all others stay, until no block gets better.

        Args:
            program: Of the same tables.
            state: Within the limits.
            limits: Of every cost.
            until: `time.monotonic` at which to stop, seconds.
            gap: Relative gap within each block.
        """
        dice = np.random.default_rng(0)
        movable = [index for index, curve in enumerate(self.damages) if len(curve) > 1]
        waiting = list(dice.permutation(movable))
        while waiting and time.monotonic() < until:
            block = self._block(int(waiting[0]))
            fixed = {index: int(state[index]) for index in range(len(self.damages)) if index not in block}
            scale = max(1e-300, self.damage(state))
            found = program.solve(list(limits), seconds=until - time.monotonic(), gap=gap, fixed=fixed, scale=scale)
            better = found.state
            fits = better is not None and bool((self.costs(better) <= limits).all())
            if better is not None and fits and self.damage(better) < self.damage(state) * (1 - 1e-9):
                state = better
                waiting = [index for index in dice.permutation(movable) if index not in block]
                continue
            waiting = [index for index in waiting if index not in block]
        return state

    def _block(self, seed: int) -> set[int]:
        block, edge = {seed}, [seed]
        while edge and len(block) < _BLOCK:
            for index in self.neighbors[edge.pop(0)]:
                if index not in block and len(block) < _BLOCK:
                    block.add(index)
                    edge.append(index)
        return block

    def _priced(self, weights: Floats, limits: Floats) -> tuple[Ints | None, Floats]:
        """Halve in on the smallest price at which the limits hold; the state there, and cost over limit just below it."""
        bounded = np.isfinite(limits)
        total = float(sum(np.ptp(curve) for curve in self.damages))
        state = np.zeros(len(self.damages), dtype=np.int64)
        low, high, price, found = 0.0, np.inf, max(total, 1e-300), None
        excess = np.ones(len(limits))
        for _ in range(_HALVINGS):
            state = self._cheapest(price * weights, state)
            costs = self.costs(state)
            if (costs <= limits).all():
                if found is None or self.damage(state) < self.damage(found):
                    found = state
                high = price
            else:
                low = price
                excess = np.where(bounded, costs / np.where(bounded, np.maximum(np.abs(limits), 1e-300), 1.0), 1.0)
            price = 8 * low if high == np.inf else (high / 8 if low == 0.0 else float(np.sqrt(low * high)))
        return found, excess

    def _cheapest(self, prices: Floats, state: Ints) -> Ints:
        """Damage plus priced costs, lowered one decision at a time until nothing changes."""
        state = state.copy()
        for _ in range(_SWEEPS):
            changed = False
            for index, curve in enumerate(self.damages):
                if len(curve) < 2:
                    continue
                value = curve + prices @ self.by_option(index, state)
                option = int(np.argmin(value))
                if value[option] < value[state[index]] - 1e-12 * abs(value[state[index]]):
                    state[index], changed = option, True
            if not changed:
                break
        return state


def _sum(curves: Sequence[Floats], state: Ints) -> float:
    return float(sum(curve[option] for curve, option in zip(curves, state, strict=True)))
