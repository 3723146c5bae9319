"""Two tables of one device as one."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from edgeprune.errors import TableMismatchError
from edgeprune.latency.table import LatencyTable
from edgeprune.latency.table_header import comparable
from edgeprune.latency.table_rows import combined, row_measurement


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
    for row in second.rows:
        known = rows.get((row["kind"], row["key"]))
        if known is not None and known["kernels"] != row["kernels"]:
            row["key"] += "-" + hashlib.sha256(row["kernels"].encode()).hexdigest()[:8]
            known = rows.get((row["kind"], row["key"]))
        if known is not None:
            both = combined(row_measurement(known), row_measurement(row))
            row = {**known, **{name: getattr(both, name) for name in both.__dataclass_fields__}}
        rows[row["kind"], row["key"]] = row
    header = {**second.header, **first.header}
    for name in ("flags", "unsupported", "energy", "percentiles"):
        if name in header:
            header[name] = _united(first.header.get(name, {}), second.header.get(name, {}))
    if "sustained" in header:
        networks = (table.header.get("sustained", {}).get("networks", {}) for table in (first, second))
        header["sustained"] = {**header["sustained"], "networks": _united(*networks)}
    imports = [*first.header.get("imported", ()), *second.header.get("imported", ())]
    if imports:
        header["imported"] = imports
    header["merged"] = [*first.header.get("merged", [first.hash]), *second.header.get("merged", [second.hash])]
    return LatencyTable(header, rows.values())


def _united(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Entries of both; lists are joined, of other values mine stand."""
    both = {**theirs, **mine}
    lists = [name for name in both if isinstance(mine.get(name), list) and isinstance(theirs.get(name), list)]
    return {**both, **{name: sorted({*mine[name], *theirs[name]}) for name in lists}}
