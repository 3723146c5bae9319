"""Rows of a latency table: their columns, how they are made, and what a valid one is."""

from __future__ import annotations

import hashlib
import json
import math
import numbers
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from edgeprune.errors import ConfigError, TableFormatError
from edgeprune.spec import Kernel, Measurement

Row = dict[str, Any]

COLUMNS: Mapping[str, str] = {
    "kind": "text",
    "key": "text",
    "op": "text",
    "family": "text",
    "precision": "text",
    "median_ms": "number",
    "p90_ms": "number",
    "min_ms": "number",
    "spread": "number",
    "rounds_ms": "numbers",
    "samples": "count",
    "kernels": "text",
    "widths": "text",
    "times_ms": "samples",
    "cpu_share": "samples",
}
"""Column name to what it holds. `kernels` and `widths` are JSON objects, empty for kernel rows."""

OPTIONAL = ("times_ms", "cpu_share")
"""Columns that tables of old do not have, and that are empty where the single samples are not known."""

SHORTEST_MS, LONGEST_MS = 1e-6, 1e6
"""A time outside of these is a mistake in the unit or a broken clock: a nanosecond, 17 minutes."""

PRECISIONS = ("fp32", "fp16", "int8")
_SIZES = ("kernel", "stride", "dilation", "groups")


def kernel_row(kernel: Kernel, measurement: Measurement) -> Row:
    """Row of one measured kernel."""
    return {
        "kind": "kernel",
        "key": kernel.key,
        "op": kernel.op,
        "family": kernel.family,
        "precision": kernel.precision,
        **_statistics(measurement),
        "kernels": "{}",
        "widths": "{}",
    }


def network_row(
    name: str,
    kernels: Iterable[Kernel],
    measurement: Measurement,
    widths: Mapping[str, int] | None = None,
    precision: str = "fp32",
) -> Row:
    """Row of one network that was measured as a whole.

    Args:
        name: Unique in the table.
        kernels: What it executes, repeats included.
        measurement: Its latency.
        widths: Channel group to units kept.
        precision: Of its arithmetic.
    """
    counts = Counter(kernel.key for kernel in kernels)
    return {
        "kind": "network",
        "key": name,
        "op": "network",
        "family": "network",
        "precision": precision,
        **_statistics(measurement),
        "kernels": canonical_json(dict(counts)),
        "widths": canonical_json(dict(widths or {})),
    }


def network_key(kernels: str) -> str:
    """What a network is called in a header, whatever its name in the table: a hash of the row's ``kernels``."""
    return hashlib.sha256(kernels.encode()).hexdigest()[:16]


def row_measurement(row: Mapping[str, Any]) -> Measurement:
    """The timings that a row holds."""
    return Measurement(
        median_ms=row["median_ms"],
        p90_ms=row["p90_ms"],
        min_ms=row["min_ms"],
        spread=row["spread"],
        rounds_ms=tuple(row["rounds_ms"]),
        samples=row["samples"],
        times_ms=tuple(row["times_ms"]),
        cpu_share=tuple(row["cpu_share"]),
    )


def combined(first: Measurement, second: Measurement) -> Measurement:
    """Timings of the same thing in two runs as one: rounds of both, their median, the worse 90th percentile."""
    rounds = (*first.rounds_ms, *second.rounds_ms)
    middle = _median(rounds)
    return Measurement(
        median_ms=middle,
        p90_ms=max(first.p90_ms, second.p90_ms),
        min_ms=min(first.min_ms, second.min_ms),
        spread=_median([abs(value - middle) for value in rounds]) / middle,
        rounds_ms=rounds,
        samples=first.samples + second.samples,
        times_ms=(*first.times_ms, *second.times_ms),
        cpu_share=(*first.cpu_share, *second.cpu_share),
    )


def validated_rows(rows: Iterable[Mapping[str, Any]]) -> tuple[Row, ...]:
    """Check rows and put them into canonical order: kernels before networks, each by key.

    Raises:
        TableFormatError: A column is missing or unknown, a value has the wrong type, a time is not positive, finite and
            plausible, a key is not a kernel's, or a key comes twice.
    """
    checked: dict[tuple[str, str], Row] = {}
    for number, row in enumerate(rows):
        clean = _checked(row, number)
        identity = (clean["kind"], clean["key"])
        if identity in checked:
            raise _bad(
                number, f"each {identity[0]} must come once, found {_short(identity[1])} twice", "merge the runs"
            )
        checked[identity] = clean
    return tuple(checked[identity] for identity in sorted(checked))


def check_kernel(kernel: Kernel) -> str | None:
    """None if shapes and attributes can be computed with, else what is wrong."""
    for shape in (*kernel.inputs, kernel.output):
        if not all(_is_count(size) for size in shape):
            return f"sizes must be whole numbers from 1, found shape {shape}"
    if not (isinstance(kernel.op, str) and kernel.op and isinstance(kernel.family, str) and kernel.family):
        return "op and family must be names"
    if kernel.precision not in PRECISIONS:
        return f"precision must be one of {', '.join(PRECISIONS)}, found {kernel.precision!r}"
    for name, value in kernel.attributes:
        if name in _SIZES and not all(_is_count(item) for item in (value if isinstance(value, tuple) else (value,))):
            return f"{name} must be whole numbers from 1, found {value!r}"
    return None


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces; refuses NaN and infinity with ValueError."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True)


