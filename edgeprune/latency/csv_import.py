"""Other people's latency tables: a CSV file, and a mapping from our names to its columns.

What such a file does not say is not made up: a time that cannot be one, a size that is none, a column whose name says
another unit than the caller did, each ends the import with one sentence that names the row and the column.
"""

from __future__ import annotations

import csv
import hashlib
import io
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from edgeprune.errors import ConfigError, TableFileMissingError, TableFormatError
from edgeprune.latency.csv_kernels import KINDS, READERS, Kind
from edgeprune.latency.rates import impossible_rate
from edgeprune.latency.table_rows import LONGEST_MS, PRECISIONS, SHORTEST_MS, Row, kernel_row
from edgeprune.near_files import near_files
from edgeprune.spec import Kernel, Measurement

logger = logging.getLogger("edgeprune.latency")

UNITS_MS = {"ms": 1.0, "us": 1e-3, "s": 1e3}
"""Unit of a column of latencies to milliseconds."""

_UNIT_WORDS = {
    **dict.fromkeys(("ms", "msec", "millis", "milliseconds"), "ms"),
    **dict.fromkeys(("us", "usec", "micros", "microseconds"), "us"),
    **dict.fromkeys(("s", "sec", "secs", "seconds"), "s"),
    **dict.fromkeys(("ns", "nsec", "nanoseconds"), "ns"),
}


@dataclass(frozen=True)
class Mapped:
    """Where each value of a row comes from; `problem` of a caller's mapping is found before a row is read.

    Attributes:
        kind: What the rows describe.
        columns: Field to column.
        constants: Field to its value in every row.
        latency: Column of the times.
        unit: A key of `UNITS_MS`.
        where: Column to the text that a row must hold there; other rows are left out.
        skip_invalid: Whether rows that cannot be used are left out and counted, instead of refused.
    """

    kind: Kind
    columns: Mapping[str, str]
    constants: Mapping[str, Any]
    latency: str
    unit: str
    where: Mapping[str, str]
    skip_invalid: bool


def read_csv(
    source: str | Path | TextIO,
    *,
    kernel: str,
    columns: Mapping[str, str],
    latency: Mapping[str, str | None],
    device: str,
    constants: Mapping[str, Any],
    where: Mapping[str, Any],
    runtime: str,
    facts: Mapping[str, Any],
    skip_invalid: bool,
) -> tuple[dict[str, Any], list[Row]]:
    """Header and rows of a latency table; the arguments are those of `LatencyTable.from_csv`."""
    name, text, digest = _content(source)
    mapped = _mapping(kernel, columns, latency, constants, where, skip_invalid)
    if not (isinstance(device, str) and device.strip()):
        raise ConfigError(
            "an imported table must name the device it was measured on, found none.", hint='device="v100"'
        )
    times: dict[Kernel, list[float]] = {}
    threads: dict[int, int] = {}
    read, skipped = 0, 0
    for number, row in _rows(text, name, mapped):
        place = f"row {number} of {name}"
        try:
            found, count, ms = _row(row, mapped, place)
        except TableFormatError as error:
            # What a constant says is wrong in every row.
            if error.hint is None and error.message.startswith(place):
                error.hint = "skip_invalid=True leaves such rows out, and counts them"
            if not mapped.skip_invalid:
                raise
            skipped += 1
            logger.debug("left out: %s", error.message)
            continue
        read += 1
        times.setdefault(found, []).append(ms)
        threads.setdefault(count, number)
        if len(threads) > 1:
            first, second = threads
            raise TableFormatError(
                f"a latency table holds for one number of threads, found {first} and, in row {number} of {name}, {second}.",
                hint=f"where={{...: {first}}}, and one table for each",
            )
    if not times:
        raise TableFormatError(
            f"{name} must hold at least one row to import, found none"
            + (f" ({skipped} could not be used)." if skipped else " that where= keeps." if where else ".")
        )
    if skipped:
        logger.warning("%s: %d of %d rows cannot be used and are left out", name, skipped, read + skipped)
    _check_rates(times, name, mapped)
    clean_facts = dict(facts)
    identity = {
        "device": device,
        **{field: clean_facts[field] for field in ("architecture", "cpu_model", "isa", "power_mode") if field in facts},
        "runtime": runtime,
        **({"runtime_version": clean_facts["runtime_version"]} if "runtime_version" in facts else {}),
    }
    precisions = {found.precision for found in times}
    header = {
        "identity": identity,
        "fingerprint": clean_facts,
        "board": device,
        "runtime": runtime,
        "threads": next(iter(threads)),
        "precision": next(found for found in PRECISIONS if found in precisions),
        "label": "imported",
        "imported": [
            {
                "source": name,
                "sha256": digest,
                "kernel": kernel,
                "columns": dict(columns),
                "constants": {field: str(value) for field, value in constants.items()},
                "latency": {mapped.unit: mapped.latency},
                "where": dict(mapped.where),
                "rows": read,
                "left_out": skipped,
            }
        ],
    }
    return header, [kernel_row(found, repeated(values)) for found, values in times.items()]


