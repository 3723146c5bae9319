"""What a measuring run came to: summaries, conditions, and what is doubtful, from the records of its journal."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from edgeprune.profiling.changes import changes
from edgeprune.profiling.rounds import Ledger
from edgeprune.profiling.statistics import UNDISTURBED, Samples, full_share, outlying, summarize
from edgeprune.spec import Measurement

TRUST = 0.5
"""A kernel whose own time is below this share of an empty call's cost is flagged."""

OUTLIERS = "outliers"
_OUTLIERS_SHARE = 0.2
"""Fewer outliers than this are what any machine has: of fifteen samples two are no reason for doubt, four are."""


@dataclass(frozen=True)
class MeasuredRun:
    """What a measuring run found.

    Attributes:
        measurements: Id to its summary; kernels without the cost of the call itself.
        rounds: Id to the median of each time that it was measured, milliseconds, in the order of the rounds.
        conditions: State of the board as read ``before`` the first and ``after`` the last call to it.
        disturbances: What became of the board meanwhile, in sentences; see `changes.changes`.
        drift: Largest relative distance of a counted sentinel from the run's median, or from `measure`'s ``level_ms``.
        repeated_rounds: How many stretches of rounds were measured again because a sentinel had drifted.
        overhead_ms: Cost of an empty call, milliseconds.
        sentinel: Id of the sentinel.
        spent_s: Wall-clock seconds that the board was busy with it, interrupted attempts included.
        level_ms: Median of all sentinels, milliseconds.
        sentinels_ms: What each sentinel took, milliseconds, in the order of measuring; those of repeated stretches too.
        flags: Id to what is doubtful: ``"drifted"`` (kept although its sentinels drifted), ``"below-overhead"`` (its
            own time is too small beside the call's), ``"preempted"`` (no undisturbed sample in most rounds), ``"unstable"``
            (warm-up never settled), ``"outliers"`` (more than a fifth of its samples lie far from their median, see `outlying`;
            they are kept, and its median hardly feels them).
        unusable: Id to the reason why the board could not run it.
    """

    measurements: Mapping[str, Measurement]
    rounds: Mapping[str, tuple[float, ...]]
    conditions: Mapping[str, Any]
    drift: float
    repeated_rounds: int
    overhead_ms: float
    sentinel: str
    spent_s: float = 0.0
    level_ms: float = 0.0
    sentinels_ms: tuple[float, ...] = ()
    disturbances: tuple[str, ...] = ()
    flags: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    unusable: Mapping[str, str] = field(default_factory=dict)


def measured_run(
    ledger: Ledger,
    layouts: Sequence[Sequence[Sequence[str]]],
    items: Iterable[str],
    kernels: Collection[str],
    sentinel: str,
    *,
    drift_limit: float,
    threads: int,
) -> MeasuredRun:
    """What the records of a run come to.

    Args:
        ledger: Of the records.
        layouts: Per round its stretches, each with the ids in it.
        items: Ids of all that was measured, the sentinel's among them.
        kernels: Those that the cost of the call is taken off.
        sentinel: Id of the sentinel.
        drift_limit: See `edgeprune.profiling.measuring.Protocol`.
        threads: Threads inside one operation.
    """
    names = list(items)
    samples: dict[str, list[Samples]] = {name: [] for name in names}
    doubts: dict[str, set[str]] = {name: set() for name in names}
    records: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    worst = 0.0
    for number, layout in enumerate(layouts):
        marks: dict[int, dict[str, Any]] = {}
        for stretch in range(len(layout)):
            choice = ledger.chosen(number, stretch, drift_limit)
            if choice is None:
                continue
            place, kept, drift = choice
            worst = max(worst, drift)
            marks.update((id(record), record) for record in ledger.sentinels(place))
            for name, record in ledger.samples(place).items():
                samples[name].append(Samples.of(record))
                records[name].append(record)
                if not kept:
                    doubts[name].add("drifted")
        samples[sentinel].append(Samples.of(*marks.values()))
        records[sentinel] += marks.values()
    overhead_ms = median(ledger.overheads_ms)
    measurements = {
        name: summarize(taken, overhead_ms if name in kernels else 0.0, threads)
        for name, taken in samples.items()
        if taken
    }
    for name, found in measurements.items():
        doubts[name] |= _doubts(records[name], threads)
        if name in kernels and found.median_ms < TRUST * overhead_ms:
            doubts[name].add("below-overhead")
        if outlying(samples[name], threads) > _OUTLIERS_SHARE:
            doubts[name].add(OUTLIERS)
    return MeasuredRun(
        measurements=measurements,
        rounds={name: found.rounds_ms for name, found in measurements.items()},
        conditions={"before": ledger.conditions[0], "after": ledger.conditions[-1]},
        disturbances=changes(ledger.conditions),
        drift=worst,
        repeated_rounds=ledger.repeated,
        overhead_ms=overhead_ms,
        sentinel=sentinel,
        spent_s=ledger.spent_s,
        level_ms=ledger.median_ms,
        sentinels_ms=tuple(ledger.sentinels_ms),
        flags={name: tuple(sorted(found)) for name, found in doubts.items() if found},
        unusable=dict(ledger.unusable),
    )


def _doubts(records: Sequence[Mapping[str, Any]], threads: int) -> set[str]:
    found = set()
    least = UNDISTURBED * full_share((share for record in records for share in record["cpu_share"]), threads)
    if sum(max(record["cpu_share"]) < least for record in records) * 2 > len(records):
        found.add("preempted")
    if sum(record["stable"] is False for record in records) * 2 > len(records):
        found.add("unstable")
    return found
