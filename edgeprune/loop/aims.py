"""From costs of parts that only add up roughly to a whole that is just within the budget: search, look, and aim again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

MOST_AIMS = 10
UNUSED = 0.01
"""Share of the budget that may be left over."""
_ROUNDING = 1e-9
"""Share of a cost by which sums of floats may lie above it."""


class Whole(Protocol):
    """What a search at an aim came to."""

    @property
    def cost(self) -> float:
        """Of all of it, in the unit of the budget."""

    @property
    def damage(self) -> float:
        """What is to be least."""


Tried = TypeVar("Tried", bound=Whole)


def within_budget(
    search: Callable[[float], Tried | None],
    budget: float,
    smallest: float,
    largest: float,
    *,
    exact: bool = False,
) -> tuple[Tried | None, Tried | None]:
    """Search at several aims, each corrected by what the find of the one before costs as a whole.

    The first aim is the budget itself. A find within the budget that leaves little of it over ends the search; else the next aim
    lies between the highest one that was met and the lowest one that was missed, and the smallest one is tried before the
    budget is given up.

    Args:
        search: The least damage whose parts add up to at most an aim; None where nothing does.
        budget: What a find may cost as a whole.
        smallest: Least that parts can add up to.
        largest: What they add up to with nothing removed.
        exact: Whether parts add up to the whole, but for the rounding of sums: then the first find within the budget is the best.

    Returns:
        The find within the budget with the least damage, of equals the cheapest, or None; and the cheapest of all finds, None
        where there was none.
    """
    met, missed, misses = smallest, largest, 0
    aim = max(budget, met) if budget < missed else (met + missed) / 2
    best: Tried | None = None
    cheapest: Tried | None = None
    for turn in range(MOST_AIMS):
        # The smallest aim is tried before the budget is given up.
        found = search(smallest if best is None and turn == MOST_AIMS - 1 else aim)
        if found is None:
            break
        if cheapest is None or found.cost < cheapest.cost:
            cheapest = found
        if found.cost <= budget * (1 + (_ROUNDING if exact else 0.0)):
            if best is None or (found.damage, found.cost) < (best.damage, best.cost):
                best = found
            if exact or found.cost >= (1 - UNUSED) * budget:
                break
            met, misses = aim, 0
        elif aim <= smallest * (1 + _ROUNDING):
            break
        else:
            missed, misses = aim, misses + 1
        # Aims that come nearer from above alone would never meet the budget: then into the middle of what may be left over.
        wanted = aim * budget / found.cost * (1 - UNUSED / 2 if misses > 1 else 1)
        inside = met < wanted < missed
        aim = wanted if inside else met if best is None and wanted <= met else (met + missed) / 2
    return best, cheapest