def _content(source: str | Path | TextIO) -> tuple[str, str, str]:
    """Name without its folder, text, SHA-256 of the bytes (of the text as UTF-8, where there are no bytes)."""
    if hasattr(source, "read"):
        text = source.read()
        if not isinstance(text, str):
            raise ConfigError(
                "a file to import must be open as text, found one of bytes.", hint='open(path, newline="")'
            )
        label = getattr(source, "name", None)
        name = Path(label).name if isinstance(label, str) else "the given file"
        return name, text, hashlib.sha256(text.encode()).hexdigest()
    path = Path(source)
    if not path.is_file():
        raise TableFileMissingError(
            f"there must be a CSV file at {path}, found no such file.", hint=near_files(path, ".csv", ".tsv", ".txt")
        )
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TableFormatError(f"a table to import must be UTF-8 text, found {path} ({error.reason}).") from error
    return path.name, text, hashlib.sha256(content).hexdigest()


def _mapping(
    kernel: str,
    columns: Mapping[str, str],
    latency: Mapping[str, str | None],
    constants: Mapping[str, Any],
    where: Mapping[str, Any],
    skip_invalid: bool,
) -> Mapped:
    if kernel not in KINDS:
        raise ConfigError(f"the kind of kernels to import must be one of {', '.join(KINDS)}, found {kernel!r}.")
    kind = KINDS[kernel]
    given = [(unit, column) for unit, column in latency.items() if column is not None]
    if len(given) != 1:
        named = " and ".join(f"latency_{unit}" for unit, _ in given) or "none"
        raise ConfigError(
            f"exactly one of latency_ms, latency_us and latency_s must name the column of times, found {named}.",
            hint='latency_ms="latency_ms"',
        )
    unit, column = given[0]
    said = _UNIT_WORDS.get(column.lower().replace("(", "_").rstrip(")]").replace("[", "_").rpartition("_")[2].strip())
    if said is not None and said != unit:
        raise TableFormatError(
            f"the unit of times must be the one that their column is named after, found latency_{unit}={column!r}.",
            hint=f"latency_{said}={column!r}" if said in UNITS_MS else "divide the column by 1000, as latency_us",
        )
    known = (*kind.fields, "threads")
    for field in (*columns, *constants):
        if field not in known:
            raise ConfigError(f"a field of {kernel} must be one of {', '.join(known)}, found {field!r}.")
    both = sorted(set(columns) & set(constants))
    if both:
        raise ConfigError(f"a field must have a column or a constant, found both for {', '.join(both)}.")
    lacking = [field for field in kind.required if field not in columns and field not in constants]
    if lacking:
        raise ConfigError(
            f"{kernel} must be told {', '.join(kind.required)}, found no column or constant for {', '.join(lacking)}.",
            hint=f"columns={{{lacking[0]!r}: ...}}",
        )
    return Mapped(
        kind,
        dict(columns),
        dict(constants),
        column,
        unit,
        {key: str(value) for key, value in where.items()},
        skip_invalid,
    )


def _rows(text: str, name: str, mapped: Mapped) -> Iterator[tuple[int, Mapping[str, str]]]:
    """Number from 1 and cells of the rows that `where` keeps."""
    try:
        delimiter = csv.Sniffer().sniff(text.partition("\n")[0][:4096], delimiters=",;\t").delimiter
    except csv.Error:
        delimiter = ","
    reader = csv.DictReader(io.StringIO(text, newline=None), delimiter=delimiter, skipinitialspace=True)
    try:
        reader.fieldnames = [column.strip() for column in reader.fieldnames or ()]
        _check_columns(reader.fieldnames, name, mapped)
        for number, row in enumerate(reader, start=1):
            if all((row.get(column) or "").strip() == value for column, value in mapped.where.items()):
                yield number, row
    except csv.Error as error:
        raise TableFormatError(
            f"{name} must be a CSV file, found line {reader.line_num} that is not ({error})."
        ) from error


