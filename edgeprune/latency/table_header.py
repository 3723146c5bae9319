"""The header of a latency table: what it must say, and what two tables must agree in."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from edgeprune.errors import TableFormatError
from edgeprune.latency.table_rows import PRECISIONS, canonical_json

SCHEMA = 1
"""Version of header and columns that this release reads and writes."""


def validated_header(header: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a header that a table may have.

    Raises:
        TableFormatError: It is none; names the field.
    """
    if not isinstance(header, Mapping):
        raise TableFormatError(f"the header of a latency table must be a JSON object, found {type(header).__name__}.")
    try:
        clean: dict[str, Any] = json.loads(canonical_json(dict(header)))
    except (TypeError, ValueError, RecursionError) as error:
        raise TableFormatError(
            f"the header of a latency table must be JSON, found one that is not: {error}."
        ) from error
    if clean.get("schema") != SCHEMA or isinstance(clean.get("schema"), bool):
        raise TableFormatError(
            f"a latency table must have schema {SCHEMA}, found {clean.get('schema')!r}.",
            hint="upgrade edgeprune, or edgeprune profile",
        )
    checks: dict[str, tuple[bool, str]] = {
        "identity": (isinstance(clean.get("identity"), dict) and bool(clean["identity"]), "the device's identity"),
        "runtime": (isinstance(clean.get("runtime"), str) and bool(clean["runtime"]), "the name of the runtime"),
        "threads": (type(clean.get("threads")) is int and clean["threads"] >= 1, "a number of threads from 1"),
        "precision": (clean.get("precision") in PRECISIONS, f"one of {', '.join(PRECISIONS)}"),
        "energy": (isinstance(clean.get("energy", {}), dict), "records by network"),
        "percentiles": (_records(clean.get("percentiles", {}), "ratio"), "records by network, each with its ratios"),
        "sustained": (isinstance(clean.get("sustained", {}), dict), "a record with its networks"),
        "latency": (
            isinstance(clean.get("latency", {}), dict)
            and set(clean.get("latency", {})) <= {"percentile", "sustained", "precision"},
            "a percentile, a state and a precision",
        ),
    }
    for name, (valid, expected) in checks.items():
        if not valid:
            raise TableFormatError(
                f"{name} in the header of a latency table must be {expected}, found {clean.get(name)!r}."
            )
    return clean


def _records(value: Any, field: str) -> bool:
    """Whether it is records by name, each of which has an object in some field."""
    return isinstance(value, dict) and all(
        isinstance(one, dict) and isinstance(one.get(field), dict) for one in value.values()
    )


def comparable(header: Mapping[str, Any]) -> dict[str, Any]:
    """What two tables must agree in to be merged, by the name of the field."""
    fields = {name: header[name] for name in ("runtime", "threads", "precision")}
    if "latency" in header:
        fields["latency"] = header["latency"]
    return {**{f"identity.{name}": value for name, value in header["identity"].items()}, **fields}
