"""From what was measured to a table: rows, and a header that says how, when, for which models and how well."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeprune.latency.intervals import repeatability
from edgeprune.latency.table import LatencyTable
from edgeprune.latency.table_rows import Row, kernel_row, network_row
from edgeprune.profiling.changes import changes, once
from edgeprune.profiling.measuring import MeasuredRun
from edgeprune.profiling.selecting import SAMPLE_MS, SAMPLES, WARMUP_MS
from edgeprune.profiling.subjects import Candidate, Subject
from edgeprune.spec import Fingerprint, Kernel, Measurement

if TYPE_CHECKING:
    from edgeprune.profiling.extending import Link


@dataclass(frozen=True)
class Part:
    """Items that were measured together.

    Attributes:
        run: What was found.
        kernels: Id of each kernel that is kept to the kernel.
        unsupported: Key of each kernel that the backend cannot write alone to the reason.
        anchors: Id of each kernel that was measured only to compare with an earlier run.
    """

    run: MeasuredRun
    kernels: Mapping[str, Kernel]
    unsupported: Mapping[str, str]
    anchors: Mapping[str, Kernel] = field(default_factory=dict)

    def anchored(self) -> dict[str, Measurement]:
        """Key of each anchor to what was measured."""
        found = self.run.measurements
        return {kernel.key: found[name] for name, kernel in self.anchors.items() if name in found}


@dataclass(frozen=True)
class Profiled:
    """All that one profiling run measured.

    Attributes:
        subjects: Its models.
        networks: Name of each measured network to its model's place in `subjects` and what it is.
        parts: What was measured, the networks in the first one.
        fingerprint: Of the board.
        request: Identity, board, settings and table of the run.
        edges: Stair edges that were found, see `edgeprune.profiling.steps.edges`.
    """

    subjects: Sequence[Subject]
    networks: Mapping[str, tuple[int, Candidate]]
    parts: Sequence[Part]
    fingerprint: Fingerprint
    request: Mapping[str, Any]
    edges: Sequence[Mapping[str, Any]] = ()


def table_of(profiled: Profiled) -> LatencyTable:
    """The table of a run that extends none."""
    header = {
        "identity": profiled.request["identity"],
        "fingerprint": asdict(profiled.fingerprint),
        "runtime": profiled.subjects[0].kernel_graph.backend.name,
        "threads": profiled.request["settings"][1],
        "precision": profiled.subjects[0].kernel_graph.backend.precision,
        "label": "measured",
        **({} if (times := profiled.subjects[0].kernel_graph.backend.layer_times) is None else {"timing": times.what}),
        "model": {"signature": profiled.request["models"][0][0], "inputs": profiled.request["models"][0][1]},
        **_statement(profiled, profiled.networks, None),
        "edges": [dict(edge) for edge in profiled.edges],
        "flags": _flags(profiled.parts),
        "unsupported": _unsupported(profiled.parts),
    }
    return LatencyTable.from_rows(header, _rows(profiled, profiled.networks, None))


def extended(base: LatencyTable, profiled: Profiled, link: Link) -> LatencyTable:
    """An earlier table with the rows of a further run; every row of the earlier one stays as it is.

    Args:
        base: The earlier table.
        profiled: What was measured now, anchors left out.
        link: How the two runs compare.
    """
    held = {(row["kind"], row["key"]) for row in base.rows}
    # What the table knows as a network was measured only as the sentinel.
    known = {subject.network(0) for subject in profiled.subjects if subject.dense_in(base) is not None}
    networks = {name: found for name, found in profiled.networks.items() if name not in known}
    rows = [*base.rows]
    rows += [row for row in _rows(profiled, networks, link) if (row["kind"], row["key"]) not in held]
    measured = {row["key"] for row in rows}
    statement = _statement(profiled, networks, base)
    now, before = statement["drift"], base.header.get("drift", {})
    flags = _united(base.header.get("flags", {}), _flags(profiled.parts), measured)
    unsupported = {**base.header.get("unsupported", {}), **_unsupported(profiled.parts)}
    header = {
        **base.header,
        "models": _models(base.header, statement["models"]),
        "edges": [*base.header.get("edges", ()), *map(dict, profiled.edges)],
        "flags": flags,
        "unsupported": {key: reason for key, reason in unsupported.items() if key not in measured},
        "drift": {
            "largest": max(before.get("largest", 0.0), now["largest"]),
            "repeated_stretches": before.get("repeated_stretches", 0) + now["repeated_stretches"],
            "lost_s": round(before.get("lost_s", 0.0) + now["lost_s"], 1),
            "drifted_rows": len(flags.get("drifted", ())),
        },
        "runs": [
            *base.header.get("runs", ()),
            {
                **statement,
                "fingerprint": {"disturbances": list(profiled.fingerprint.disturbances)},
                "link": {"change": link.change, "scale": link.scale, "ratios": dict(link.ratios)},
            },
        ],
    }
    return LatencyTable.from_rows(header, rows)


def with_clocks(table: LatencyTable, clocks: Mapping[str, Any], base: LatencyTable | None) -> LatencyTable:
    """The table with what became of the clocks, told of its last run where that extended another table."""
    header = dict(table.header)
    if base is None:
        header["clocks"] = dict(clocks)
    else:
        header["runs"] = [*header["runs"][:-1], {**header["runs"][-1], "clocks": dict(clocks)}]
    return LatencyTable(header, table.rows)


def _rows(profiled: Profiled, networks: Mapping[str, tuple[int, Candidate]], link: Link | None) -> list[Row]:
    def kept(measurement: Measurement) -> Measurement:
        return measurement if link is None else link.scaled(measurement)

    rows = [
        kernel_row(kernel, kept(part.run.measurements[name]))
        for part in profiled.parts
        for name, kernel in part.kernels.items()
        if name in part.run.measurements
    ]
    whole = profiled.parts[0].run.measurements
    for name, (place, candidate) in networks.items():
        subject = profiled.subjects[place]
        kernels, precision = subject.kernels(candidate), subject.kernel_graph.backend.precision
        rows.append(network_row(name, kernels, kept(whole[name]), subject.widths(candidate), precision))
    return rows


def _statement(
    profiled: Profiled, networks: Mapping[str, tuple[int, Candidate]], base: LatencyTable | None
) -> dict[str, Any]:
    """What is said of one run."""
    minutes, threads, seed = profiled.request["settings"]
    runs = [part.run for part in profiled.parts]
    dense: Measurement = runs[0].measurements[runs[0].sentinel]
    repeats = repeatability(
        part.run.rounds[name] for part in profiled.parts for name in part.kernels if name in part.run.rounds
    )
    return {
        "board": profiled.request["board"],
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "edgeprune": _own_version(),
        "models": [
            {
                "name": subject.name,
                "signature": signature,
                "inputs": inputs,
                "dense": subject.network(0) if (held := subject.dense_in(base)) is None else held.name,
                "networks": sorted(name for name, (owner, _) in networks.items() if owner == place),
                **({"tiles": [list(tile) for tile in subject.tiles]} if subject.tiles else {}),
            }
            for place, (subject, (signature, inputs)) in enumerate(
                zip(profiled.subjects, profiled.request["models"], strict=True)
            )
        ],
        "reference": {
            "network": runs[0].sentinel,
            "median_ms": dense.median_ms,
            "rounds_ms": list(dense.rounds_ms),
        },
        "repeatability": {"median_error": float(np.median(repeats)) if len(repeats) else None, "rounds": len(repeats)},
        "protocol": {
            "minutes": minutes,
            "seed": seed,
            "threads": threads,
            "rounds": len(dense.rounds_ms),
            "samples": SAMPLES,
            "sample_ms": SAMPLE_MS,
            "warmup_ms": WARMUP_MS,
            "overhead_ms": float(np.median([run.overhead_ms for run in runs])),
            "spent_s": round(sum(run.spent_s for run in runs), 1),
            "earlier_s": round(sum(run.earlier_s for run in runs), 1),
        },
        "drift": {
            "largest": max(run.drift for run in runs),
            "repeated_stretches": sum(run.repeated_rounds for run in runs),
            "lost_s": round(sum(run.lost_s for run in runs), 1),
            "drifted_rows": len(_flags(profiled.parts).get("drifted", ())),
            "sentinels_ms": [float(f"{value:.6g}") for run in runs for value in run.sentinels_ms],
        },
        "disturbances": list(once(disturbances_of(runs, profiled.fingerprint.disturbances))),
        "conditions": {"before": runs[0].conditions["before"], "after": runs[-1].conditions["after"]},
    }


def disturbances_of(runs: Sequence[MeasuredRun], told: Collection[str]) -> Iterator[str]:
    """What became of the board: before it was measured, during each part, and between two parts.

    Args:
        runs: What was measured, in order.
        told: What the probe said could disturb it: what was so then is no news.
    """
    for sentence in runs[0].conditions["before"].get("throttling") or ():
        if sentence not in told:
            yield f"when measuring began, {sentence}"
    for number, run in enumerate(runs):
        if number:
            yield from changes((runs[number - 1].conditions["after"], run.conditions["before"]))
        yield from run.disturbances


def _models(header: Mapping[str, Any], new: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The models of a table with those of a further run; of one that it knows, the further networks are added."""
    first = {"name": "", "dense": header.get("reference", {}).get("network"), "networks": [], **header.get("model", {})}
    models = [dict(entry) for entry in header.get("models", [first])]
    for entry in new:
        identity = entry["signature"], entry["inputs"]
        known = next((old for old in models if (old.get("signature"), old.get("inputs")) == identity), None)
        if known is None:
            models.append(dict(entry))
        else:
            known["networks"] = sorted({*known["networks"], *entry["networks"]})
            tiles = [*known.get("tiles", ()), *entry.get("tiles", ())]
            if tiles:
                known["tiles"] = [list(tile) for tile in dict.fromkeys(map(tuple, tiles))]
            # The dense network as it is now: it may run other kernels than it did.
            known["dense"] = entry["dense"]
    return models


def _flags(parts: Sequence[Part]) -> dict[str, list[str]]:
    flagged: dict[str, set[str]] = {}
    for part in parts:
        for name, flags in part.run.flags.items():
            for flag in () if name in part.anchors else flags:
                flagged.setdefault(flag, set()).add(part.kernels[name].key if name in part.kernels else name)
    return {flag: sorted(names) for flag, names in sorted(flagged.items())}


def _unsupported(parts: Sequence[Part]) -> dict[str, str]:
    found: dict[str, str] = {}
    for part in parts:
        found.update(part.unsupported)
        for name, reason in part.run.unusable.items():
            if name in part.kernels:
                found[part.kernels[name].key] = reason
    return found


def _united(
    mine: Mapping[str, Sequence[str]], theirs: Mapping[str, Sequence[str]], measured: Collection[str]
) -> dict[str, list[str]]:
    """Flags of both, of rows that there are."""
    both = {flag: {*mine.get(flag, ()), *theirs.get(flag, ())} & set(measured) for flag in sorted({*mine, *theirs})}
    return {flag: sorted(names) for flag, names in both.items() if names}


def _own_version() -> str:
    try:
        return version("edgeprune")
    except PackageNotFoundError:
        return "source"
