"""Other people's latency tables: a CSV file, and a mapping from our names to its columns.

What such a file does not say is not made up: a time that cannot be one, a size that is none, a column whose name says
another unit than the caller did, each ends the import with one sentence that names the line and the column. What can be
but is odd is warned of.
"""

from __future__ import annotations

import difflib
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TextIO

from edgeprune.errors import ConfigError, TableFormatError
from edgeprune.latency.csv_file import AGAIN, CsvFile, opened
from edgeprune.latency.csv_kernels import KINDS, READERS, Kind
from edgeprune.latency.csv_mixed import Repeat, mixed
from edgeprune.latency.rates import doubts, impossible_rate
from edgeprune.latency.table_rows import LONGEST_MS, PRECISIONS, SHORTEST_MS, Row, kernel_row
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


_LEFT_OUT = "skip_invalid=True leaves such rows out, and counts them"
_SPELLINGS = {
    **dict.fromkeys(("half", "float16", "fp16", "f16"), "fp16"),
    **dict.fromkeys(("single", "float", "float32", "fp32", "f32"), "fp32"),
    **dict.fromkeys(("int8", "i8"), "int8"),
}
"""How others write our precisions, for hints."""

_NAMED = 5
"""Lines, columns or values that a sentence names."""


@dataclass(frozen=True)
class Mapped:
    """Where each value of a row comes from; `problem` of a caller's mapping is found before a row is read.

    Attributes:
        kind: What the rows describe.
        columns: Field to column.
        constants: Field to its value in every row, as it was read.
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
    file = opened(source)
    name = file.name
    mapped = _mapping(file, kernel, columns, latency, constants, where, skip_invalid)
    if not (isinstance(device, str) and device.strip()):
        raise ConfigError(
            "an imported table must name the device it was measured on, found none.", hint='device="v100"'
        )
    isa = facts.get("isa", [])
    if not (isinstance(isa, (list, tuple)) and all(isinstance(flag, str) for flag in isa)):
        raise ConfigError(
            f"the isa of a device must be a list of flags, found {isa!r}.", hint="facts={'isa': ['avx2', 'fma']}"
        )
    repeats: dict[Kernel, list[Repeat]] = {}
    threads: dict[int, int] = {}
    read, skipped, reason = 0, list[int](), ""
    for line, row in file.rows():
        place = f"line {line} of {name}"
        try:
            cells = file.named(row, place)
            if not _meets(cells, mapped.where):
                continue
            found, count, ms = _row(cells, mapped, place)
        except TableFormatError as error:
            if error.hint is None:
                error.hint = _LEFT_OUT
            if not mapped.skip_invalid:
                raise
            skipped.append(line)
            reason = reason or error.message
            logger.debug("left out: %s", error.message)
            continue
        read += 1
        repeats.setdefault(found, []).append(Repeat(ms, line, cells))
        threads.setdefault(count, line)
        if len(threads) > 1:
            first, second = threads
            told = mapped.columns["threads"]
            raise TableFormatError(
                f"a latency table holds for one number of threads, found {first} and, in line {line} of {name}, {second}.",
                hint=f"where={{{told!r}: {first}}}, and one table for each",
            )
    if not repeats:
        _refuse_empty(file, mapped, len(skipped), reason)
    if skipped:
        lines = f"line{'s' if len(skipped) > 1 else ''} {_few(skipped)}"
        share = f"{len(skipped)} of {read + len(skipped)} rows cannot be used and {'are' if len(skipped) > 1 else 'is'} left out"
        logger.warning("%s: %s: %s; %s", name, share, lines, reason.rstrip("."))
    times = {found: [row.ms for row in rows] for found, rows in repeats.items()}
    _check_rates(times, name, mapped)
    shortest = {found: min(values) for found, values in times.items()}
    used = (*mapped.columns.values(), mapped.latency, *mapped.where)
    odd = mixed(repeats, [column for column in file.columns if column not in used])
    for sentence in (*doubts(shortest, mapped.unit, _multiprocessors(facts)), *(() if odd is None else (odd,))):
        logger.warning("%s: %s", name, sentence)
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
                "sha256": file.digest,
                "kernel": kernel,
                "columns": dict(columns),
                "constants": {field: str(value) for field, value in constants.items()},
                "latency": {mapped.unit: mapped.latency},
                "where": dict(mapped.where),
                "rows": read,
                "left_out": len(skipped),
            }
        ],
    }
    return header, [kernel_row(found, repeated(values)) for found, values in times.items()]


def _meets(cells: Mapping[str, str], where: Mapping[str, str]) -> bool:
    return all(cells[column].strip() == value for column, value in where.items())


def _refuse_empty(file: CsvFile, mapped: Mapped, skipped: int, reason: str) -> NoReturn:
    """Say why no row is left."""
    rows = [dict(zip(file.columns, row, strict=False)) for _, row in file.rows() if len(row) == len(file.columns)]
    start = f"{file.name} must hold at least one row to import, found"
    if skipped:
        raise TableFormatError(
            f"{start} none ({skipped} could not be used; {reason.rstrip('.')}).",
            hint="the same without skip_invalid=True, which says what would mend the first one",
        )
    if not rows:
        raise TableFormatError(f"{start} only the line of column names.", hint=AGAIN)
    conditions = " and ".join(f"{column} is {value!r}" for column, value in mapped.where.items())
    hint = "another condition: no rows meet all of these"
    for column in mapped.where:
        others = {other: value for other, value in mapped.where.items() if other != column}
        if values := sorted({row[column].strip() for row in rows if _meets(row, others)}):
            near = difflib.get_close_matches(mapped.where[column], values, n=1, cutoff=0)
            hint = f"where={{{column!r}: {(near or values)[0]!r}}} (there are: {_few(values)})"
            break
    raise TableFormatError(f"{start} none of {len(rows)} whose {conditions}.", hint=hint)


def _multiprocessors(facts: Mapping[str, Any]) -> int:
    told = facts.get("multiprocessors")
    return told if isinstance(told, int) else 0


def _few(items: Sequence[object]) -> str:
    more = len(items) - _NAMED
    return ", ".join(map(str, items[:_NAMED])) + (f" and {more} more" if more > 0 else "")


def _mapping(
    file: CsvFile,
    kernel: str,
    columns: Mapping[str, str],
    latency: Mapping[str, str | None],
    constants: Mapping[str, Any],
    where: Mapping[str, Any],
    skip_invalid: bool,
) -> Mapped:
    there = f"(there are: {', '.join(file.columns)})"
    if kernel not in KINDS:
        raise ConfigError(
            f"the kind of kernels to import must be one of {', '.join(KINDS)}, found {kernel!r}.",
            hint=_like(kernel, KINDS) or "one of these; docs/tables.md says what each needs",
        )
    kind = KINDS[kernel]
    given = [(unit, column) for unit, column in latency.items() if column is not None]
    if len(given) != 1:
        named = " and ".join(f"latency_{unit}" for unit, _ in given) or "none"
        raise ConfigError(
            f"exactly one of latency_ms, latency_us and latency_s must name the column of times, found {named}.",
            hint=f"latency_ms=... {there}" if not given else "the one that the times are in",
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
            raise ConfigError(
                f"a field of {kernel} must be one of {', '.join(known)}, found {field!r}.",
                hint=_like(field, known) or "one of these; docs/tables.md says what each means",
            )
    both = sorted(set(columns) & set(constants))
    if both:
        raise ConfigError(
            f"a field must have a column or a constant, found both for {', '.join(both)}.", hint="one of the two"
        )
    lacking = [field for field in kind.required if field not in columns and field not in constants]
    if lacking:
        raise ConfigError(
            f"{kernel} must be told {', '.join(kind.required)}, found no column or constant for {', '.join(lacking)}.",
            hint=f"columns={{{lacking[0]!r}: ...}} {there}",
        )
    mapped = Mapped(
        kind,
        dict(columns),
        {field: _constant(kind, field, str(value)) for field, value in constants.items()},
        column,
        unit,
        {key: str(value).strip() for key, value in where.items()},
        skip_invalid,
    )
    _check_columns(file, mapped)
    return mapped


def _like(name: str, known: Iterable[str]) -> str | None:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.7)
    return near[0] if near else None


def _constant(kind: Kind, field: str, text: str) -> Any:
    """What a constant says is right or wrong in every row."""
    place = f"the constant {field!r}"
    hint = f"constants={{{field!r}: ...}}"
    try:
        value = _value(kind, field, text, place)
    except TableFormatError as error:
        error.hint = hint
        raise
    if field == "precision" and value not in PRECISIONS:
        raise TableFormatError(
            f"{place}: the precision must be one of {', '.join(PRECISIONS)}, found {value!r}.",
            hint=f"constants={{'precision': {_SPELLINGS[value.lower()]!r}}}" if value.lower() in _SPELLINGS else hint,
        )
    return value


def _check_columns(file: CsvFile, mapped: Mapped) -> None:
    options = [
        *((column, f"columns={{{field!r}: {{}}}}") for field, column in mapped.columns.items()),
        (mapped.latency, f"latency_{mapped.unit}={{}}"),
        *((column, f"where={{{{}}: {value!r}}}") for column, value in mapped.where.items()),
    ]
    for column, option in options:
        if column not in file.columns:
            near = _like(column, file.columns)
            shown = option.replace("{}", "..." if near is None else repr(near))
            raise TableFormatError(
                f"{file.name} must have a column {column!r}, found none of that name.",
                hint=f"{shown} (there are: {', '.join(file.columns)})",
            )
        if file.columns.count(column) > 1:
            raise TableFormatError(
                f"a column of {file.name} must come once, found {column!r} twice.",
                hint="rename one of them in the file",
            )


def _row(row: Mapping[str, str], mapped: Mapped, place: str) -> tuple[Kernel, int, float]:
    """Kernel, threads, milliseconds."""
    fields: dict[str, Any] = {field: default for field, (_, default) in mapped.kind.optional.items()}
    fields["threads"] = 1
    for field, column in mapped.columns.items():
        fields[field] = _value(mapped.kind, field, row[column], f"{place}, column {column!r}")
    fields.update(mapped.constants)
    ms = _milliseconds(row[mapped.latency], mapped, place)
    if (precision := fields["precision"]) not in PRECISIONS:
        column, meant = mapped.columns["precision"], _SPELLINGS.get(precision.lower())
        raise TableFormatError(
            f"{place}, column {column!r}: the precision must be one of {', '.join(PRECISIONS)}, found {precision!r}.",
            hint=None
            if meant is None
            else f"constants={{'precision': {meant!r}}} with where={{{column!r}: {precision!r}}}, instead of the column",
        )
    try:
        kernel = mapped.kind.make(fields)
    except ValueError as error:
        raise TableFormatError(f"{place}: {error}.") from error
    return kernel, fields["threads"], ms


def _value(kind: Kind, field: str, text: str, place: str) -> Any:
    if not text.strip() and field != "activation":
        raise TableFormatError(f"{place}: {field} must have a value, found an empty cell.")
    try:
        return READERS["count" if field == "threads" else kind.type_of(field)](text)
    except (ValueError, OverflowError) as error:
        expected = str(error) if str(error).startswith(("a ", "0 ")) else "a whole number from 1"
        raise TableFormatError(f"{place}: {field} must be {expected}, found {text.strip()!r}.") from error


def _milliseconds(text: str, mapped: Mapped, place: str) -> float:
    where = f"{place}, column {mapped.latency!r}"
    try:
        value = float(text)
    except ValueError as error:
        raise TableFormatError(
            f"{where}: a latency must be a number, found {text.strip()!r}.",
            hint="a decimal point in place of the comma, in all of them" if "," in text else None,
        ) from error
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
