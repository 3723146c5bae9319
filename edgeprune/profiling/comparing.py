"""Compare engines on a board by ratio: interleaved in the same rounds, so that what disturbs one disturbs all.

Milliseconds of one engine vary by about a percent between processes; the ratio of two that were timed interleaved
varies by a quarter of that. Every acceptance figure is therefore such a ratio; milliseconds are told beside it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from edgeprune.errors import ConfigError
from edgeprune.profiling.statistics import SINGLE_RUNS, Ratio, Samples, at_percentile, median_ratio, summarize
from edgeprune.profiling.uploads import upload
from edgeprune.spec import Measurement

if TYPE_CHECKING:
    from edgeprune.boards.board import Board

PROCESS_SPREAD = 0.0027
"""Relative standard deviation of an interleaved ratio between processes, as measured on a quiet machine."""

ALONE_PROCESS_SPREAD = 0.01
"""The same of the milliseconds of one engine."""

SINGLE = {"samples": SINGLE_RUNS, "sample_ms": 0.0, "warmup_ms": 20.0, "item_ms": 60_000.0}
"""The part of a ``bench`` request that has every sample be one inference, of which no time limit cuts any off."""

_MEDIAN = 50
_LEAST_PROCESSES, _ROUNDS_PER_PROCESS = 4, 5
# Nothing is known of an engine's time before the first process has run: a deadline that only a hung board misses.
_FIRST_ITEM_S, _START_S, _PATIENCE = 60.0, 120.0, 4.0


@dataclass(frozen=True)
class Comparison:
    """Engines timed interleaved with a reference.

    Attributes:
        reference: Id of the reference.
        ratios: Id to its latency over the reference's (1.0 for the reference itself).
        measurements: Id to its milliseconds; of the percentile that was asked for.
        conditions: State of the board ``before`` and ``after``.
        overhead_ms: Cost of an empty call, milliseconds; not taken off anything here.
        processes: Per round the number of the process that timed it.
    """

    reference: str
    ratios: Mapping[str, Ratio]
    measurements: Mapping[str, Measurement]
    conditions: Mapping[str, Any]
    overhead_ms: float
    processes: tuple[int, ...]


def interleaved(names: list[str], rounds: int) -> list[list[str]]:
    """Order of each round: every engine is first as often as any other, and each order is followed by its reverse."""
    orders = []
    for number in range(rounds):
        turn = (number // 2) % len(names)
        order = names[turn:] + names[:turn]
        orders.append(order[::-1] if number % 2 else order)
    return orders


def compare(
    board: Board,
    engines: Mapping[str, bytes | Path],
    reference: str,
    *,
    runtime: str = "onnxruntime",
    threads: int = 1,
    rounds: int = 20,
    processes: int | None = None,
    samples: int = 3,
    sample_ms: float = 5.0,
    warmup_ms: float = 5.0,
    confidence: float = 0.95,
    seed: int = 0,
    percentile: int = 50,
    progress: Callable[[int, int, float, str], None] | None = None,
) -> Comparison:
    """Time engines interleaved with a reference engine.

    Args:
        board: Where; nobody else should use it meanwhile (`Board.hold`).
        engines: Id to engine file or its bytes, the reference among them.
        reference: Id of the engine that the others are divided by.
        runtime: Runtime that executes them.
        threads: Threads inside one operation.
        rounds: Rounds in all; each times every engine once.
        processes: Fresh processes that share the rounds: how memory happens to be laid out differs by process. By default
            one for every five rounds, at least four.
        samples: Samples per engine and round.
        sample_ms: Least length of one sample, milliseconds.
        warmup_ms: Least warm-up before each engine in each round, milliseconds.
        confidence: Of the interval of each ratio.
        seed: Of the bootstrap.
        percentile: What of a round is compared. Above 50 every sample is a single inference, there are `SINGLE_RUNS` of them
            per engine and round in wall-clock time, and a ratio is that of this percentile of the engine over that of the
            reference in the same round; `samples`, `sample_ms` and `warmup_ms` do not count then.
        progress: Told (items done, items in all, seconds left, what happens).

    Raises:
        ConfigError: The reference is not among the engines, or there are no rounds.
        RemoteError: The board was lost.
        BackendError: An engine does not load on the board.
    """
    if reference not in engines:
        raise ConfigError(f"the reference must be one of the engines {sorted(engines)}, found {reference!r}.")
    count = max(_LEAST_PROCESSES, rounds // _ROUNDS_PER_PROCESS) if processes is None else processes
    if rounds < 1 or count < 1:
        raise ConfigError(f"there must be at least one round and one process, found {rounds} and {count}.")
    entries = upload(board, engines, kernels=())
    names = [reference, *sorted(name for name in engines if name != reference)]
    orders = interleaved(names, rounds)
    times: dict[str, list[Samples]] = {name: [] for name in names}
    total, done = rounds * len(names), 0
    results = []
    begun = time.monotonic()

    def on_event(event: dict[str, Any]) -> None:
        nonlocal done
        if event.get("event") == "sample":
            times[event["id"]].append(Samples.of(event))
            done += 1
            if progress is not None:
                left_s = (time.monotonic() - begun) * (total - done) / done
                progress(done, total, left_s, f"timing {len(names)} engines interleaved")

    parts = _parts(orders, count)
    for part in parts:
        request = {
            "runtime": runtime,
            "threads": threads,
            "engines": entries,
            "rounds": part,
            "samples": samples,
            "sample_ms": sample_ms,
            "warmup_ms": warmup_ms,
            **(SINGLE if percentile != _MEDIAN else {}),
        }
        item_s = _PATIENCE * (time.monotonic() - begun) / done if done else _FIRST_ITEM_S
        deadline_s = _START_S + len(part) * len(names) * item_s
        results.append(board.call("bench", request, timeout_s=deadline_s, on_event=on_event))
    measurements = {
        name: summarize(rows, threads=threads) if percentile == _MEDIAN else at_percentile(rows, percentile)
        for name, rows in times.items()
    }
    medians = {name: found.rounds_ms for name, found in measurements.items()}
    owners = tuple(number for number, part in enumerate(parts) for _ in part)
    return Comparison(
        reference=reference,
        ratios={
            name: median_ratio(
                medians[name],
                medians[reference],
                processes=owners,
                process_spread=0.0 if name == reference else PROCESS_SPREAD,
                confidence=confidence,
                seed=seed,
            )
            for name in names
        },
        measurements=measurements,
        conditions={"before": results[0]["conditions"]["before"], "after": results[-1]["conditions"]["after"]},
        overhead_ms=median([result["overhead_ms"] for result in results]),
        processes=owners,
    )


def _parts(orders: list[list[str]], processes: int) -> list[list[list[str]]]:
    """Orders in at most `processes` runs of about equal length, none empty."""
    count = min(processes, len(orders))
    bounds = [len(orders) * number // count for number in range(count + 1)]
    return [orders[start:end] for start, end in pairwise(bounds)]
