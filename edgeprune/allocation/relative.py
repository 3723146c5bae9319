"""A cost of which nothing is known but its values, as a sum over single decisions and pairs, relative to the dense widths.

Source: the cut-HDMR of H. Rabitz, O. Alis, "General foundations of high-dimensional model representations", 1999, to second
order: exact where no more than two decisions act together, and wherever at most two differ from the dense widths.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np

from edgeprune.allocation.tables import CostTable
from edgeprune.allocation.terms import Floats, Ints

MOST_LOOKUPS = 12_000
"""Pairs are looked up only as far as that, those that act together most strongly first."""
_SAME = 1e-9

Cell = tuple[int, int, int, int]
"""Two decisions, and an option of each."""


def add_relative(
    table: CostTable, look_up: Callable[[Ints], Floats], counts: Sequence[int], scope: Sequence[int], seed: int
) -> None:
    """Add the cost to a table.

    Args:
        table: What to add it to.
        look_up: The cost at states, shape (states, decisions) to (states,).
        counts: Options per decision; option 0 is the dense width.
        scope: The decisions that the cost depends on.
        seed: Of the options at which two decisions are tried together.
    """
    dense = np.zeros(len(counts), dtype=np.int64)
    singles = [(index, option) for index in scope for option in range(1, counts[index])]
    found = look_up(np.array([dense, *(_with(dense, {index: option}) for index, option in singles)]))
    base = float(found[0])
    alone = {single: float(value) - base for single, value in zip(singles, found[1:], strict=True)}
    table.constant += base
    for index in scope:
        table.add_single(index, np.array([0.0, *(alone[index, option] for option in range(1, counts[index]))]))

    def together(cells: Sequence[Cell]) -> Floats:
        """What two decisions add beyond what each adds alone."""
        values = look_up(np.array([_with(dense, {first: one, second: other}) for first, second, one, other in cells]))
        apart = [base + alone[first, one] + alone[second, other] for first, second, one, other in cells]
        beyond: Floats = values - np.array(apart)
        return beyond

    dice = np.random.default_rng(seed)
    pairs = list(itertools.combinations(scope, 2))
    probes: list[Cell] = []
    for first, second in pairs:
        one, other = counts[first] - 1, counts[second] - 1
        inner = (int(dice.integers(1, one + 1)), int(dice.integers(1, other + 1)))
        probes += [(first, second, one, other), (first, second, inner[0], inner[1])]
    if not probes:
        return
    # Whether two decisions act together at all shows at few of their options.
    strength = np.abs(together(probes)).reshape(-1, 2).max(axis=1)
    left = MOST_LOOKUPS
    for place in np.argsort(-strength, kind="stable"):
        first, second = pairs[int(place)]
        left -= (counts[first] - 1) * (counts[second] - 1)
        if strength[place] <= _SAME * max(1e-12, abs(base)) or left < 0:
            break
        options = itertools.product(range(1, counts[first]), range(1, counts[second]))
        added = np.zeros((counts[first], counts[second]))
        cells = [(first, second, one, other) for one, other in options]
        added[1:, 1:] = together(cells).reshape(counts[first] - 1, counts[second] - 1)
        table.add_pair(first, second, added)


def _with(state: Ints, changes: dict[int, int]) -> Ints:
    other: Ints = state.copy()
    for index, option in changes.items():
        other[index] = option
    return other
