"""What repeated timings say: medians, spread, ratios with their uncertainty."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeprune.spec import Measurement

LEAST_SHARE = 0.05
"""A kernel's time is never set below this share of the cost of an empty call: its logarithm must exist."""


UNDISTURBED = 0.95
"""A sample with less than this share of its full CPU time per wall time (see `full_share`) was interrupted."""


OUTLYING = 3.5
"""Scaled median absolute deviations from the median beyond which a sample is an outlier.

Source: Iglewicz and Hoaglin, "How to Detect and Handle Outliers" (ASQC Quality Press, 1993), the modified z-score."""
_NORMAL = 1.4826
"""Of a normal distribution the standard deviation is so many median absolute deviations."""


SINGLE_RUNS = 100
"""Single inferences of a round of which a percentile is taken: its 99th is the second largest."""


@dataclass(frozen=True)
class Ratio:
    """One engine's latency over the reference's, measured interleaved.

    Attributes:
        ratio: Median over the rounds.
        low: Lower end of the confidence interval of that median, see `median_ratio`.
        high: Upper end.
        rounds: Ratio of each round, in order.
    """

    ratio: float
    low: float
    high: float
    rounds: tuple[float, ...]


@dataclass(frozen=True)
class Samples:
    """Samples of one thing in one round.

    Attributes:
        times_ms: Time of one run in each sample, milliseconds; at least one.
        cpu_share: CPU time of the process, all threads together, over wall time of each sample.
        slowed: Of each sample whether somebody else used the core's units meanwhile; empty where nobody looked.
    """

    times_ms: tuple[float, ...]
    cpu_share: tuple[float, ...]
    slowed: tuple[bool, ...] = ()

    @classmethod
    def of(cls, *records: Mapping[str, Any], slowest_ns: float = math.inf) -> Samples:
        """From what the board's ``bench`` told of the item, once or several times.

        Args:
            records: Its events.
            slowest_ns: See `edgeprune.profiling.levels.slowest_pace`.
        """
        return cls(
            tuple(value for record in records for value in record["times_ms"]),
            tuple(value for record in records for value in record["cpu_share"]),
            tuple(value > slowest_ns for record in records for value in paces(record)),
        )

    @property
    def all_slowed(self) -> bool:
        """Whether there is no sample that had the core to itself."""
        return bool(self.slowed) and all(self.slowed)


def paces(record: Mapping[str, Any]) -> list[float]:
    """``pace_ns`` of a sample event; zero for each sample where the board did not look."""
    return list(record.get("pace_ns") or [0.0] * len(record["times_ms"]))


def full_share(shares: Iterable[float], threads: int) -> float:
    """CPU time over wall time of an engine that nothing interrupts.

    One at one thread. Several threads spin, wait and divide their work unevenly, so there it is the most that the engine
    was ever seen to get.

    Args:
        shares: Of all samples of the engine in a run.
        threads: Threads inside one operation.
    """
    return 1.0 if threads == 1 else max(shares)


def undisturbed(samples: Samples, full: float = 1.0) -> list[float]:
    """The samples that nothing interrupted, given the engine's `full_share`, and nobody slowed, where there are such."""
    slowed = samples.slowed or (False,) * len(samples.times_ms)
    fair = [
        (time_ms, slow)
        for time_ms, share, slow in zip(samples.times_ms, samples.cpu_share, slowed, strict=True)
        if share >= UNDISTURBED * full
    ]
    return [time_ms for time_ms, slow in fair if not slow] or [time_ms for time_ms, _ in fair]


def own_times(samples: Samples, threads: int = 1, full: float = 1.0) -> list[float]:
    """What the engine itself took: its undisturbed samples, else, at one thread, the CPU time of each sample.

    CPU time leaves out what others did meanwhile, but not that they emptied the caches: a few percent too long, where
    wall-clock time would be several times too long. It holds for runtimes that compute on the CPU, and only for one
    thread: the CPU time of several adds up, so that wall-clock time is all there is.
    """
    calm = undisturbed(samples, full)
    if calm or threads > 1:
        return calm or list(samples.times_ms)
    return [time * share for time, share in zip(samples.times_ms, samples.cpu_share, strict=True)]


def outlying(rounds: Sequence[Samples], threads: int = 1) -> float:
    """Share of the samples that lie far from the median of their round; they are counted, never left out.

    Args:
        rounds: At least one.
        threads: Threads inside one operation.
    """
    full = full_share((share for samples in rounds for share in samples.cpu_share), threads)
    own = [np.asarray(own_times(samples, threads, full)) for samples in rounds]
    apart = np.concatenate([np.abs(times_ms / np.median(times_ms) - 1.0) for times_ms in own])
    spread = float(np.median(apart)) * _NORMAL
    return float(np.mean(apart > OUTLYING * spread)) if spread > 0 else 0.0