def _statistics(measurement: Measurement) -> Row:
    return {
        "median_ms": float(measurement.median_ms),
        "p90_ms": float(measurement.p90_ms),
        "min_ms": float(measurement.min_ms),
        "spread": float(measurement.spread),
        "rounds_ms": tuple(float(value) for value in measurement.rounds_ms),
        "samples": int(measurement.samples),
        "times_ms": tuple(float(value) for value in measurement.times_ms),
        "cpu_share": tuple(float(value) for value in measurement.cpu_share),
    }


def hashed(row: Row) -> Row:
    """What of a row its table's hash is taken of: tables of old keep theirs."""
    return {name: value for name, value in row.items() if value or name not in OPTIONAL}


def _checked(row: Mapping[str, Any], number: int) -> Row:
    row = {**dict.fromkeys(OPTIONAL, ()), **row}
    missing, unknown = sorted(set(COLUMNS) - set(row)), sorted(set(row) - set(COLUMNS))
    if missing or unknown:
        found = f"missing {', '.join(missing)}" if missing else f"unknown {', '.join(map(repr, unknown))}"
        raise _bad(number, f"the columns must be {', '.join(COLUMNS)}; {found}")
    clean: Row = {}
    for name, kind in COLUMNS.items():
        clean[name] = _typed(row[name], kind, name, number)
    _check_times(clean, number)
    if clean["kind"] == "kernel":
        _check_kernel_row(clean, number)
    elif clean["kind"] == "network":
        _check_network_row(clean, number)
    else:
        raise _bad(number, f"kind must be 'kernel' or 'network', found {_short(clean['kind'])}")
    return clean


def _typed(value: Any, kind: str, name: str, number: int) -> Any:
    if kind == "text" and isinstance(value, str):
        return value
    if kind == "number" and _is_number(value):
        return float(value)
    if kind in ("numbers", "samples") and not isinstance(value, (str, bytes, Mapping)):
        items: list[Any] = list(value) if isinstance(value, Iterable) else [None]
        if (items or kind == "samples") and all(_is_number(item) for item in items):
            return tuple(float(item) for item in items)
    if kind == "count" and _is_count(value):
        return int(value)
    expected = {"text": "text", "number": "a number", "numbers": "a list of numbers", "count": "a whole number from 1"}
    expected["samples"] = expected["numbers"]
    raise _bad(number, f"{name} must be {expected[kind]}, found {_short(value)}")


def _check_times(row: Row, number: int) -> None:
    if len(row["times_ms"]) != len(row["cpu_share"]):
        told = f"{len(row['times_ms'])} and {len(row['cpu_share'])}"
        raise _bad(number, f"times_ms and cpu_share must hold one value per sample each, found {told}")
    for name in ("median_ms", "p90_ms", "min_ms", "rounds_ms", "times_ms"):
        for value in row[name] if name in ("rounds_ms", "times_ms") else (row[name],):
            if not SHORTEST_MS <= value <= LONGEST_MS:
                limits = f"between {SHORTEST_MS:g} and {LONGEST_MS:g} ms"
                raise _bad(number, f"{name} must lie {limits}, found {value}", "check the unit: times are milliseconds")
    if not 0 <= row["spread"] <= LONGEST_MS:
        raise _bad(number, f"spread must be a finite share from 0, found {row['spread']}")
    if row["min_ms"] > row["median_ms"] * (1 + 1e-9):
        raise _bad(number, f"min_ms must not exceed median_ms, found {row['min_ms']} and {row['median_ms']}")


def _check_kernel_row(row: Row, number: int) -> None:
    kernel = _kernel(row["key"], number)
    for name in ("op", "family", "precision"):
        if row[name] != getattr(kernel, name):
            raise _bad(number, f"{name} must agree with the key ({getattr(kernel, name)!r}), found {_short(row[name])}")


def _check_network_row(row: Row, number: int) -> None:
    for name in ("kernels", "widths"):
        try:
            value = json.loads(row[name])
        except ValueError as error:
            raise _bad(number, f"{name} must be a JSON object, found {_short(row[name])}") from error
        if not (isinstance(value, dict) and all(_is_count(count) for count in value.values())):
            raise _bad(number, f"{name} must be a JSON object of whole numbers from 1, found {_short(row[name])}")
        if name == "kernels":
            if not value:
                raise _bad(number, f"network {_short(row['key'])} must have at least one kernel, found none")
            for key in value:
                _kernel(key, number)
        row[name] = canonical_json(value)


def _kernel(key: str, number: int) -> Kernel:
    try:
        kernel = Kernel.from_key(key)
        problem = check_kernel(kernel)
        if problem is None and kernel.key != key:
            problem = "it is not written as Kernel.key writes it"
    except (ConfigError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise _bad(number, f"the key must be a kernel's, found {_short(key)}") from error
    if problem is not None:
        raise _bad(number, f"the key must be a kernel's, found {_short(key)}: {problem}")
    return kernel


def _is_number(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, numbers.Real) and math.isfinite(float(value))


def _is_count(value: Any) -> bool:
    if type(value) is int:  # nearly always; asking an abstract class takes ten times as long
        return 1 <= value < 2**63
    return not isinstance(value, bool) and isinstance(value, numbers.Integral) and 1 <= int(value) < 2**63


def _median(values: Iterable[float]) -> float:
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _bad(number: int, problem: str, hint: str | None = None) -> TableFormatError:
    return TableFormatError(f"row {number} of the latency table is not valid: {problem}.", hint=hint)
