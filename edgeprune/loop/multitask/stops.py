"""Whether a look at a cut model may be stopped: its losses are above their bounds, whatever the other batches say.

What is bet on are losses that come in random order: of samples, where each is what it is whatever else is in its batch; and of
whole batches, where batch norms normalize by the batch, so that its samples go up and down together. A layer's order of the
batches is drawn when its widths and their bounds are known already, so for each of them it is random, whichever of them is
looked at in the end. (Samples were dealt to batches once, before all: that this tells nothing of the next question is assumed.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from edgeprune.loop.multitask.early_stopping import MeanAbove
from edgeprune.loop.multitask.look import Look

Units = Literal["samples", "batches"]


class Stops:
    """Tests of one look, by the differences from a model that was looked at whole.

    Objectives with a loss below 0 never stop one; by samples, neither do those whose samples are in no random order, or whose
    loss of a batch is not the mean of those of its samples.

    Args:
        state: That model; None stops nothing.
        look: What was seen so far.
        most: Bounds of losses.
        alpha: How likely a look may be stopped wrongly, at most, by all objectives together.
        units: What is bet on.
    """

    def __init__(self, state: Look | None, look: Look, most: Mapping[str, float], alpha: float, units: Units) -> None:
        self._look, self._units = look, units
        self._before: dict[str, list[list[float] | None]] = {}
        self._tests: dict[str, MeanAbove] = {}
        if state is None or not state.places:
            return
        for name in look.sums:
            losses = self._of(state, name)
            known = [one for one in losses if one]
            if name in most and known and min(min(one) for one in known) >= 0 and self._whole(state, name):
                self._before[name] = losses
        for name, losses in self._before.items():
            flat = [value for several in losses for value in several or ()]
            # Sums, so that batches of other sizes, or with fewer labels, need no other rule.
            left = most[name] * sum(state.counts[name]) - sum(flat)
            # No loss is below 0, so none falls by more than it was.
            self._tests[name] = MeanAbove(len(flat), left / len(flat), -max(flat), alpha / len(self._before))
        for name in list(self._tests):
            for place in look.places:
                self.add(name, place)

    @property
    def names(self) -> frozenset[str]:
        """Objectives that may stop it."""
        return frozenset(self._tests)

    @property
    def certain(self) -> bool:
        """Whether it may be stopped now."""
        return any(test.certain for test in self._tests.values())

    def add(self, name: str, place: int) -> None:
        """Another batch of an objective was looked at."""
        if name not in self._tests:
            return
        if self._look.sums[name][place] is None:  # another objective has more batches
            return
        own, before = self._of(self._look, name)[place], self._before[name][place]
        if own is None or before is None or len(own) != len(before) or min(own, default=0.0) < 0:
            del self._tests[name]
            return
        self._tests[name].add(value - base for value, base in zip(own, before, strict=True))

    def _of(self, look: Look, name: str) -> list[list[float] | None]:
        """Losses of its units by batch."""
        if self._units == "samples":
            return look.samples[name]
        return [None if value is None else [value] for value in look.sums[name]]

    def _whole(self, state: Look, name: str) -> bool:
        """Whether there are units wherever something was looked at."""
        seen = zip(state.sums[name], self._of(state, name), strict=True)
        return all(units is not None for value, units in seen if value is not None)
