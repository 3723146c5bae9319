"""The layers of a search: which widths they may get, which units stay at one, and what they contribute to the cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from edgeprune.allocation.energy import Energy
from edgeprune.allocation.resources import MultiplyAccumulates
from edgeprune.criteria.damage import best_units

if TYPE_CHECKING:
    from edgeprune.allocation.choices import Choice
    from edgeprune.allocation.terms import Limit
    from edgeprune.criteria._base import Scores
    from edgeprune.loop.planning import Planner

SHARE = 0.3
"""What is cut of a layer alone to see what it contributes to the cost; as published."""
STEPS = tuple(step / 20 for step in range(1, 20))
"""Shares that are cut of a layer with `compat`; as published."""

Units = Mapping[str, tuple[int, ...]]


class Layers:
    """Those of a planner's model that are not frozen; a layer is a decision, of one group or several tied ones.

    What they cost is the predicted latency, or where energy is bounded the predicted energy.

    Args:
        planner: Of the dense model.
        compat: Multiply-accumulates in place of the predicted cost, and widths in steps of 5 % in place of stair edges.

    Attributes:
        choices: The layers, in program order.
    """

    def __init__(self, planner: Planner, *, compat: bool) -> None:
        self.choices = [choice for choice in planner.cost.choices if not choice.frozen]
        self._latency, self._compat = planner.cost, compat
        self._macs = MultiplyAccumulates(planner.kernel_graph) if compat else None
        self._energy = energy_limit(planner)

    def cost(self, widths: Mapping[str, int]) -> float:
        """Milliseconds, millijoules, or multiply-accumulates."""
        if self._macs is not None:
            return self._macs.value(widths)
        return self._latency.ms(widths) if self._energy is None else self._energy.cost.value(widths)

    def met(self, widths: Mapping[str, int], aim_ms: float) -> bool:
        """Whether a predicted latency, and the energy where it is bounded, are kept."""
        return self._latency.ms(widths) <= aim_ms and (
            self._energy is None or self._energy.cost.value(widths) <= self._energy.at_most
        )

    def _costs(self, many: Sequence[Mapping[str, int]]) -> npt.NDArray[np.float64]:
        if self._energy is None:
            return self._latency.many_ms(many)
        return np.array([self.cost(widths) for widths in many], dtype=np.float64)

    def contribution(self, choice: Choice, widths: Mapping[str, int]) -> float:
        """What the cost falls by when about 30 % of this layer alone are cut.

        Of a latency, at the candidate next to that: between the edges of its stairs it may not fall at all.
        """
        now = widths[choice.groups[0]]
        less = [width for width in choice.allowed if width < now] if self._compat else self.narrower(choice, widths)
        if not less:
            return 0.0
        width = min(less, key=lambda one: abs(one - (1 - SHARE) * now))
        return self.cost(widths) - self.cost({**widths, **dict.fromkeys(choice.groups, width)})

    def narrower(self, choice: Choice, widths: Mapping[str, int]) -> list[int]:
        """Candidates below a layer's width, descending; only those at which the cost is below that of all wider ones.

        Args:
            choice: The layer.
            widths: Of all groups, its own among them.
        """
        now = widths[choice.groups[0]]
        if self._compat:
            every = {choice.nearest((1 - share) * choice.size) for share in STEPS}
            return sorted((width for width in every if 0 < width < now), reverse=True)
        below = [width for width in choice.candidates(self._latency) if 0 < width < now]
        found, lowest = [], self.cost(widths)
        tried = [{**widths, **dict.fromkeys(choice.groups, width)} for width in below]
        for width, cost in zip(below, self._costs(tried), strict=True):
            if cost < lowest:
                found.append(width)
                lowest = float(cost)
        return found


def energy_limit(planner: Planner) -> Limit | None:
    """The budget of energy of a planner, if it has one."""
    return next((limit for limit in planner.limits if isinstance(limit.cost, Energy)), None)


def narrowed(kept: Units, scores: Scores, widths: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Of the units that are there those with the largest scores.

    Args:
        kept: The units that are there, for every group.
        scores: Of all units of the groups that change.
        widths: How many stay; groups that are not named keep what they have.
    """
    return {
        name: _best(units, scores[name], widths[name]) if widths.get(name, len(units)) < len(units) else units
        for name, units in kept.items()
    }


def evenly_cut(layers: Sequence[Choice], widths: Mapping[str, int]) -> Iterator[dict[str, int]]:
    """Widths with the same share cut of every layer, more and more; the first as they are."""
    last = dict(widths)
    yield last
    for share in STEPS:
        cut = dict(widths)
        for choice in layers:
            now = widths[choice.groups[0]]
            cut |= dict.fromkeys(choice.groups, min(now, choice.nearest((1 - share) * now)))
        if cut != last:
            yield cut
        last = cut


def _best(units: tuple[int, ...], scores: npt.NDArray[np.float64], width: int) -> tuple[int, ...]:
    there = np.array(units, dtype=np.int64)
    return tuple(int(there[place]) for place in best_units(scores[there], width))