def summarize(rounds: Sequence[Samples], overhead_ms: float = 0.0, threads: int = 1) -> Measurement:
    """Summary of the samples of each round: median and minimum of `own_times`, 90th percentile of all wall-clock times.

    Args:
        rounds: At least one.
        overhead_ms: Cost of an empty call, taken off every sample (but see `LEAST_SHARE`).
        threads: Threads inside one operation.
    """
    full = full_share((share for samples in rounds for share in samples.cpu_share), threads)

    def net(times_ms: Sequence[float]) -> NDArray[np.float64]:
        return np.maximum(np.asarray(times_ms, dtype=np.float64) - overhead_ms, LEAST_SHARE * overhead_ms)

    own = [net(own_times(samples, threads, full)) for samples in rounds]
    medians = np.array([np.median(times_ms) for times_ms in own])
    every = np.concatenate([net(samples.times_ms) for samples in rounds])
    median = float(np.median(medians))
    return Measurement(
        median_ms=median,
        p90_ms=float(np.quantile(every, 0.9)),
        min_ms=float(min(times_ms.min() for times_ms in own)),
        spread=float(np.median(np.abs(medians - median)) / median),
        rounds_ms=tuple(float(value) for value in medians),
        samples=len(every),
        times_ms=tuple(value for samples in rounds for value in samples.times_ms),
        cpu_share=tuple(value for samples in rounds for value in samples.cpu_share),
    )


def at_percentile(rounds: Sequence[Samples], percentile: float) -> Measurement:
    """Summary of a percentile of each round in place of its median, over all wall-clock times.

    Args:
        rounds: At least one, each sample of them one inference.
        percentile: In [0, 100].
    """
    values = np.array([np.percentile(samples.times_ms, percentile) for samples in rounds])
    every = np.concatenate([np.asarray(samples.times_ms) for samples in rounds])
    middle = float(np.median(values))
    return Measurement(
        median_ms=middle,
        p90_ms=float(np.quantile(every, 0.9)),
        min_ms=float(every.min()),
        spread=float(np.median(np.abs(values - middle)) / middle),
        rounds_ms=tuple(float(value) for value in values),
        samples=len(every),
    )


def median_ratio(
    values_ms: Sequence[float],
    reference_ms: Sequence[float],
    *,
    processes: Sequence[int] | None = None,
    process_spread: float = 0.0,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Ratio:
    """Median of the per-round ratios with a bootstrap interval over processes, then over the rounds of each.

    Rounds of one process share its memory layout, so they are not independent: many rounds of few processes would give an
    interval that is too narrow.

    Args:
        values_ms: Per round the engine's median, milliseconds.
        reference_ms: Per round the reference's median, milliseconds, same length.
        processes: Per round the number of the process that timed it; None for rounds that are independent.
        process_spread: Relative standard deviation between processes that is known beforehand. The interval is never
            narrower than it implies: a handful of processes may agree by chance.
        confidence: Probability that the interval is to cover.
        resamples: Bootstrap resamples.
        seed: Seed of the resampling.
    """
    ratios = np.asarray(values_ms, dtype=np.float64) / np.asarray(reference_ms, dtype=np.float64)
    owner = np.arange(len(ratios)) if processes is None else np.asarray(processes)
    groups = [ratios[owner == process] for process in np.unique(owner)]
    source = np.random.default_rng(seed)
    # Weights of the rounds in each resample: how often its process was drawn, then the round among that process's.
    drawn = source.multinomial(len(groups), np.full(len(groups), 1 / len(groups)), size=resamples)
    weights = np.concatenate(
        [
            source.multinomial(drawn[:, number] * len(group), np.full(len(group), 1 / len(group)))
            for number, group in enumerate(groups)
        ],
        axis=1,
    )
    medians = _weighted_medians(np.concatenate(groups), weights)
    middle = float(np.median(ratios))
    tail = (1 - confidence) / 2
    least = NormalDist().inv_cdf(1 - tail) * process_spread / math.sqrt(len(groups)) * middle
    return Ratio(
        ratio=middle,
        low=min(float(np.quantile(medians, tail)), middle - least),
        high=max(float(np.quantile(medians, 1 - tail)), middle + least),
        rounds=tuple(float(value) for value in ratios),
    )


def _weighted_medians(values: NDArray[np.float64], weights: NDArray[np.int64]) -> NDArray[np.float64]:
    """Median of `values` counted `weights` times, one per row of weights; shape (rows,)."""
    order = np.argsort(values)
    ranked, heights = values[order], np.cumsum(weights[:, order], axis=1)
    total = heights[:, -1:]
    lower = ranked[(2 * heights >= total).argmax(axis=1)]
    upper = ranked[(2 * heights > total).argmax(axis=1)]
    return np.asarray((lower + upper) / 2)