def _check_columns(present: Sequence[str], name: str, mapped: Mapped) -> None:
    for column in (*mapped.columns.values(), mapped.latency, *mapped.where):
        if column not in present:
            named = ", ".join(present)
            raise TableFormatError(f"{name} must have a column {column!r}, found {named[:300] or 'an empty file'}.")
        if present.count(column) > 1:
            raise TableFormatError(f"a column of {name} must come once, found {column!r} twice.")


def _row(row: Mapping[str, str], mapped: Mapped, place: str) -> tuple[Kernel, int, float]:
    """Kernel, threads, milliseconds."""
    fields: dict[str, Any] = {field: default for field, (_, default) in mapped.kind.optional.items()}
    fields["threads"] = 1
    for field, column in mapped.columns.items():
        fields[field] = _value(mapped.kind, field, row.get(column), f"{place}, column {column!r}")
    for field, value in mapped.constants.items():
        text = value if isinstance(value, str) else str(value)
        fields[field] = _value(mapped.kind, field, text, f"the constant {field!r}")
    ms = _milliseconds(row.get(mapped.latency), mapped, place)
    if fields["precision"] not in PRECISIONS:
        where = f"{place}, column {mapped.columns['precision']!r}" if "precision" in mapped.columns else "the constant"
        raise TableFormatError(
            f"{where}: the precision must be one of {', '.join(PRECISIONS)}, found {fields['precision']!r}."
        )
    try:
        kernel = mapped.kind.make(fields)
    except ValueError as error:
        raise TableFormatError(f"{place}: {error}.") from error
    return kernel, fields["threads"], ms


def _value(kind: Kind, field: str, text: str | None, place: str) -> Any:
    if text is None or (not text.strip() and field not in ("activation",)):
        raise TableFormatError(f"{place}: {field} must have a value, found an empty cell.")
    try:
        return READERS["count" if field == "threads" else kind.type_of(field)](text)
    except (ValueError, OverflowError) as error:
        expected = str(error) if str(error).startswith(("a ", "0 ")) else "a whole number from 1"
        raise TableFormatError(f"{place}: {field} must be {expected}, found {text.strip()!r}.") from error


def _milliseconds(text: str | None, mapped: Mapped, place: str) -> float:
    where = f"{place}, column {mapped.latency!r}"
    try:
        value = float(text or "")
    except ValueError as error:
        raise TableFormatError(f"{where}: a latency must be a number, found {(text or '').strip()!r}.") from error
    ms = value * UNITS_MS[mapped.unit]
    if not math.isfinite(ms):
        raise TableFormatError(f"{where}: a latency must be finite, found {value}.")
    if ms <= 0:
        raise TableFormatError(
            f"{where}: a latency must be positive, found {value:g}.",
            hint="skip_invalid=True, if that marks a failed run",
        )
    if not SHORTEST_MS <= ms <= LONGEST_MS:
        raise TableFormatError(
            f"{where}: a latency must lie between {SHORTEST_MS:g} and {LONGEST_MS:g} ms, found {ms:g} ms.",
            hint="latency_us= or latency_s=, if the column is in these",
        )
    return ms


def _check_rates(times: Mapping[Kernel, list[float]], name: str, mapped: Mapped) -> None:
    """Refuse times that no device can have: the unit is wrong, or the row."""
    found = impossible_rate({kernel: min(values) for kernel, values in times.items()})
    if found is not None:
        raise TableFormatError(
            f"column {mapped.latency!r} of {name} must hold times that a device can {found.text}.",
            hint=f"latency_{found.unit}=, if the column is in {'seconds' if found.unit == 's' else 'microseconds'}",
        )


def repeated(values: list[float]) -> Measurement:
    """Rows of the same kernel as rounds of one measurement."""
    import numpy as np

    middle = float(np.median(values))
    return Measurement(
        median_ms=middle,
        p90_ms=float(np.quantile(values, 0.9)),
        min_ms=min(values),
        spread=float(np.median(np.abs(np.array(values) - middle))) / middle,
        rounds_ms=tuple(values),
        samples=len(values),
    )
