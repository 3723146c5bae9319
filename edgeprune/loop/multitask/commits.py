"""What a search has cut so far, and what each cut cost and saved."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgeprune.allocation.choices import Choice


@dataclass(frozen=True)
class State:
    """What is left of the model, and its losses.

    Attributes:
        widths: Of every group.
        kept: Its units that are left.
        losses: By objective; empty where it was not looked at yet.
    """

    widths: dict[str, int]
    kept: dict[str, tuple[int, ...]]
    losses: dict[str, float]


@dataclass(frozen=True)
class Commit:
    """One layer's cut.

    Attributes:
        choice: The layer.
        before: Its width before.
        increase: What losses grew by, each as a share of what it may grow by, added up.
        saved: What the cost fell by.
    """

    choice: Choice
    before: int
    increase: float
    saved: float

    @property
    def price(self) -> float:
        """Increase per what was saved."""
        return self.increase / self.saved if self.saved > 0 else math.inf

    def with_more(self, later: Commit) -> Commit:
        """Both as one."""
        return replace(self, increase=self.increase + later.increase, saved=self.saved + later.saved)


def last_good(count: int, good: Callable[[int], bool], *, bisect: bool) -> int:
    """The last of `count` cuts, from the mildest on, before the first that is not good; -1 where that is the mildest.

    Args:
        count: How many there are.
        good: Whether a cut is; by its place, from 0.
        bisect: Asks about log2(count) of them, and finds the same where no cut behind one that is not good is good.
    """
    if not bisect:
        return next((place - 1 for place in range(count) if not good(place)), count - 1)
    low, high = -1, count
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if good(middle) else (low, middle)
    return low


def expected_first(count: int, good: Callable[[int], bool], expected: int) -> int:
    """As `last_good` by bisection, beginning where the last good cut is expected.

    Args:
        count: How many there are.
        good: Whether a cut is; by its place, from 0.
        expected: The last good one, or -1, by what is known so far. Where it is, two are asked about; where it is not, some
            twice as far away each time, and then those between.
    """
    low, high, far = -1, count, 1
    while high - low > 1:
        if low < expected < high:
            place = expected
        elif low == expected:
            place = low + 1
        elif low > expected and high == count:
            place, far = min(high - 1, low + far), 2 * far
        elif high <= expected and low == -1:
            place, far = max(0, high - far), 2 * far
        else:
            place = (low + high) // 2
        low, high = (place, high) if good(place) else (low, place)
    return low


def last_below(count: int, used: Callable[[int], float]) -> int:
    """The last of `count` cuts that uses at most 1, where cuts use more from place to place, and none (0) before the first.

    Asks where a line through the square roots of what is known says that 1 is crossed, and in the middle where that did not help.

    Args:
        count: How many there are.
        used: What a cut uses, by its place, from 0.
    """
    low, high, below, above, halve = -1, count, 0.0, math.inf, True
    while high - low > 1:
        place = (low + high) // 2
        if not halve and math.isfinite(above):
            share = (1 - math.sqrt(below)) / (math.sqrt(above) - math.sqrt(below))
            place = min(high - 1, max(low + 1, low + int(share * (high - low))))
        found, before = used(place), high - low
        if found <= 1:
            low, below = place, found
        else:
            high, above = place, found
        halve = 2 * (high - low) > before + 1 and not halve
    return low
