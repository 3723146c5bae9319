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
        losses: By objective.
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
