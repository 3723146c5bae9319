"""One threshold on the scores of all groups together: the baseline of most pruning libraries."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from edgeprune.allocation._base import Allocation, Allocator, Cost, Damage, Rules, first_fitting, unproven
from edgeprune.allocation.choices import Choice, choices, expand
from edgeprune.errors import ConfigError

if TYPE_CHECKING:
    from edgeprune.graph.channel_graph import ChannelGroup


class GlobalThreshold(Allocator):
    """Every unit whose removal adds less damage than a threshold goes, whatever its group; the threshold meets the budget.

    What a unit adds is the step of its group's damage curve, so a group keeps the width that minimizes damage plus threshold
    times width. Latency does not always fall with the threshold, so thresholds are tried from the smallest up and the first
    that fits is taken.

    Source: Z. Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", 2017, section 3.

    Args:
        max_thresholds: Most thresholds to try, evenly spread over the different plans that they lead to.
    """

    name: ClassVar[str] = "global_threshold"

    def __init__(self, max_thresholds: int = 512) -> None:
        if max_thresholds < 2:
            raise ConfigError(f"max_thresholds must be at least 2, found {max_thresholds}.")
        self.max_thresholds = max_thresholds

    def allocate(
        self, groups: Sequence[ChannelGroup], damage: Damage, cost: Cost, budget_ms: float, rules: Rules | None = None
    ) -> Allocation:
        """See `Allocator.allocate`."""
        decisions = choices(groups, rules)
        curves = [choice.damage(damage) for choice in decisions]
        plans = [expand(decisions, state) for state in self._states(decisions, curves)]
        widths, predicted_ms, evaluations = first_fitting(plans, cost, budget_ms)
        return unproven(
            self.name,
            widths,
            budget_ms=budget_ms,
            predicted_ms=predicted_ms,
            damage=sum(curve[widths[choice.groups[0]]] for choice, curve in zip(decisions, curves, strict=True)),
            evaluations=evaluations,
            note="one threshold for all groups; latency per unit plays no part.",
        )

    def _states(self, decisions: Sequence[Choice], curves: Sequence[dict[int, float]]) -> list[tuple[int, ...]]:
        """The widths at ever larger thresholds, from the dense ones to the smallest, without repeats."""
        corners = [_corners(curve) for curve in curves]
        thresholds = sorted({threshold for some in corners for threshold, _ in some[1:]})
        if len(thresholds) > self.max_thresholds:
            last = len(thresholds) - 1
            places = np.linspace(0, last, self.max_thresholds)
            thresholds = [thresholds[round(float(place))] for place in places]
        dense = tuple(choice.widest for choice in decisions)
        found = {dense: None}
        for threshold in thresholds:
            state = tuple([width for begun, width in some if begun <= threshold][-1] for some in corners)
            found[state] = None
        return list(found)


def _corners(curve: dict[int, float]) -> list[tuple[float, int]]:
    """(threshold from which on it is taken, width), from the full size down: the lower convex hull of a damage curve."""
    hull: list[int] = []
    for width in sorted(curve, reverse=True):
        while hull and curve[width] <= curve[hull[-1]] and len(hull) > 1:
            hull.pop()
        while len(hull) > 1 and _step(curve, hull[-1], width) <= _step(curve, hull[-2], hull[-1]):
            hull.pop()
        hull.append(width)
    steps = [_step(curve, wide, narrow) for wide, narrow in pairwise(hull)]
    return [(float("-inf"), hull[0]), *zip(steps, hull[1:], strict=True)]


def _step(curve: dict[int, float], wide: int, narrow: int) -> float:
    return (curve[narrow] - curve[wide]) / (wide - narrow)
