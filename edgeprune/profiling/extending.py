"""Extend a table by a further model: what it lacks, and whether the board is as quick as it was.

A kernel is known when the table holds it, or predicts it closely enough: within `WIDE_HALF_WIDTH`, or so that even the end
of its interval moves no network by more than `NEGLIGIBLE`. Times of two runs belong into one table only when the board
was equally quick in both. So some kernels of the table, the *anchors*, are measured again in the same rounds as what is
new; a common change of all of them is taken out of the new times and stated, and anything else is refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median
from typing import TYPE_CHECKING, Any

from edgeprune.errors import TableMismatchError, UnstableMeasurementError, UnsupportedKernelError
from edgeprune.latency.identities import differing, told
from edgeprune.latency.predictor import Estimate
from edgeprune.profiling.measured import OUTLIERS
from edgeprune.profiling.space import Reach
from edgeprune.spec import Kernel, Measurement

if TYPE_CHECKING:
    from edgeprune.latency.predictor import Predictor
    from edgeprune.latency.table import LatencyTable

WIDE_HALF_WIDTH = math.log(1.1)
"""A kernel whose interval reaches farther than this, in log space, is measured..."""

NEGLIGIBLE = 0.003
"""...unless it moves no network that runs it by more than this share."""

ANCHORS = 8
"""Kernels of the table that are measured again."""

SAME = 0.03
"""A change of speed up to this share is the usual difference between two runs; nothing is scaled."""

AGREE = 0.05
"""Anchors agree when the median distance of their ratios from the common one is at most this, in log space."""

MOST = 0.25
"""A board that changed by more than this share is in another state, and not comparable."""

_SHORTEST_ANCHOR_MS = 0.02


def require_same(table: LatencyTable, identity: Mapping[str, Any], runtime: str, threads: int, precision: str) -> None:
    """See that a table may be extended on this board.

    Raises:
        TableMismatchError: It is of another device, runtime, runtime version, thread count or precision; names the field.
    """
    header = table.header
    held = {**header["identity"], **{name: header[name] for name in ("runtime", "threads", "precision")}}
    wanted = {**identity, "runtime": runtime, "threads": threads, "precision": precision}
    for name in differing(held, wanted):
        where = "asked for" if name in ("precision", "threads") else "on the board"
        raise TableMismatchError(
            f"a table can only be extended on the device and runtime it was measured with; {name} is "
            f"{_short(name, held.get(name))} in the table and {_short(name, wanted.get(name))} {where}.",
            hint="profile into another table: --out other.parquet, without --table",
        )


def lacking(wanted: Sequence[Kernel], reached: Reach, predictor: Predictor) -> list[Kernel]:
    """Those of the wanted kernels that a table neither holds nor predicts closely enough, in their order."""
    held = set(predictor.table.kernels)
    known = estimates(predictor, [*wanted, *reached.kernels()])
    shares = _largest_shares(reached, known)

    def close(kernel: Kernel) -> bool:
        if kernel in held:
            return True
        if kernel not in known or known[kernel].source == "fallback":
            return False
        half_width = known[kernel].half_width
        return half_width <= WIDE_HALF_WIDTH or half_width * shares.get(kernel, 1.0) <= NEGLIGIBLE

    return [kernel for kernel in wanted if not close(kernel)]


def estimates(predictor: Predictor, kernels: Iterable[Kernel]) -> dict[Kernel, Estimate]:
    """What a predictor says of kernels; those of families that its table lacks are left out."""
    families: dict[tuple[str, str], list[Kernel]] = {}
    for kernel in dict.fromkeys(kernels):
        families.setdefault((kernel.family, kernel.precision), []).append(kernel)
    found: dict[Kernel, Estimate] = {}
    for members in families.values():
        try:
            frame = predictor.predict(members)
        except UnsupportedKernelError:
            continue
        for kernel, ms, high_ms, source in zip(members, frame["ms"], frame["high_ms"], frame["source"], strict=True):
            found[kernel] = Estimate(float(ms), math.log(high_ms / ms), str(source))
    return found


def _largest_shares(reached: Reach, known: Mapping[Kernel, Estimate]) -> dict[Kernel, float]:
    """Per kernel the largest share of a candidate's time that it takes."""
    shares: dict[Kernel, float] = {}
    for kernels in reached.candidates:
        times = {kernel: known[kernel].ms * count for kernel, count in kernels.items() if kernel in known}
        total = sum(times.values())
        for kernel, ms in times.items():
            shares[kernel] = max(shares.get(kernel, 0.0), ms / total)
    return shares


