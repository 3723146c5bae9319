"""Which latency is meant: of which precision, which percentile of single inferences, on a rested or on a hot board.

A table holds medians of a board as it usually is. Where it also holds percentiles or the sustained state of its networks
(`edgeprune profile --percentiles`, `--sustained`), a table *as chosen* has those of its networks in place of their medians:
fitted, its calibration leads from the sum of kernels to what was chosen. Kernels stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from edgeprune.errors import ConfigError, TableMismatchError
from edgeprune.latency.table_rows import PRECISIONS, Row, network_key

if TYPE_CHECKING:
    from edgeprune.latency.table import LatencyTable

MEDIAN = 50


@dataclass(frozen=True)
class Chosen:
    """Which latency is meant.

    Attributes:
        percentile: Of the single inferences of a round, median over the rounds; 50 is the median of the table's own protocol,
            in which short networks are timed several runs at a time.
        sustained: Whether in thermal equilibrium.
        precision: Of the arithmetic.
    """

    percentile: int = MEDIAN
    sustained: bool = False
    precision: str = "fp32"

    @property
    def plain(self) -> bool:
        """Whether it is the median of a board as it usually is."""
        return self.percentile == MEDIAN and not self.sustained

    def __str__(self) -> str:
        parts = [] if self.percentile == MEDIAN else [f"the {self.percentile}th percentile of single inferences"]
        parts += ["the latency in thermal equilibrium"] if self.sustained else []
        return ", ".join(parts) or "the median"

    @classmethod
    def of(cls, header: Mapping[str, Any]) -> Chosen:
        """What the times of a table's networks are."""
        return cls(**header.get("latency", {"precision": header["precision"]}))


def as_chosen(
    table: LatencyTable, *, percentile: int = MEDIAN, sustained: bool = False, precision: str | None = None
) -> LatencyTable:
    """The table whose networks take what was chosen; itself where that is what they take.

    Networks without it are left out. What was measured is a ratio to the median of the same minutes, times which the
    network's own median is taken, since the board may have been quicker or slower in these minutes than in the table's.

    Raises:
        ConfigError: The percentile is none, or the precision has no such name.
        TableMismatchError: The table does not hold it; says what it holds, and what would measure it.
    """
    if not MEDIAN <= percentile < 100:
        raise ConfigError(
            f"the percentile of a latency must be from 50 to 99, found {percentile}.", hint="--percentile 95"
        )
    if precision is not None and precision not in PRECISIONS:
        raise ConfigError(f"the precision must be one of {', '.join(PRECISIONS)}, found {precision!r}.")
    # Of networks, where there are any: some kernels of an int8 network are in fp32.
    networks = [row for row in table.rows if row["kind"] == "network"]
    held = sorted({row["precision"] for row in networks or table.rows})
    wanted = Chosen(percentile, sustained, precision or table.header["precision"])
    if precision is not None and precision not in held:
        raise TableMismatchError(
            f"the latency table must hold {wanted.precision} kernels for --precision {wanted.precision}, it holds "
            f"{', '.join(held)}.",
            hint=f"--precision {held[0]}, which is what edgeprune profile measured; another precision has a table of its own",
        )
    if wanted == Chosen.of(table.header):
        return table
    if "latency" in table.header:
        raise TableMismatchError(
            f"the latency table must hold medians to choose another latency from, it holds {Chosen.of(table.header)}.",
            hint="the table that edgeprune profile wrote",
        )
    ratios = _ratios(table, wanted)
    rows = [
        _scaled(row, ratios[row["key"]]) if row["kind"] == "network" else row
        for row in table.rows
        if _kept(row, ratios)
    ]
    return type(table)({**table.header, "latency": asdict(wanted)}, rows)


def _kept(row: Row, ratios: Mapping[str, float]) -> bool:
    return row["kind"] == "kernel" or row["key"] in ratios


def _ratios(table: LatencyTable, wanted: Chosen) -> dict[str, float]:
    """Name of each network to what was chosen over its median; of all where the median is meant."""
    networks = {row["key"]: network_key(row["kernels"]) for row in table.rows if row["kind"] == "network"}
    if wanted.plain:
        return dict.fromkeys(networks, 1.0)
    heated = table.header.get("sustained", {}).get("networks", {})
    percentiles = table.header.get("percentiles", {})
    has = ["medians"]
    if percentiles:
        has.append("percentiles " + ", ".join(sorted({name for one in percentiles.values() for name in one["ratio"]})))
    if heated:
        has.append("the sustained state")
    said = f"it holds {' and '.join([', '.join(has[:-1]), has[-1]] if len(has) > 1 else has)}"
    if wanted.percentile != MEDIAN and wanted.sustained:
        raise TableMismatchError(
            f"a percentile and the sustained state must not be asked of a latency table at once: {said}, and percentiles are "
            "those of a board as it usually is.",
            hint=f"--percentile {wanted.percentile}, or --sustained",
        )
    if wanted.sustained:
        found = {one: float(heated[key]["ratio"]) for one, key in networks.items() if key in heated}
        option = "--sustained"
    else:
        name = str(wanted.percentile)
        records = {one: percentiles[key] for one, key in networks.items() if key in percentiles}
        found = {one: float(record["ratio"][name]) for one, record in records.items() if name in record["ratio"]}
        option = "--percentiles"
    if not found:
        command = f"edgeprune profile MODEL {option} --board {table.header.get('board', 'BOARD')}"
        known = sorted({name for one in percentiles.values() for name in one["ratio"]})
        raise TableMismatchError(
            f"the latency table must hold {wanted} of whole networks, {said}.",
            hint=f"--percentile {known[-1]}" if option == "--percentiles" and known else command,
        )
    return found


def _scaled(row: Row, ratio: float) -> Row:
    times = {name: row[name] * ratio for name in ("median_ms", "p90_ms", "min_ms")}
    return {**row, **times, "rounds_ms": tuple(value * ratio for value in row["rounds_ms"])}
