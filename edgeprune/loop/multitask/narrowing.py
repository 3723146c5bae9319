"""One layer of a search: the narrowest of its widths at which no objective's loss exceeds what is tolerated."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgeprune.loop.multitask.commits import State, expected_first, last_below, last_good
from edgeprune.loop.multitask.layers import narrowed

if TYPE_CHECKING:
    from collections.abc import Collection, MutableMapping, Sequence

    from edgeprune.allocation.choices import Choice
    from edgeprune.criteria._base import Scores
    from edgeprune.loop.multitask.look import Look
    from edgeprune.loop.multitask.looking import Looking
    from edgeprune.loop.multitask.pagcp import Pagcp
    from edgeprune.loop.multitask.rooms import Rooms


@dataclass(frozen=True)
class Narrowing:
    """What is asked of one layer.

    Attributes:
        settings: How.
        looking: Looks at cut models.
        rooms: What limits leave.
        state: The model so far.
        choice: The layer.
        widths: That it may get, descending.
        scores: By which its units stay.
        serves: The objectives that depend on it.
        base: Losses that tolerances refer to.
        tolerated: What they may be multiplied by.
        stopped: How often each objective stopped a layer; counted on.
    """

    settings: Pagcp
    looking: Looking
    rooms: Rooms
    state: State
    choice: Choice
    widths: Sequence[int]
    scores: Scores
    serves: Collection[str]
    base: Mapping[str, float]
    tolerated: Mapping[str, float]
    stopped: MutableMapping[str, int]

    def run(self) -> State | None:
        """The model with the layer as narrow as it may be, or None where none of it may go."""
        self.looking.reorder()
        alpha = self.settings.early_stop
        options: dict[str, Any] = {"most": self._most(), "alpha": alpha} if alpha else {}
        seen: dict[int, Look] = {}
        glanced: dict[int, Look] = {}

        def over(place: int) -> dict[str, float]:
            """By how much each objective is beyond what is tolerated, above 1."""
            if place not in seen:
                earlier = glanced.pop(place, None)
                seen[place] = self.looking.look(self._kept(place), self.serves, earlier=earlier, **options)
            found = self._over(seen[place].losses)
            # A bound is exceeded where it was stopped, even if the mean so far is not beyond; bounds are only tightened later on.
            return found or (dict.fromkeys(seen[place].losses, 1.0) if seen[place].stopped else {})

        def glance(place: int) -> float:
            """What a width seems to use of what there is, by one batch; above 1 it is not allowed."""
            found = self.looking.look(self._kept(place), self.serves, batches=1, **options)
            if found.stopped:
                seen[place] = found
                return math.inf
            glanced[place] = found
            assert self.looking.state is not None
            return self._used(found.beside(self.looking.state))

        def good(place: int) -> bool:
            return not over(place)

        count = len(self.widths)
        if not self.settings.bisect:
            best = last_good(count, good, bisect=False)
        elif self.looking.batches > 1 and count > 1:
            # One batch says where to look; what is found was looked at whole.
            best = expected_first(count, good, last_below(count, glance))
        else:
            best = last_good(count, good, bisect=True)
        if best + 1 < count and (first := over(best + 1)):
            self.stopped[max(first, key=lambda name: first[name])] += 1
        while best >= 0:
            after, look = self._kept(best), seen[best]
            broken = self.rooms.broken(self.looking.metrics(after, look)) if self.rooms.limited else []
            if not broken:
                self.looking.take(look)
                changed = {**self.state.widths, **dict.fromkeys(self.choice.groups, self.widths[best])}
                return State(changed, after, {**self.state.losses, **look.losses})
            for name in broken:
                # The fit allowed more than the metric does.
                self.stopped[name] += 1
                self.rooms.tighten(name, {**self.state.losses, **look.losses}[name])
            best -= 1
            while best >= 0 and over(best):
                best -= 1
        return None

    def _kept(self, place: int) -> dict[str, tuple[int, ...]]:
        return narrowed(self.state.kept, self.scores, dict.fromkeys(self.choice.groups, self.widths[place]))

    def _most(self) -> dict[str, float]:
        bounds = self.rooms.most(self.base, self.tolerated)
        return {name: bound for name, bound in bounds.items() if name in self.serves and math.isfinite(bound)}

    def _used(self, looked: Mapping[str, float]) -> float:
        """The largest share of what a loss may grow by that it has grown by."""
        used = 0.0
        for name, bound in self.rooms.most(self.base, self.tolerated).items():
            grown, left = looked.get(name, 0.0) - self.state.losses[name], bound - self.state.losses[name]
            if name in looked and grown > 0:
                used = max(used, grown / left if left > 0 else math.inf)
        return used

    def _over(self, looked: Mapping[str, float]) -> dict[str, float]:
        losses = {**self.state.losses, **looked}
        grown = self.rooms.ratios(losses, self.base)
        return {
            name: ratio / self.tolerated[name]
            for name, ratio in grown.items()
            if ratio > self.tolerated[name] or not self.rooms.allows(name, losses[name])
        }
