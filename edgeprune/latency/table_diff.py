"""What sets two latency tables apart: whether their times may be compared, and by how much they differ."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from edgeprune.latency.intervals import round_noise
from edgeprune.latency.table import LatencyTable
from edgeprune.latency.table_header import comparable


class Difference(NamedTuple):
    """A field of the headers that differs; None where a table does not state it."""

    field: str
    first: Any
    second: Any


@dataclass(frozen=True)
class RatioRow:
    """Times of the second table over those of the first, kernels in common.

    Attributes:
        family: Of the kernels, or ``"network"``.
        count: Kernels in common.
        median: Median ratio.
        low: 10th percentile.
        high: 90th percentile.
        noise_percent: Median error that a repetition would show by noise alone, percent.
    """

    family: str
    count: int
    median: float
    low: float
    high: float
    noise_percent: float


@dataclass(frozen=True)
class TableDiff:
    """How two tables differ.

    Attributes:
        identity: Differences in device, runtime, threads or precision: with any, the tables are not merged.
        protocol: Differences in how they were measured or where they come from.
        only_first: Rows (kernels and networks) that only the first table holds.
        only_second: The same of the second.
        common: Rows of both.
        ratios: Per family of the common rows.
    """

    identity: tuple[Difference, ...]
    protocol: tuple[Difference, ...]
    only_first: int
    only_second: int
    common: int
    ratios: tuple[RatioRow, ...]

    @property
    def may_be_merged(self) -> bool:
        """Whether both describe one device, runtime, thread count and precision."""
        return not self.identity

    def summary(self) -> str:
        """One sentence."""
        if self.identity:
            named = ", ".join(difference.field for difference in self.identity)
            verdict = f"the tables describe different things and must not be mixed ({named} differ)"
        elif self.protocol:
            named = ", ".join(difference.field for difference in self.protocol)
            verdict = f"the tables may be compared and merged, though measured differently ({named})"
        else:
            verdict = "the tables may be compared and merged"
        if not self.common:
            return f"{verdict}; no kernel is in both."
        every = max(self.ratios, key=lambda row: row.count)
        return (
            f"{verdict}; {self.common} rows are in both, and the second table takes {every.median:.3g} times as long in "
            f"the middle of {every.count} {every.family} rows."
        )


def compared(first: LatencyTable, second: LatencyTable) -> TableDiff:
    """The differences of two tables."""
    mine = {(row["kind"], row["key"]): row for row in first.rows}
    theirs = {(row["kind"], row["key"]): row for row in second.rows}
    common = sorted(set(mine) & set(theirs))
    families: dict[str, list[tuple[str, str]]] = {}
    for place in common:
        families.setdefault(mine[place]["family"], []).append(place)
    return TableDiff(
        identity=_differences(comparable(first.header), comparable(second.header)),
        protocol=_differences(_protocol(first.header), _protocol(second.header)),
        only_first=len(mine) - len(common),
        only_second=len(theirs) - len(common),
        common=len(common),
        ratios=tuple(
            _ratio(family, [mine[place] for place in places], [theirs[place] for place in places])
            for family, places in sorted(families.items(), key=lambda item: -len(item[1]))
        ),
    )


def _differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> tuple[Difference, ...]:
    return tuple(
        Difference(name, first.get(name), second.get(name))
        for name in sorted({*first, *second})
        if first.get(name) != second.get(name)
    )


def _protocol(header: Mapping[str, Any]) -> dict[str, Any]:
    protocol = header.get("protocol")
    fields = dict(protocol) if isinstance(protocol, Mapping) else {"text": protocol}
    # What an empty call costs, and how long it all took, differ from run to run by nature.
    for name in ("overhead_ms", "spent_s", "earlier_s"):
        fields.pop(name, None)
    imported = [entry.get("sha256") for entry in header.get("imported", ())]
    told = {name: header.get(name) for name in ("label", "timing")}
    return {**told, "imported": imported, **{f"protocol.{name}": fields[name] for name in fields}}


def _ratio(family: str, first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]]) -> RatioRow:
    ratios = np.array([b["median_ms"] / a["median_ms"] for a, b in zip(first, second, strict=True)])
    noise = math.hypot(*(round_noise([row["rounds_ms"] for row in rows]) for rows in (first, second)))
    low, middle, high = (float(value) for value in np.quantile(ratios, (0.1, 0.5, 0.9)))
    # Of a normal error the median of its size is 0.6745 standard deviations.
    return RatioRow(family, len(ratios), middle, low, high, 67.45 * noise)
