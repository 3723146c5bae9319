"""Percentiles of single inferences of whole networks, beside their medians in the same rounds."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeprune.latency.table import LatencyTable
from edgeprune.latency.table_rows import network_key
from edgeprune.profiling.comparing import SINGLE, interleaved
from edgeprune.profiling.measuring import Progress
from edgeprune.profiling.statistics import SINGLE_RUNS, Samples, at_percentile
from edgeprune.profiling.uploads import upload

if TYPE_CHECKING:
    from edgeprune.boards.board import Board

PERCENTILES = (90, 95, 99)

ROUNDS = 5

_START_S, _PER_ITEM_S = 120.0, 120.0


def percentiles(
    board: Board,
    engines: Mapping[str, bytes | Path],
    *,
    runtime: str,
    threads: int,
    rounds: int = ROUNDS,
    runs: int = SINGLE_RUNS,
    progress: Progress | None = None,
) -> dict[str, dict[str, Any]]:
    """Time single inferences of engines in wall-clock time, whatever disturbs them: a tail is made of disturbances.

    Of a runtime that only runs in processes of its own they are by its clock, see `Backend.layer_times`.

    A percentile is that of the single inferences of a round, and of these the median over the rounds, so that one bad minute
    does not decide it.

    Args:
        board: Where; nobody else should use it meanwhile (`Board.hold`).
        engines: Id to engine; whole networks.
        runtime: Runtime that executes them.
        threads: Threads inside one operation.
        rounds: Rounds; each times every engine.
        runs: Single inferences of each engine and round.
        progress: Told what happens.

    Returns:
        As JSON, by id: ``runs`` in all, ``rounds``, ``median_ms``, ``ms`` and ``ratio`` (to the median of the same round) by
        percentile.

    Raises:
        RemoteError: The board was lost; nothing is kept.
        BackendError: A network does not load on the board.
    """
    taken: dict[str, list[Samples]] = {name: [] for name in engines}
    total, done, begun = rounds * len(engines), 0, time.monotonic()

    def on_event(event: dict[str, Any]) -> None:
        nonlocal done
        if event.get("event") == "sample":
            taken[event["id"]].append(Samples.of(event))
            done += 1
            if progress is not None:
                left_s = (time.monotonic() - begun) * (total - done) / done
                progress(done, total, left_s, "single inferences, for percentiles")

    request = {
        "runtime": runtime,
        "threads": threads,
        "engines": upload(board, engines, kernels=()),
        "rounds": interleaved(sorted(engines), rounds),
        **SINGLE,
        "samples": runs,
    }
    board.call("bench", request, timeout_s=_START_S + total * _PER_ITEM_S, on_event=on_event)
    found = {}
    for name, samples in taken.items():
        middle = np.array(at_percentile(samples, 50).rounds_ms)
        tails = {str(one): np.array(at_percentile(samples, one).rounds_ms) for one in PERCENTILES}
        found[name] = {
            "runs": sum(len(one.times_ms) for one in samples),
            "rounds": len(samples),
            "median_ms": float(np.median(middle)),
            "ms": {one: float(np.median(values)) for one, values in tails.items()},
            "ratio": {one: float(np.median(values / middle)) for one, values in tails.items()},
        }
    return found


def with_percentiles(table: LatencyTable, found: Mapping[str, Mapping[str, Any]]) -> LatencyTable:
    """The table with percentiles of its networks in its header; those of networks measured earlier are kept."""
    keys = {row["key"]: network_key(row["kernels"]) for row in table.rows if row["kind"] == "network"}
    records = {keys[name]: dict(record) for name, record in found.items()}
    return LatencyTable({**table.header, "percentiles": {**table.header.get("percentiles", {}), **records}}, table.rows)
