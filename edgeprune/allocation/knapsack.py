"""One item per group in a knapsack, as published pruners with a latency budget do it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from edgeprune.allocation._base import Allocation, Allocator, Cost, Damage, Rules, infeasible
from edgeprune.allocation.nodes import Nodes
from edgeprune.allocation.problem import Problem, State
from edgeprune.allocation.proving import tabulated
from edgeprune.allocation.tables import CostTable
from edgeprune.allocation.terms import Floats, Ints
from edgeprune.errors import ConfigError

if TYPE_CHECKING:
    from edgeprune.graph.channel_graph import ChannelGroup

_SIZES = 12
"""Sizes of the knapsack that are tried."""


class Knapsack(Allocator):
    """A multiple-choice knapsack, solved exactly over latency in steps, with the other side of each layer frozen.

    A layer's latency depends on its inputs and outputs, which is no knapsack. So every layer is charged to its groups in equal
    shares, to each while the others keep the width that they have; then each candidate width is an item with a price, and
    dynamic programming finds the best choice of items. What it chose is frozen in the next pass, until the widths repeat. The
    plans are looked up as a whole, and the size of the knapsack is halved in on, since its prices are not what the plan takes
    in the end; the best that meets the budget counts. No bound is proven: what is solved exactly is not the problem itself.

    Source: M. Shen et al., "Structural Pruning via Latency-Saliency Knapsack" (HALP), 2022, where a layer is charged to its
    outputs alone; R. Humble et al., "Soft Masking for Cost-Constrained Channel Pruning", 2022, where it is charged to its
    inputs, and frozen widths are evaluated anew.

    Args:
        passes: How often widths are frozen anew at most, for one size of the knapsack.
        steps: Steps into which the latency is cut; latencies are rounded up to them.
    """

    name: ClassVar[str] = "knapsack"

    def __init__(self, passes: int = 6, steps: int = 2_000) -> None:
        if passes < 1 or steps < 1:
            raise ConfigError(f"passes and steps must be at least 1, found {passes} and {steps}.")
        self.passes, self.steps = passes, steps

    def allocate(
        self, groups: Sequence[ChannelGroup], damage: Damage, cost: Cost, budget_ms: float, rules: Rules | None = None
    ) -> Allocation:
        """See `Allocator.allocate`."""
        problem = Problem(groups, damage, cost, rules)
        if problem.ms(problem.dense) <= budget_ms:
            return problem.unproven(self.name, problem.dense, budget_ms, "the dense widths meet the budget.")
        floor = tuple(widths[-1] for widths in problem.candidates)
        fits_at_all = problem.ms(floor) <= budget_ms
        nodes = Nodes(problem.candidates)
        (table, *_), _, _ = tabulated(problem, cost, nodes)
        damages = [problem.damages(index) for index in range(len(problem.choices))]
        found = [floor] if fits_at_all else []
        low_ms, high_ms, target_ms = min(budget_ms, problem.ms(floor)), problem.ms(problem.dense), budget_ms
        for _ in range(_SIZES):
            fitting = problem.fitting(self._passes(problem, table, damages, target_ms), budget_ms)
            found += fitting
            low_ms, high_ms = (target_ms, high_ms) if fitting else (low_ms, target_ms)
            target_ms = (low_ms + high_ms) / 2
        if found:
            note = "layers were charged to their groups in equal shares; nothing is proven."
            return problem.unproven(self.name, min(found, key=problem.damage), budget_ms, note)
        widths, best_ms = problem.fastest_seen()
        raise infeasible(cost, problem.widths(widths), best_ms, budget_ms)

    def _passes(self, problem: Problem, table: CostTable, damages: Sequence[Floats], target_ms: float) -> list[State]:
        state = np.zeros(len(damages), dtype=np.int64)
        plans: list[State] = []
        for _ in range(self.passes):
            prices, fixed_ms = charges(table, [len(curve) for curve in damages], state)
            state = fill(damages, prices, target_ms - fixed_ms, self.steps)
            plan = tuple(widths[option] for widths, option in zip(problem.candidates, state, strict=True))
            if plan in plans:
                break
            plans.append(plan)
        return plans


def charges(table: CostTable, counts: Sequence[int], state: Ints) -> tuple[list[Floats], float]:
    """Every table of a cost, charged in equal shares to its decisions, to each while the others stay as they are.

    Args:
        table: The cost.
        counts: Options per decision.
        state: Option of each decision that stays.

    Returns:
        Price by option per decision, and the constant part; at `state` itself they add up to the cost.
    """
    prices = [np.zeros(count) for count in counts]
    entries = [((node,), values) for node, values in table.single.items()]
    for places, values in [*entries, *table.pairs.items()]:
        scope = sorted({index for place in places for index in table.nodes[place].scope})
        for index in scope:
            states = np.repeat(state[None, :], counts[index], axis=0)
            states[:, index] = np.arange(counts[index])
            options = tuple(table.nodes[place].option(states) for place in places)
            prices[index] += values[options] / len(scope)
    return prices, table.constant


def fill(damages: Sequence[Floats], prices: Sequence[Floats], capacity: float, steps: int) -> Ints:
    """One option per decision, least damage in all, prices within a capacity; the cheapest of each where none fit.

    Args:
        damages: Damage by option, per decision.
        prices: Price by option, per decision.
        capacity: What the prices may add up to.
        steps: Capacity in whole steps; prices are rounded up to them.

    Source: S. Martello, P. Toth, "Knapsack Problems", 1990, section 2.6 (dynamic programming).
    """
    least = [float(price.min()) for price in prices]
    room = capacity - sum(least)
    if room < 0:
        return np.array([int(np.argmin(price)) for price in prices], dtype=np.int64)
    unit = max(room / steps, 1e-300)
    best = np.zeros(steps + 1)
    chosen = []
    for curve, price, low in zip(damages, prices, least, strict=True):
        with np.errstate(over="ignore"):
            taken = np.minimum(np.ceil((price - low) / unit - 1e-9), steps + 1).astype(np.int64)
        found = np.full((len(curve), steps + 1), np.inf)
        for option, weight in enumerate(taken):
            if weight <= steps:
                found[option, weight:] = best[: steps + 1 - weight] + curve[option]
        chosen.append((found.argmin(axis=0), taken))
        best = found.min(axis=0)
    state, left = [], int(np.argmin(best))
    for options, taken in reversed(chosen):
        option = int(options[left])
        state.append(option)
        left -= int(taken[option])
    return np.array(state[::-1], dtype=np.int64)
