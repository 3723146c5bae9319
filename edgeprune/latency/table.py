"""`LatencyTable`: what was measured on one device with one runtime, and under which conditions."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

from edgeprune.errors import TableFormatError, TableMismatchError
from edgeprune.latency import table_file
from edgeprune.latency.table_header import SCHEMA, validated_header
from edgeprune.latency.table_rows import (
    COLUMNS,
    Row,
    canonical_json,
    hashed,
    network_key,
    row_measurement,
    validated_rows,
)
from edgeprune.spec import Kernel, Measurement

if TYPE_CHECKING:
    import pandas as pd

    from edgeprune.latency.table_diff import TableDiff


class Network(NamedTuple):
    """One network that was measured as a whole.

    Attributes:
        name: Unique in its table.
        kernels: Kernel key to how often the network executes it.
        measurement: Its latency.
        widths: Channel group to units kept.
    """

    name: str
    kernels: Counter[str]
    measurement: Measurement
    widths: dict[str, int]


class LatencyTable:
    """Measured kernels and networks of one device, runtime, thread count; immutable, in canonical order.

    Attributes:
        header: ``schema``, ``identity`` (`Fingerprint.identity`), ``runtime``, ``threads``, ``precision``, and whatever
            else the measuring run states (``fingerprint``, ``created``, ``reference``, ``conditions``, ...).
    """

    header: dict[str, Any]

    def __init__(self, header: Mapping[str, Any], rows: Iterable[Mapping[str, Any]]) -> None:
        self.header = validated_header(header)
        self._rows: tuple[Row, ...] = validated_rows(rows)

    @classmethod
    def from_rows(cls, header: Mapping[str, Any], rows: Iterable[Mapping[str, Any]]) -> LatencyTable:
        """Make a table of rows from `kernel_row` and `network_row`; ``schema`` is added to the header.

        Raises:
            TableFormatError: If the header or a row is not valid; the message says which and why.
        """
        return cls({"schema": SCHEMA, **header}, rows)

    @classmethod
    def from_csv(
        cls,
        source: str | Path | TextIO,
        *,
        kernel: str,
        columns: Mapping[str, str],
        device: str,
        latency_ms: str | None = None,
        latency_us: str | None = None,
        latency_s: str | None = None,
        constants: Mapping[str, Any] | None = None,
        where: Mapping[str, Any] | None = None,
        runtime: str = "unknown",
        facts: Mapping[str, Any] | None = None,
        skip_invalid: bool = False,
    ) -> LatencyTable:
        """Make a table of somebody else's CSV file; its header says ``label: imported``, the file and its SHA-256.

        Rows of the same kernel count as rounds of one measurement; where they differ so much that a column which tells them
        apart may be missing, and where times look like another unit's, a warning is logged. The
        kernels are those of ONNX Runtime's plain operators.

        Args:
            source: Path, or an open text file. Columns are told apart by commas, semicolons or tabs.
            kernel: What the rows describe: a key of `edgeprune.latency.csv_kernels.KINDS`, e.g. ``"conv2d"`` with
                ``in_channels``, ``out_channels``, ``height`` (of the input) and ``kernel_size``; ``width`` (as the height),
                ``stride`` (1), ``padding`` (same), ``dilation``, ``groups``, ``activation``, ``residual``, ``bias``,
                ``batch`` (1), ``precision`` (fp32), ``threads`` (1) may be given.
            columns: Field to column of the file.
            device: What it was measured on.
            latency_ms: Column of the times in milliseconds; give one of the three.
            latency_us: The same in microseconds.
            latency_s: The same in seconds.
            constants: Field to its value in all rows, e.g. ``{"batch": 1, "precision": "fp16"}``.
            where: Column to value: rows that hold something else are left out.
            runtime: What executed the kernels.
            facts: What is known of the device: ``architecture``, ``cpu_model``, ``isa``, ``caches_bytes``,
                ``runtime_version``, and for a GPU its ``multiprocessors``.
            skip_invalid: Leave out rows that cannot be used, count them in the header and warn of them with their lines,
                instead of refusing the file.

        Raises:
            TableFileMissingError: There is no such file.
            TableFormatError: A column is missing or a value cannot be what it is said to be; names the file's line and column.
            ConfigError: The mapping does not tell what the kind of kernels needs.
        """
        from edgeprune.latency.csv_import import read_csv

        header, rows = read_csv(
            source,
            kernel=kernel,
            columns=columns,
            latency={"ms": latency_ms, "us": latency_us, "s": latency_s},
            device=device,
            constants=constants or {},
            where=where or {},
            runtime=runtime,
            facts=facts or {},
            skip_invalid=skip_invalid,
        )
        return cls.from_rows(header, rows)

    @classmethod
    def load(cls, path: str | Path) -> LatencyTable:
        """Read a table.

        Raises:
            TableFileMissingError: There is no such file.
            TableFormatError: It is not a latency table, of an unknown schema, damaged, or holds impossible values.
        """
        path = Path(path)
        header, rows, digest = table_file.read(path)
        try:
            table = cls(header, rows)
        except TableFormatError as error:
            raise TableFormatError(
                f"{path}: {error.message}", hint=error.hint or "copy it again, or edgeprune profile"
            ) from error
        if table.hash != digest:
            raise TableFormatError(
                f"the content of latency table {path} must have sha256 {digest[:12] or '(none stored)'}, "
                f"found {table.hash[:12]}.",
                hint="restore the file, or make a changed table with LatencyTable.from_rows",
            )
        return table

    def save(self, path: str | Path) -> Path:
        """Write the table as Parquet, atomically; returns the path."""
        path = Path(path)
        table_file.write(path, self.header, self._rows, self.hash)
        return path

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the content, whatever the order of the rows and the encoding of the file."""
        digest = hashlib.sha256(canonical_json(self.header).encode())
        for row in self._rows:
            digest.update(b"\n" + canonical_json(hashed(row)).encode())
        return digest.hexdigest()

    @cached_property
    def frame(self) -> pd.DataFrame:
        """All rows as a pandas frame, in canonical order; changing it does not change the table."""
        import pandas as pd

        frame: pd.DataFrame = pd.DataFrame([dict(row) for row in self._rows], columns=list(COLUMNS))
        return frame

    @property
    def rows(self) -> Iterator[Row]:
        """Copies of all rows, kernels before networks, each by key."""
        return (dict(row) for row in self._rows)

    @cached_property
    def kernels(self) -> list[Kernel]:
        """Measured kernels, by key."""
        return [Kernel.from_key(row["key"]) for row in self._rows if row["kind"] == "kernel"]

    @cached_property
    def measurements(self) -> dict[str, Measurement]:
        """Kernel key to what was measured, in the order of `kernels`."""
        return {row["key"]: row_measurement(row) for row in self._rows if row["kind"] == "kernel"}

    @cached_property
    def networks(self) -> list[Network]:
        """Networks that were measured as a whole, by name."""
        return [
            Network(row["key"], Counter(json.loads(row["kernels"])), row_measurement(row), json.loads(row["widths"]))
            for row in self._rows
            if row["kind"] == "network"
        ]

    @cached_property
    def energy(self) -> dict[str, dict[str, Any]]:
        """Name of a network to its energy per inference as measured by replay; empty where that was not asked for.

        Each is what `EnergyMeasurement.record` gave: ``energy_mj`` above idle with its ``error_mj``, ``gross_mj``, the
        powers, and ``rails`` and ``covers``, which say what they are the power of.
        """
        told: Mapping[str, dict[str, Any]] = self.header.get("energy", {})
        keys = {row["key"]: network_key(row["kernels"]) for row in self._rows if row["kind"] == "network"}
        return {name: dict(told[key]) for name, key in keys.items() if key in told}

    @property
    def device(self) -> str:
        """What the table was measured on, for a person."""
        identity = self.header["identity"]
        names = (identity.get(name) for name in ("device", "cpu_model", "architecture"))
        return next((str(name) for name in names if name), "unknown device")

    @property
    def board(self) -> str:
        """Name of the board that it was measured on, or of its device where it does not say."""
        return str(self.header.get("board", self.device))

    def target(self) -> dict[str, Any]:
        """What a model must be lowered for, the ``device`` of `edgeprune.lower`: architecture, instruction set and runtime, and
        the processor where the table says it, for compilers schedule code for its cores.

        Raises:
            TableMismatchError: The table does not say: it was imported without these facts.
        """
        identity = self.header["identity"]
        lacking = [name for name in ("architecture", "isa") if name not in identity]
        if lacking:
            raise TableMismatchError(
                f"a table to prune with must say its device's architecture and isa, found no {' and '.join(lacking)} of "
                f"{self.device}.",
                hint="edgeprune profile, or import it with --fact architecture=... --fact 'isa=[...]'",
            )
        # The runtime's version decides what an engine may hold.
        runtime = ("runtime", "runtime_version") if "runtime_version" in identity else ()
        return {name: identity[name] for name in ("architecture", "isa", "cpu_model", *runtime) if name in identity}

    def diff(self, other: LatencyTable) -> TableDiff:
        """Whether the times of two tables may be compared, and how they differ."""
        from edgeprune.latency.table_diff import compared

        return compared(self, other)

    def card(self) -> str:
        """Data card in Markdown: what was measured, on what, under which conditions, and how well it repeats."""
        from edgeprune.latency.table_card import markdown

        return markdown(self)

    def chosen(self, *, percentile: int = 50, sustained: bool = False, precision: str | None = None) -> LatencyTable:
        """The table to fit for another latency than the median of a board as it usually is.

        Args:
            percentile: Of single inferences, from 50 to 99.
            sustained: In thermal equilibrium.
            precision: Of the arithmetic; that of the table when None.

        Raises:
            TableMismatchError: The table does not hold it; says what it holds, and what would measure it.
        """
        from edgeprune.latency.chosen import as_chosen

        return as_chosen(self, percentile=percentile, sustained=sustained, precision=precision)

    def filter(
        self,
        *,
        kind: str | Collection[str] | None = None,
        op: str | Collection[str] | None = None,
        family: str | Collection[str] | None = None,
        precision: str | Collection[str] | None = None,
        key: Collection[str] | None = None,
    ) -> LatencyTable:
        """Table of the rows that meet every given condition: a value, or a collection of values, per column.

        Networks have op and family ``"network"``, so ``family=("conv", "network")`` keeps them.
        """
        given = {"kind": kind, "op": op, "family": family, "precision": precision, "key": key}
        sets = {
            name: {values} if isinstance(values, str) else set(values)
            for name, values in given.items()
            if values is not None
        }
        return self._with(row for row in self._rows if all(row[name] in values for name, values in sets.items()))

    def merge(self, other: LatencyTable) -> LatencyTable:
        """Rows of both tables.

        What both measured keeps the rounds of both; a network of the same name but other kernels gets its own name. The
        header is this table's, but ``flags``, ``unsupported``, ``energy``, ``percentiles``, ``models``, ``edges``,
        ``disturbances``, ``runs`` and the networks under ``sustained`` are those of both.

        Raises:
            TableMismatchError: They are of another device, runtime, thread count or precision; names the field.
        """
        from edgeprune.latency.table_merge import merged

        return merged(self, other)

    def __len__(self) -> int:
        return len(self._rows)

    def __eq__(self, other: object) -> bool:
        return self.hash == other.hash if isinstance(other, LatencyTable) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.hash)

    def __repr__(self) -> str:
        kernels, networks = len(self.kernels), len(self.networks)
        return f"LatencyTable({kernels} kernels, {networks} networks, {self.header['runtime']} on {self.device})"

    def _with(self, rows: Iterable[Row]) -> LatencyTable:
        # Rows of a valid table in their order are valid: no second check.
        table = LatencyTable(self.header, ())
        table._rows = tuple(rows)
        return table
