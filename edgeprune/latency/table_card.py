"""Data card of a latency table, in Markdown: what a reader must know before believing a number in it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from edgeprune.errors import ConfigError
from edgeprune.latency.intervals import repeatability
from edgeprune.latency.table import LatencyTable
from edgeprune.latency.table_rows import Row
from edgeprune.spec import Kernel

_LONGEST = 160


def markdown(table: LatencyTable) -> str:
    """The card; ends with a newline."""
    header = table.header
    rows = list(table.rows)
    parts = [
        f"# Latency table: {_text(table.device)}, {_text(header['runtime'])}",
        f"{len(table.kernels)} kernels and {len(table.networks)} networks, {_text(header.get('label', 'of unknown origin'))}.",
        _table(("", ""), _facts(table)),
        *_imports(header.get("imported", ())),
        "## What it holds",
        _table(
            ("family", "precision", "rows", "operations", "shortest ms", "median ms", "longest ms", "repeats to"),
            [_family(name, members) for name, members in _families(rows)],
        ),
        "Repeats to: median error that a perfect prediction would show, because measurements do not repeat exactly;"
        " `-` where no row was measured twice.",
        _beside(table),
        *_doubts(header),
        *_conditions(header),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def flagged(count: int) -> str:
    """What is said of some rows with a flag, up to its name."""
    return "1 row is flagged" if count == 1 else f"{count} rows are flagged"


def _facts(table: LatencyTable) -> list[tuple[str, str]]:
    header = table.header
    found = [(f"device: {name}", value) for name, value in header["identity"].items() if value not in (None, "", [])]
    found += [
        (name, header[name])
        for name in ("threads", "precision", "timing", "clocks", "created", "edgeprune")
        if name in header
    ]
    found += [("model", _model(entry)) for entry in header.get("models") or filter(None, [header.get("model")])]
    protocol = header.get("protocol")
    if isinstance(protocol, Mapping):
        found += [(f"protocol: {name}", value) for name, value in protocol.items()]
    elif protocol is not None:
        found.append(("protocol", protocol))
    found += [("schema", header["schema"]), ("sha256 of the content", table.hash)]
    return [(name, _text(value)) for name, value in found]


def _model(entry: Any) -> Any:
    """What a person calls a model, and what tells it from others."""
    if not isinstance(entry, Mapping):
        return entry
    said = " ".join(map(str, entry.get("origin") or ())) or entry.get("name")
    facts = [f"inputs {entry['inputs']}"] * ("inputs" in entry)
    facts += [f"signature {entry['signature']}"] * ("signature" in entry)
    return ", ".join([*([said] if said else []), *facts]) or entry


def _imports(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    if not entries:
        return []
    rows = [
        tuple(
            _text(entry.get(name, ""))
            for name in ("source", "sha256", "kernel", "latency", "where", "rows", "left_out")
        )
        for entry in entries
    ]
    return [
        "## Where it comes from",
        _table(("file", "sha256", "kernels", "times", "rows where", "rows", "left out"), rows),
    ]


def _families(rows: Sequence[Row]) -> list[tuple[tuple[str, str], list[Row]]]:
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["family"], row["precision"]), []).append(row)
    return sorted(found.items(), key=lambda item: (item[0][0] == "network", -len(item[1])))


def _family(name: tuple[str, str], rows: Sequence[Row]) -> tuple[str, ...]:
    times = np.array([row["median_ms"] for row in rows])
    errors = repeatability(row["rounds_ms"] for row in rows)
    operations = Counter(row["op"] for row in rows)
    return (
        name[0],
        name[1],
        str(len(rows)),
        ", ".join(f"{_text(op)} {count}" for op, count in operations.most_common()),
        *(f"{value:.4g}" for value in (times.min(), np.median(times), times.max())),
        f"{100 * float(np.median(errors)):.1f} %" if len(errors) else "-",
    )


def _beside(table: LatencyTable) -> str:
    """What it holds of its networks besides medians; empty where that is nothing."""
    header = table.header
    counts = {
        "energy per inference": len(table.energy),
        "percentiles of single inferences": len(header.get("percentiles") or {}),
        "the latency in thermal equilibrium": len((header.get("sustained") or {}).get("networks", {})),
    }
    told = [f"{name} of {count} networks" for name, count in counts.items() if count]
    return f"Besides: {', '.join(told)}." if told else ""


def _doubts(header: Mapping[str, Any]) -> list[str]:
    flags = header.get("flags") or {}
    lines = [f"- {flagged(len(keys))} `{_text(flag)}`." for flag, keys in sorted(flags.items()) if keys]
    lines += _lacking(header.get("unsupported") or {})
    lines += [
        f"- {_text(sentence)}"
        for told in (header, *(header.get("runs") or ()))
        for sentence in told.get("disturbances") or ()
    ]
    drift = header.get("drift") or {}
    if drift.get("largest") is not None:
        lines.append(
            f"- The sentinel drifted by at most {drift['largest']:.1%}; "
            f"{drift.get('repeated_stretches', 0)} stretches were repeated, "
            f"{drift.get('lost_s', 0.0):.0f} s were lost to others who used the core."
        )
    return ["## Doubts", "\n".join(lines)] if lines else []


def _lacking(unsupported: Mapping[str, str]) -> Iterator[str]:
    """A line per operation and reason for which kernels could not be measured, by their keys."""
    counts = Counter((_operation(key), reason) for key, reason in unsupported.items())
    for (op, reason), count in sorted(counts.items()):
        which = f"`{_text(op)}` is" if count == 1 else f"{count} kernels of `{_text(op)}` are"
        yield f"- {which} not in it: {_text(reason)}"


def _operation(key: str) -> str:
    try:
        return Kernel.from_key(key).op
    except ConfigError:
        return key


def _conditions(header: Mapping[str, Any]) -> list[str]:
    fingerprint = header.get("fingerprint") or {}
    rows = [
        (name, _text(value)) for name, value in {**fingerprint, **(header.get("conditions") or {})}.items() if value
    ]
    return ["## Device and conditions", _table(("", ""), rows)] if rows else []


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _text(value: Any) -> str:
    """One line that cannot leave its cell."""
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    text = " ".join(text.split()).replace("|", "\\|")
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."