def anchors(table: LatencyTable, count: int = ANCHORS) -> list[Kernel]:
    """Kernels of a table to measure again, none of the shortest: of each part of that range the one that repeats best."""
    flags = table.header.get("flags", {})
    # Of a row with outliers the rounds say how well it repeats, which is what is asked for below.
    doubted = {key for flag, keys in flags.items() if flag != OUTLIERS for key in keys}
    timed = table.measurements
    clear = [kernel for kernel in table.kernels if kernel.key not in doubted]
    # A table of a busy board may doubt almost all of its rows: then the doubted have to do.
    clear = clear if len(clear) >= count else table.kernels
    long = [kernel for kernel in clear if timed[kernel.key].median_ms >= _SHORTEST_ANCHOR_MS]
    by_time = sorted(clear, key=lambda kernel: (timed[kernel.key].median_ms, kernel.key))
    # The shortest repeat worst: what a call costs is about what they take.
    by_time = by_time[-max(len(long), 2 * count) :]
    bounds = [len(by_time) * number // count for number in range(count + 1)]
    parts = [by_time[start:end] for start, end in pairwise(bounds) if end > start]
    return [min(part, key=lambda kernel: (timed[kernel.key].spread, kernel.key)) for part in parts]


@dataclass(frozen=True)
class Link:
    """How two runs on one board compare.

    Attributes:
        ratios: Key of each anchor to its latency now over that in the table.
        change: Median of the ratios.
        scale: What new times are multiplied by to be of the table's run; 1 where the change is no larger than `SAME`.
    """

    ratios: Mapping[str, float]
    change: float
    scale: float

    def scaled(self, measurement: Measurement) -> Measurement:
        """A new measurement as the board of the table's run would have had it."""
        if self.scale == 1.0:
            return measurement
        return replace(
            measurement,
            median_ms=measurement.median_ms * self.scale,
            p90_ms=measurement.p90_ms * self.scale,
            min_ms=measurement.min_ms * self.scale,
            rounds_ms=tuple(value * self.scale for value in measurement.rounds_ms),
        )

    def sentence(self) -> str:
        """What a person is told of it."""
        how = f"{abs(self.change - 1):.1%} {'slower' if self.change > 1 else 'quicker'}"
        told = f"the board is {how} than when the table was made, by {len(self.ratios)} kernels measured again"
        if self.scale == 1.0:
            return f"{told}: within what two runs differ by, nothing is scaled"
        return f"{told}: new times are multiplied by {self.scale:.3f}"


def link(table: LatencyTable, found: Mapping[str, Measurement]) -> Link:
    """Compare anchors with what the table holds of them.

    Args:
        table: The earlier run.
        found: Key of each anchor to what it takes now.

    Raises:
        UnstableMeasurementError: Anchors changed, and each in its own way: no common factor explains it.
        TableMismatchError: All of them changed by more than `MOST`, or the board runs none of them.
    """
    if not found:
        raise TableMismatchError(
            "the board must run some kernels of the table, to compare it with what it was, found that it runs none.",
            hint="profile into another table: --out other.parquet, without --table",
        )
    timed = table.measurements
    ratios = {key: measurement.median_ms / timed[key].median_ms for key, measurement in sorted(found.items())}
    change = median(ratios.values())
    scatter = median(abs(math.log(ratio / change)) for ratio in ratios.values())
    if scatter > AGREE:
        raise UnstableMeasurementError(
            f"kernels of the table that are measured again must all have changed alike, within {AGREE:.0%}; found "
            f"{min(ratios.values()) - 1:+.0%} to {max(ratios.values()) - 1:+.0%}.",
            hint="wait until the board has nothing else to do, then run it again; the table is as it was",
        )
    if abs(math.log(change)) > math.log(1 + MOST):
        raise TableMismatchError(
            f"the board must be as quick as when the table was made, within {MOST:.0%}, found {change - 1:+.0%} on "
            f"{len(ratios)} kernels of it.",
            hint="restore its clocks and power mode, or profile into another table; this one is as it was",
        )
    return Link(ratios, change, 1.0 if abs(change - 1) <= SAME else 1 / change)


def _short(name: str, value: Any) -> str:
    text = told(name, value)
    return f"{str(value)[:57]}..." if text is None else text
