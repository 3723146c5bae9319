"""Rounds of a measuring run: order, sentinels, and which stretches of a round must be measured again.

A round measures every item once, in its own seeded order. It is cut into stretches; a sentinel is measured before the
first, between any two, and after the last. A stretch with a sentinel that left the run's usual level is measured again
whole; that level changes while the run goes on, so what is kept are the sentinels, never a verdict. Nothing here talks
to a board: `Ledger` is built from the journal's records alone, so a resumed run goes on where it was.
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from edgeprune.profiling.levels import slowest_pace, usual
from edgeprune.profiling.statistics import Samples, full_share, undisturbed

Record = dict[str, Any]
Place = tuple[int, int, int]
"""(round, attempt, stretch)"""


@dataclass(frozen=True)
class Slot:
    """One item of a call to the board.

    Attributes:
        name: Id of the engine.
        stretch: The stretch that it belongs to; None for a sentinel.
        opens: For a sentinel, the stretch that it stands before.
        closes: For a sentinel, the stretch that it stands after.
    """

    name: str
    stretch: int | None = None
    opens: int | None = None
    closes: int | None = None


def stretches(
    names: Iterable[str],
    *,
    every: int,
    seed: int,
    round_number: int,
    often: Collection[str] = (),
    passes: int = 1,
) -> list[tuple[str, ...]]:
    """The items of one round in their order, cut into stretches of at most `every`; at least one stretch.

    The order depends on the set of names, the seed and the round's number, `often` and `passes`, and on nothing else.

    Args:
        names: Every item.
        every: Most items in a stretch; those that come often may make it a few more.
        seed: Of the order.
        round_number: Of the order too.
        often: Items that come `passes` times, in stretches that lie as far apart as can be.
        passes: How often; there are at least as many stretches.
    """
    dice = random.Random(f"{seed}/{round_number}")
    order = sorted(names)
    dice.shuffle(order)
    again = [name for name in order if name in often] if passes > 1 else []
    once = [name for name in order if name not in again]
    if not again:
        return [tuple(once[start : start + every]) for start in range(0, len(once), every)] or [()]
    count = max(passes, math.ceil((len(once) + passes * len(again)) / every))
    parts: list[list[str]] = [[] for _ in range(count)]
    for place, name in enumerate(again):
        for turn in range(passes):
            parts[(place + turn * count // passes) % count].append(name)
    for name in once:
        min(parts, key=len).append(name)
    for part in parts:
        dice.shuffle(part)
    return [tuple(part) for part in parts]


def slots(todo: Sequence[tuple[int, Sequence[str]]], sentinel: str) -> list[Slot]:
    """Order of one call: sentinel, stretch, sentinel, stretch, ... sentinel.

    Args:
        todo: Stretch number and what is left of it to measure, at least one.
        sentinel: Id of the sentinel.
    """
    order = [Slot(sentinel, opens=todo[0][0])]
    for place, (stretch, names) in enumerate(todo):
        order += [Slot(name, stretch=stretch) for name in names]
        following = todo[place + 1][0] if place + 1 < len(todo) else None
        order.append(Slot(sentinel, opens=following, closes=stretch))
    return order


def drift(sentinels_ms: Iterable[float], usual_ms: float) -> float:
    """Largest relative distance of a stretch's sentinels from the run's usual level; 0 where no sentinel tells anything."""
    return max((abs(value / usual_ms - 1.0) for value in sentinels_ms), default=0.0)


def level_ms(record: Mapping[str, Any], full: float = 1.0, slowest_ns: float = math.inf) -> float:
    """Median of a sample record's undisturbed samples, milliseconds; of all where there is none.

    Wall-clock time on purpose: a stretch that had the core to itself at no time is to be measured again.
    """
    return float(median(undisturbed(Samples.of(record, slowest_ns=slowest_ns), full) or record["times_ms"]))


def _tells(record: Mapping[str, Any], slowest_ns: float) -> bool:
    return not Samples.of(record, slowest_ns=slowest_ns).all_slowed


@dataclass(frozen=True)
class _Levels:
    """What is usual in a run.

    Attributes:
        full_share: Of the sentinel, see `edgeprune.profiling.statistics.full_share`.
        slowest_ns: See `edgeprune.profiling.levels.slowest_pace`.
        sentinels_ms: What each sentinel took, milliseconds, in order.
        usual_ms: What the sentinel usually takes, milliseconds: as an earlier part of the run told, else
            `edgeprune.profiling.levels.usual`.
    """

    full_share: float
    slowest_ns: float
    sentinels_ms: tuple[float, ...]
    usual_ms: float


class Ledger:
    """What has been measured so far.

    Args:
        records: A journal's records, in order.
        threads: Threads inside one operation.

    Attributes:
        unusable: Engines that the board could not run, with the reason.
        overheads_ms: Cost of an empty call, one value per call to the board.
        conditions: States of the board, as read before and after calls.
        spent_s: Wall-clock seconds that calls to the board took.
        earlier_s: Seconds of these in the records that there were, of a run that was interrupted.
        lost_s: Seconds of these in which the board waited for its core, or timed what did not count.
        measured: Items measured at the first attempt, closing sentinels included.
        level_ms: What the sentinel usually takes, milliseconds, where an earlier part of the run told; else None.
    """

    def __init__(self, records: Iterable[Record] = (), threads: int = 1) -> None:
        self._items: dict[Place, dict[str, Record]] = {}
        self._sentinels: dict[Place, list[Record]] = {}
        self._closed: set[Place] = set()
        self._marks: list[Record] = []
        self._paces_ns: list[float] = []
        self._told: _Levels | None = None
        self._threads = threads
        self.unusable: dict[str, str] = {}
        self.overheads_ms: list[float] = []
        self.conditions: list[Record] = []
        self.spent_s = self.earlier_s = 0.0
        self.lost_s = 0.0
        self.measured = 0
        self.level_ms: float | None = None
        for record in records:
            self.add(record)
        self.earlier_s = self.spent_s

    def add(self, record: Record) -> None:
        """Take one record of the journal into account."""
        self._told = None
        self.spent_s += record.get("seconds", 0.0)
        kind = record["kind"]
        if kind == "sample":
            self._add_sample(record)
        elif kind == "unusable":
            self.unusable[record["id"]] = record["message"]
        elif kind == "call":
            self.overheads_ms.append(record["overhead_ms"])
        if kind in ("call", "end"):
            self.conditions.append(record["conditions"])

    def _add_sample(self, record: Record) -> None:
        where = record["round"], record["attempt"]
        self.lost_s += record.get("lost_s", 0.0)
        self._paces_ns += record.get("pace_ns", ())
        if record["stretch"] is not None:
            self._items.setdefault((*where, record["stretch"]), {})[record["id"]] = record
            self.measured += record["attempt"] == 0
            return
        self._marks.append(record)
        for stretch in (record["opens"], record["closes"]):
            if stretch is not None:
                self._sentinels.setdefault((*where, stretch), []).append(record)
        if record["closes"] is not None:
            self._closed.add((*where, record["closes"]))
            self.measured += record["attempt"] == 0

    def left(self, place: Place, names: Sequence[str]) -> list[str]:
        """Those of a stretch's items that still have to be measured, in order."""
        done: Collection[str] = self._items.get(place, {})
        return [name for name in names if name not in done and name not in self.unusable]

    def open(self, place: Place, names: Sequence[str]) -> bool:
        """Whether a stretch still needs the board: items are missing, or its closing sentinel is."""
        return place not in self._closed or bool(self.left(place, names))

    def begun(self, place: Place) -> bool:
        """Whether anything of that stretch was recorded."""
        return place in self._items or place in self._sentinels

    @property
    def levels(self) -> _Levels:
        """What is usual, by all records so far."""
        if self._told is None:
            full = full_share((share for record in self._marks for share in record["cpu_share"]), self._threads)
            slowest_ns = slowest_pace(self._paces_ns)
            sentinels_ms = tuple(level_ms(record, full, slowest_ns) for record in self._marks)
            telling = [
                time_ms for time_ms, record in zip(sentinels_ms, self._marks, strict=True) if _tells(record, slowest_ns)
            ]
            usual_ms = self.level_ms or (usual(telling or sentinels_ms) if sentinels_ms else math.nan)
            self._told = _Levels(full, slowest_ns, sentinels_ms, usual_ms)
        return self._told

    def drifts(self, number: int, stretch: int) -> list[float]:
        """Drift of each finished attempt at a stretch, in order, against the usual level as it is now.

        A sentinel that a neighbor slowed tells nothing of what lies around it, where each item's own samples do.
        """
        now = self.levels
        places = sorted(place for place in self._closed if place[0::2] == (number, stretch))
        telling = [[record for record in self._sentinels[place] if _tells(record, now.slowest_ns)] for place in places]
        return [
            drift((level_ms(record, now.full_share, now.slowest_ns) for record in records), now.usual_ms)
            for records in telling
        ]

    def chosen(self, number: int, stretch: int, limit: float) -> tuple[Place, bool, float] | None:
        """The attempt at a stretch that counts, whether its drift is within the limit, and its drift.

        That is the first whose sentinels held, else the one whose sentinels drifted least; None when none is finished.
        """
        drifts = self.drifts(number, stretch)
        if not drifts:
            return None
        found = next((value for value in drifts if value <= limit), min(drifts))
        return (number, drifts.index(found), stretch), found <= limit, found

    def samples(self, place: Place) -> dict[str, Record]:
        """Sample records of a stretch's items."""
        return dict(self._items.get(place, {}))

    def sentinels(self, place: Place) -> list[Record]:
        """Sample records of the sentinels around a stretch."""
        return list(self._sentinels.get(place, []))

    @property
    def repeated(self) -> int:
        """Number of times that a stretch was measured again."""
        return sum(1 for place in self._closed if place[1] > 0)
