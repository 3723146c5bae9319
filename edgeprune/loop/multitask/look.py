"""What was seen of a cut model, batch by batch."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

Kept = Mapping[str, tuple[int, ...]]
"""Group name to the units that stay, for every group."""


@dataclass
class Look:
    """What was seen of a cut model so far; every list has a place per batch.

    Attributes:
        kept: Its units.
        sums: By objective, the losses of the batch's samples with labels, added up; None where it was not looked at.
        counts: How many samples those are.
        samples: By objective the loss of each, where stops need it and losses are means over samples.
        places: The batches that were looked at, in that order.
        stopped: Whether a loss is above its bound, as could be told before all samples were looked at.
        cut: The model, where it is at hand.
    """

    kept: Kept
    sums: dict[str, list[float | None]]
    counts: dict[str, list[int]]
    samples: dict[str, list[list[float] | None]]
    places: list[int] = field(default_factory=list)
    stopped: bool = False
    cut: nn.Module | None = field(default=None, repr=False)

    @classmethod
    def nothing(cls, kept: Kept, objectives: Sequence[str], batches: int) -> Look:
        """Nothing was seen yet.

        Args:
            kept: Its units.
            objectives: That will be looked at.
            batches: How many there are.
        """
        sums: dict[str, list[float | None]] = {name: [None] * batches for name in objectives}
        samples: dict[str, list[list[float] | None]] = {name: [None] * batches for name in objectives}
        return cls(kept, sums, {name: [0] * batches for name in objectives}, samples)

    @property
    def losses(self) -> dict[str, float]:
        """Loss per objective, averaged over the samples with labels that were looked at."""
        totals = {name: sum(one for one in sums if one is not None) for name, sums in self.sums.items()}
        return {name: total / sum(self.counts[name]) for name, total in totals.items() if sum(self.counts[name])}

    def beside(self, other: Look) -> dict[str, float]:
        """Losses as they will be on all batches, from the difference to a model that was looked at whole."""
        found = {}
        for name, sums in self.sums.items():
            there = [place for place, value in enumerate(sums) if value is not None]
            count = sum(self.counts[name][place] for place in there)
            if count:
                grown = sum(float(sums[place] or 0.0) - float(other.sums[name][place] or 0.0) for place in there)
                found[name] = other.losses[name] + grown / count
        return found


def named(kept: Kept) -> str:
    """What tells cut models apart."""
    return hashlib.sha256(repr(sorted((name, tuple(units)) for name, units in kept.items())).encode()).hexdigest()
