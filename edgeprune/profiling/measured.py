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
        drift: Largest relative distance of a counted sentinel from its usual level, see `edgeprune.profiling.levels`.
        repeated_rounds: How many stretches of rounds were measured again because a sentinel had drifted.
        overhead_ms: Cost of an empty call, milliseconds.
        sentinel: Id of the sentinel.
        spent_s: Wall-clock seconds that the board was busy with it, interrupted attempts included.
        earlier_s: Seconds of these before the run was interrupted, where it goes on from a journal; not compared.
        lost_s: Seconds of these in which the board waited for a core of its own, or timed what did not count.
        level_ms: What the sentinel usually takes, milliseconds.
        sentinels_ms: What each sentinel took, milliseconds, in the order of measuring; those of repeated stretches too.
        flags: Id to what is doubtful: ``"drifted"`` (in no round did its sentinels hold, or in each
            somebody else used the core's units), ``"below-overhead"`` (its
            own time is too small beside the call's), ``"preempted"`` (no undisturbed sample in most rounds), ``"unstable"``
            (warm-up never settled), ``"outliers"`` (more than a fifth of its samples lie far from their median, see `outlying`;
            they are kept, and its median hardly feels them).
        unusable: Id to the reason why the board could not run it.
        layers: Id to what its layers took, one list of names and milliseconds for each timing that counts; of runtimes that time
            their layers.
    """

    measurements: Mapping[str, Measurement]
    rounds: Mapping[str, tuple[float, ...]]
    conditions: Mapping[str, Any]
    drift: float
    repeated_rounds: int
    overhead_ms: float
    sentinel: str
    spent_s: float = 0.0
    earlier_s: float = field(default=0.0, compare=False)
    lost_s: float = 0.0
    level_ms: float = 0.0
    sentinels_ms: tuple[float, ...] = ()
    disturbances: tuple[str, ...] = ()
    flags: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    unusable: Mapping[str, str] = field(default_factory=dict)
    layers: Mapping[str, Sequence[Sequence[tuple[str, float]]]] = field(default_factory=dict)


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
    # Of each item the records of rounds that held, and those of all others.
    held: dict[str, list[list[dict[str, Any]]]] = {name: [] for name in names}
    drifted: dict[str, list[list[dict[str, Any]]]] = {name: [] for name in names}
    worst = {True: 0.0, False: 0.0}
    slowest_ns = ledger.levels.slowest_ns
    for number, layout in enumerate(layouts):
        marks: dict[bool, dict[int, dict[str, Any]]] = {True: {}, False: {}}
        for stretch in range(len(layout)):
            choice = ledger.chosen(number, stretch, drift_limit)
            if choice is None:
                continue
            place, kept, drift = choice
            worst[kept] = max(worst[kept], drift)
            marks[kept].update((id(record), record) for record in ledger.sentinels(place))
            for name, record in ledger.samples(place).items():
                fair = kept and not Samples.of(record, slowest_ns=slowest_ns).all_slowed
                (held if fair else drifted)[name].append([record])
        for kept, into in ((True, held), (False, drifted)):
            if marks[kept]:
                into[sentinel].append(list(marks[kept].values()))
    # A round in which others slowed the board down does not count where another one was measured undisturbed.
    counted = {name: held[name] or drifted[name] for name in names}
    doubts: dict[str, set[str]] = {name: {"drifted"} if drifted[name] and not held[name] else set() for name in names}
    samples = {name: [Samples.of(*rows, slowest_ns=slowest_ns) for rows in rounds] for name, rounds in counted.items()}
    records = {name: [record for rows in rounds for record in rows] for name, rounds in counted.items()}
    forced = any("drifted" in found for found in doubts.values())
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
        drift=worst[False] if forced else worst[True],
        repeated_rounds=ledger.repeated,
        overhead_ms=overhead_ms,
        sentinel=sentinel,
        spent_s=ledger.spent_s,
        earlier_s=ledger.earlier_s,
        lost_s=ledger.lost_s,
        level_ms=ledger.levels.usual_ms,
        sentinels_ms=ledger.levels.sentinels_ms,
        flags={name: tuple(sorted(found)) for name, found in doubts.items() if found},
        unusable=dict(ledger.unusable),
        layers={name: told for name, rows in records.items() if (told := _layers(rows))},
    )


def _layers(records: Sequence[Mapping[str, Any]]) -> list[list[tuple[str, float]]]:
    return [[(str(name), float(ms)) for name, ms in record["layers"]] for record in records if record.get("layers")]


def _doubts(records: Sequence[Mapping[str, Any]], threads: int) -> set[str]:
    found = set()
    least = UNDISTURBED * full_share((share for record in records for share in record["cpu_share"]), threads)
    if sum(max(record["cpu_share"]) < least for record in records) * 2 > len(records):
        found.add("preempted")
    if sum(record["stable"] is False for record in records) * 2 > len(records):
        found.add("unstable")
    return found
