"""Two tables of one device as one."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from edgeprune.errors import TableMismatchError
from edgeprune.latency.table import LatencyTable
from edgeprune.latency.table_header import comparable
from edgeprune.latency.table_rows import canonical_json, combined, row_measurement


def merged(first: LatencyTable, second: LatencyTable) -> LatencyTable:
    """See `LatencyTable.merge`."""
    mine, theirs = comparable(first.header), comparable(second.header)
    for name in sorted(set(mine) | set(theirs)):
        if mine.get(name) != theirs.get(name):
            raise TableMismatchError(
                f"tables that are merged must agree in {name}, found {mine.get(name)!r} and {theirs.get(name)!r}.",
                hint="profile the device again with the runtime that is installed now",
            )
    if second.hash == first.hash:
        return first
    rows = {(row["kind"], row["key"]): row for row in first.rows}
    names: dict[str, str] = {}
    for row in second.rows:
        known = rows.get((row["kind"], row["key"]))
        if known is not None and known["kernels"] != row["kernels"]:
            name = f"{row['key']}-{hashlib.sha256(row['kernels'].encode()).hexdigest()[:8]}"
            names[row["key"]] = row["key"] = name
            known = rows.get((row["kind"], row["key"]))
        if known is not None:
            both = combined(row_measurement(known), row_measurement(row))
            row = {**known, **{name: getattr(both, name) for name in both.__dataclass_fields__}}
        rows[row["kind"], row["key"]] = row
    told = {**second.header, **_renamed(second.header, names)}
    header = {**told, **first.header}
    for name in ("flags", "unsupported", "energy", "percentiles"):
        if name in header:
            header[name] = _united(first.header.get(name, {}), told.get(name, {}))
    for name in ("models", "edges", "disturbances", "runs"):
        if name in header:
            header[name] = _joined(first.header.get(name, ()), told.get(name, ()))
    if "drift" in first.header and "drift" in second.header:
        one, other = first.header["drift"], second.header["drift"]
        header["drift"] = {
            **one,
            "largest": max(one.get("largest") or 0.0, other.get("largest") or 0.0),
            "repeated_stretches": one.get("repeated_stretches", 0) + other.get("repeated_stretches", 0),
            "drifted_rows": len(header.get("flags", {}).get("drifted", ())),
        }
    if "sustained" in header:
        networks = (table.header.get("sustained", {}).get("networks", {}) for table in (first, second))
        header["sustained"] = {**header["sustained"], "networks": _united(*networks)}
    imports = [*first.header.get("imported", ()), *second.header.get("imported", ())]
    if imports:
        header["imported"] = imports
    header["merged"] = [*first.header.get("merged", [first.hash]), *second.header.get("merged", [second.hash])]
    return LatencyTable(header, rows.values())


def _renamed(header: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Fields of a header that name networks, with the names that these have now."""
    found: dict[str, Any] = {}
    if "flags" in header:
        found["flags"] = {flag: [names.get(key, key) for key in keys] for flag, keys in header["flags"].items()}
    if "models" in header:
        found["models"] = [
            {
                **model,
                "dense": names.get(model.get("dense"), model.get("dense")),
                "networks": [names.get(name, name) for name in model.get("networks", ())],
            }
            for model in header["models"]
        ]
    return found


def _joined(mine: Sequence[Any], theirs: Sequence[Any]) -> list[Any]:
    """Entries of both, each once; of a model that both have measured, the networks of both."""
    found = [dict(entry) if isinstance(entry, Mapping) else entry for entry in mine]
    places = {_model(entry): place for place, entry in enumerate(found) if _model(entry) is not None}
    for entry in theirs:
        place = places.get(_model(entry))
        if place is not None:
            networks = {*found[place].get("networks", ()), *entry.get("networks", ())}
            found[place] = {**found[place], "networks": sorted(networks)}
        elif entry not in found:
            found.append(entry)
    return found


def _model(entry: Any) -> str | None:
    """What an entry on a model is told by: its signature and inputs; None for entries on anything else."""
    if not (isinstance(entry, Mapping) and "signature" in entry):
        return None
    return canonical_json([entry["signature"], entry.get("inputs")])


def _united(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Entries of both; lists are joined, of other values mine stand."""
    both = {**theirs, **mine}
    lists = [name for name in both if isinstance(mine.get(name), list) and isinstance(theirs.get(name), list)]
    return {**both, **{name: sorted({*mine[name], *theirs[name]}) for name in lists}}
