"""Compare engines on a board by ratio: interleaved in the same rounds, so that what disturbs one disturbs all.

Milliseconds of one engine vary by about a percent between processes; the ratio of two that were timed interleaved
varies by a quarter of that. Every acceptance figure is therefore such a ratio; milliseconds are told beside it.

What disturbs all does not disturb all alike: a neighbor on the other hardware thread of a core slows arithmetic down more than
it slows memory. So rounds in which the reference was off its usual level are timed again, and do not count.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from edgeprune.errors import ConfigError
from edgeprune.profiling.levels import COMPARED_PATIENCE, WITHIN, slowest_pace, usual
from edgeprune.profiling.statistics import (
    SINGLE_RUNS,
    Ratio,
    Samples,
    at_percentile,
    full_share,
    median_ratio,
    own_times,
    summarize,
)
from edgeprune.profiling.uploads import upload
from edgeprune.spec import Measurement

if TYPE_CHECKING:
    from edgeprune.boards.board import Board

PROCESS_SPREAD = 0.0027
"""Relative standard deviation of an interleaved ratio between processes, as measured on a quiet machine."""

ALONE_PROCESS_SPREAD = 0.01
"""The same of the milliseconds of one engine."""

SINGLE = {"samples": SINGLE_RUNS, "sample_ms": 0.0, "warmup_ms": 20.0, "item_ms": 60_000.0, "patience": 0.0}
"""The part of a ``bench`` request that has every sample be one inference, of which no time limit cuts any off, and for which
nobody waits."""

_MEDIAN = 50
_LEAST_PROCESSES, _ROUNDS_PER_PROCESS, _AGAIN_PER_PROCESS = 4, 5, 10
# Few rounds without a neighbor say more than many with one now and then: those are of a ratio that nobody asked for.
_LEAST_HELD = 3
# Nothing is known of an engine's time before the first process has run: a deadline that only a hung board misses.
_FIRST_ITEM_S, _START_S, _PATIENCE = 60.0, 120.0, 4.0


@dataclass(frozen=True)
class Comparison:
    """Engines timed interleaved with a reference.

    Attributes:
        reference: Id of the reference.
        ratios: Id to its latency over the reference's (1.0 for the reference itself).
        measurements: Id to its milliseconds; of the percentile that was asked for.
        conditions: State of the board ``before`` and ``after``.
        overhead_ms: Cost of an empty call, milliseconds; not taken off anything here.
        processes: Per round that counts for the reference the number of the process that timed it.
        level_ms: What the reference usually takes, milliseconds, see `edgeprune.profiling.levels`; for the next comparison.
        disturbed: Rounds that do not count, because the reference was off that level or never had the core to itself.
        crowded: Whether hardly any round was undisturbed, so that all count.
    """

    reference: str
    ratios: Mapping[str, Ratio]
    measurements: Mapping[str, Measurement]
    conditions: Mapping[str, Any]
    overhead_ms: float
    processes: tuple[int, ...]
    level_ms: float
    disturbed: int = 0
    crowded: bool = False


@dataclass(frozen=True)
class _Round:
    """One round: in which order, by which process, and what the board told of each engine."""

    order: list[str]
    process: int
    told: Mapping[str, Mapping[str, Any]]


def interleaved(names: list[str], rounds: int) -> list[list[str]]:
    """Order of each round: every engine is first as often as any other, and each order is followed by its reverse."""
    orders = []
    for number in range(rounds):
        turn = (number // 2) % len(names)
        order = names[turn:] + names[:turn]
        orders.append(order[::-1] if number % 2 else order)
    return orders


def compare(
    board: Board,
    engines: Mapping[str, bytes | Path],
    reference: str,
    *,
    runtime: str = "onnxruntime",
    runtimes: Mapping[str, str] | None = None,
    threads: int = 1,
    rounds: int = 20,
    processes: int | None = None,
    samples: int = 3,
    sample_ms: float = 5.0,
    warmup_ms: float = 5.0,
    confidence: float = 0.95,
    seed: int = 0,
    percentile: int = 50,
    level_ms: float | None = None,
    patience: float = COMPARED_PATIENCE,
    progress: Callable[[int, int, float, str], None] | None = None,
) -> Comparison:
    """Time engines interleaved with a reference engine.

    Args:
        board: Where; nobody else should use it meanwhile (`Board.hold`).
        engines: Id to engine file or its bytes, the reference among them.
        reference: Id of the engine that the others are divided by.
        runtime: Runtime that executes them.
        runtimes: Id to the runtime that executes this engine, where that is another one.
        threads: Threads inside one operation.
        rounds: Rounds in all; each times every engine once. Up to twice as many are added for those that others disturbed.
        processes: Fresh processes that share the rounds: how memory happens to be laid out differs by process. By default
            one for every five rounds, at least four.
        samples: Samples per engine and round.
        sample_ms: Least length of one sample, milliseconds.
        warmup_ms: Least warm-up before each engine in each round, milliseconds.
        confidence: Of the interval of each ratio.
        seed: Of the bootstrap.
        percentile: What of a round is compared. Above 50 every sample is a single inference, there are `SINGLE_RUNS` of them
            per engine and round in wall-clock time, and a ratio is that of this percentile of the engine over that of the
            reference in the same round; `samples`, `sample_ms` and `warmup_ms` do not count then, and all rounds do:
            disturbances are what a tail is made of.
        level_ms: `Comparison.level_ms` of an earlier comparison with the same reference: a whole comparison may lie in a
            disturbance, which then is seen.
        patience: See `edgeprune.profiling.levels.COMPARED_PATIENCE`; 0 does not look at who slows the core down, and counts
            all rounds: for a hot board, whose clock falls and rises.
        progress: Told (items done, items in all, seconds left, what happens).

    Raises:
        ConfigError: The reference is not among the engines, or there are no rounds.
        RemoteError: The board was lost.
        BackendError: An engine does not load on the board.
    """
    if reference not in engines:
        raise ConfigError(f"the reference must be one of the engines {sorted(engines)}, found {reference!r}.")
    count = max(_LEAST_PROCESSES, rounds // _ROUNDS_PER_PROCESS) if processes is None else processes
    if rounds < 1 or count < 1:
        raise ConfigError(f"there must be at least one round and one process, found {rounds} and {count}.")
    names = [reference, *sorted(name for name in engines if name != reference)]
    request = {
        "runtime": runtime,
        "threads": threads,
        "engines": {
            name: {**entry, "runtime": runtimes[name]} if runtimes and name in runtimes else entry
            for name, entry in upload(board, engines, kernels=()).items()
        },
        "samples": samples,
        "sample_ms": sample_ms,
        "warmup_ms": warmup_ms,
        "patience": patience,
        **(SINGLE if percentile != _MEDIAN else {}),
    }
    timing = _Timing(board, names, request, rounds, level_ms, progress)
    for part in _parts(interleaved(names, rounds), count):
        timing.run(part)
    choosy = percentile == _MEDIAN and patience > 0
    if choosy:
        timing.again()
    timing.finished()
    counted = {name: timing.counted(name) if choosy else timing.taken for name in names}

    def summary(name: str, rounds: Sequence[_Round]) -> Measurement:
        rows = timing.samples(name, rounds)
        return summarize(rows, threads=threads) if percentile == _MEDIAN else at_percentile(rows, percentile)

    results = timing.results
    return Comparison(
        reference=reference,
        ratios={
            name: median_ratio(
                summary(name, rows).rounds_ms,
                summary(reference, rows).rounds_ms,
                processes=[one.process for one in rows],
                process_spread=0.0 if name == reference else PROCESS_SPREAD,
                confidence=confidence,
                seed=seed,
            )
            for name, rows in counted.items()
        },
        measurements={name: summary(name, rows) for name, rows in counted.items()},
        conditions={"before": results[0]["conditions"]["before"], "after": results[-1]["conditions"]["after"]},
        overhead_ms=median([result["overhead_ms"] for result in results]),
        processes=tuple(one.process for one in counted[reference]),
        level_ms=timing.usual_ms(),
        disturbed=len(timing.taken) - len(counted[reference]),
        crowded=choosy and timing.crowded(),
    )


def disturbance(comparisons: Iterable[Comparison]) -> str:
    """A clause on the rounds of some comparisons that were disturbed; empty where none was."""
    found = list(comparisons)
    if any(one.crowded for one in found):
        return "nearly all rounds were disturbed, so all count"
    left_out = sum(one.disturbed for one in found)
    rounds = left_out + sum(len(one.processes) for one in found)
    return f"leaving out {left_out} of {rounds} rounds as disturbed" if left_out else ""


class _Timing:
    """The rounds of one comparison.

    Args:
        board: Where.
        names: Ids of the engines, the reference first.
        request: What the board's ``bench`` is asked, but for the rounds.
        rounds: Rounds that are to count; others are added for those that were disturbed, see `again`.
        level_ms: What the reference took in an earlier comparison, milliseconds.
        progress: See `compare`.
    """

    def __init__(
        self,
        board: Board,
        names: list[str],
        request: Mapping[str, Any],
        rounds: int,
        level_ms: float | None,
        progress: Callable[[int, int, float, str], None] | None,
    ) -> None:
        self.board, self.names, self.request, self.rounds = board, names, request, rounds
        self.level_ms, self.progress = level_ms, progress
        self.taken: list[_Round] = []
        self.results: list[dict[str, Any]] = []
        self.due = rounds * len(names)
        self.begun = time.monotonic()

    def run(self, part: list[list[str]]) -> None:
        """Time rounds of these orders in one process."""
        rows: list[dict[str, Mapping[str, Any]]] = []
        before = len(self.taken) * len(self.names)

        def on_event(event: dict[str, Any]) -> None:
            if event.get("event") == "sample":
                if not rows or len(rows[-1]) == len(self.names):
                    rows.append({})
                rows[-1][event["id"]] = event
                self._tell(before + sum(map(len, rows)))

        item_s = _PATIENCE * (time.monotonic() - self.begun) / before if before else _FIRST_ITEM_S
        request = {**self.request, "rounds": part}
        deadline_s = _START_S + len(part) * len(self.names) * item_s
        self.results.append(self.board.call("bench", request, timeout_s=deadline_s, on_event=on_event))
        process = len(self.results) - 1
        self.taken += [_Round(order, process, row) for order, row in zip(part, rows, strict=True)]

    def again(self) -> None:
        """Time rounds again that say nothing: at most as many as there were, twice as many where hardly any says something."""
        while True:
            # The level of an earlier comparison may not have been seen at all yet: all of this one may lie in a disturbance.
            level_ms = min(self.usual_ms(), self.level_ms or math.inf)
            held = min((self.held(name, level_ms) for name in self.names), key=sum)
            most = self.rounds * (2 if sum(held) >= _LEAST_HELD else 3)
            missing = min(most - len(self.taken), self.rounds - sum(held), _AGAIN_PER_PROCESS)
            if missing <= 0:
                return
            self.due += missing * len(self.names)
            self.run([one.order for one, fine in zip(self.taken, held, strict=True) if not fine][-missing:])

    def counted(self, name: str) -> list[_Round]:
        """Rounds that say what the ratio of an engine is; all where that is known of hardly any."""
        held = [one for one, fine in zip(self.taken, self.held(name, self.usual_ms()), strict=True) if fine]
        return held if len(held) >= min(_LEAST_HELD, self.rounds) else self.taken

    def crowded(self) -> bool:
        """Whether hardly any round is known to say what the reference takes, so that all count."""
        return sum(self.held(self.names[0], self.usual_ms())) < min(_LEAST_HELD, self.rounds)

    def usual_ms(self) -> float:
        """What the reference usually takes, milliseconds; as in an earlier comparison where it came near that again."""
        slowed = [one.all_slowed for one in self.samples(self.names[0], self.taken)]
        every, known = self._reference_ms(), self.level_ms
        times = [time_ms for time_ms, slow in zip(every, slowed, strict=True) if not slow] or every
        level = usual(times)
        return level if known is None or min(times) > known * (1 + WITHIN) else min(level, known)

    def held(self, name: str, level_ms: float) -> list[bool]:
        """Per round whether the reference held that level, and it and the engine had the core to itself once at least."""
        both = zip(*(self.samples(one, self.taken) for one in (self.names[0], name)), strict=True)
        return [
            abs(time_ms / level_ms - 1) <= WITHIN and not any(one.all_slowed for one in samples)
            for time_ms, samples in zip(self._reference_ms(), both, strict=True)
        ]

    def samples(self, name: str, rounds: Sequence[_Round]) -> list[Samples]:
        """What an engine took in each of these rounds."""
        every = [value for one in self.taken for told in one.told.values() for value in told.get("pace_ns", ())]
        slowest_ns = slowest_pace(every)
        return [Samples.of(one.told[name], slowest_ns=slowest_ns) for one in rounds]

    def _reference_ms(self) -> list[float]:
        threads = self.request["threads"]
        samples = self.samples(self.names[0], self.taken)
        full = full_share((share for one in samples for share in one.cpu_share), threads)
        return [median(own_times(one, threads, full)) for one in samples]

    def finished(self) -> None:
        """Tell that no further round is timed."""
        self._tell(self.due, finished=True)

    def _tell(self, done: int, finished: bool = False) -> None:
        """Tell how far it is: a share that never falls, since what is timed again was not counted on."""
        if self.progress is not None:
            planned = self.rounds * len(self.names)
            left_s = (time.monotonic() - self.begun) * (self.due - done) / done
            shown = planned if finished else min(done, planned - 1)
            self.progress(shown, planned, left_s, f"timing {len(self.names)} engines interleaved")


def _parts(orders: list[list[str]], processes: int) -> list[list[list[str]]]:
    """Orders in at most `processes` runs of about equal length, none empty."""
    count = min(processes, len(orders))
    bounds = [len(orders) * number // count for number in range(count + 1)]
    return [orders[start:end] for start, end in pairwise(bounds)]
