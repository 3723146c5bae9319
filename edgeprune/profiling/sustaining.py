"""Latencies in thermal equilibrium beside those of a cool board, for the networks of a table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.latency.table import LatencyTable
from edgeprune.latency.table_rows import network_key
from edgeprune.profiling.measuring import Progress
from edgeprune.profiling.statistics import Samples, summarize
from edgeprune.profiling.uploads import upload

if TYPE_CHECKING:
    from edgeprune.boards.board import Board

LIMIT_S = 600.0
"""Longest heating, seconds; a board that is not in equilibrium by then is said not to be."""

REST_S = 60.0
"""Longest rest before, seconds."""

_START_S, _PER_ENGINE_S = 180.0, 15.0


def sustained(
    board: Board,
    engines: Mapping[str, bytes | Path],
    heater: str,
    *,
    runtime: str,
    threads: int,
    limit_s: float = LIMIT_S,
    rest_s: float = REST_S,
    window_s: float = 1.0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Time engines on a rested board, heat it to equilibrium, and time them again.

    Equilibrium is reached when the median latency of the last thirty windows of a second differs by at most 1 % from
    that of the thirty before, and, where a temperature can be read, the hottest sensor by less than a degree.

    Args:
        board: Where; nobody else should use it meanwhile (`Board.hold`).
        engines: Id to engine; whole networks.
        heater: Id of the engine that heats.
        runtime: Runtime that executes them.
        threads: Threads inside one operation.
        limit_s: Longest heating, seconds.
        rest_s: Longest rest before, seconds.
        window_s: Length of one window, seconds.
        progress: Told what happens.

    Returns:
        As JSON: ``networks`` (id to ``burst_ms``, ``sustained_ms`` and their ``ratio``), ``settled``, ``seconds``,
        ``moved``, ``celsius``, ``curve`` (run_ms and celsius of each window), ``conditions``, ``statement``.

    Raises:
        RemoteError: The board was lost; nothing is kept, since it has cooled meanwhile.
        BackendError: A network does not load on the board.
    """
    taken: dict[str, dict[str, list[Samples]]] = {"burst": {}, "sustained": {}}
    curve: list[list[float | None]] = []

    def on_event(event: dict[str, Any]) -> None:
        kind = event.get("event")
        if kind == "sample":
            taken[event["phase"]].setdefault(event["id"], []).append(Samples.of(event))
        elif kind == "heat":
            curve.append([round(event["run_ms"], 5), event["celsius"]])
        if progress is not None and kind in ("rest", "heat"):
            whole_s, doing = (rest_s, "cooling") if kind == "rest" else (limit_s, "heating to equilibrium")
            progress(0, 0, max(0.0, whole_s - event["seconds"]), doing)

    entries = upload(board, engines, kernels=())
    deadline_s = _START_S + rest_s + limit_s + _PER_ENGINE_S * len(engines)
    result = board.call(
        "sustain",
        {
            "runtime": runtime,
            "threads": threads,
            "engines": entries,
            "heater": heater,
            "rest_s": rest_s,
            "limit_s": limit_s,
            "window_s": window_s,
        },
        timeout_s=deadline_s,
        on_event=on_event,
    )
    networks = {}
    for name in sorted(engines):
        burst, hot = (summarize(taken[phase][name], threads=threads).median_ms for phase in ("burst", "sustained"))
        networks[name] = {"burst_ms": burst, "sustained_ms": hot, "ratio": hot / burst}
    found = {name: result[name] for name in ("settled", "seconds", "moved", "celsius", "conditions")}
    return {**found, "networks": networks, "curve": curve, "statement": statement(result, networks[heater]["ratio"])}


def statement(result: Mapping[str, Any], ratio: float) -> str:
    """One sentence on what heating came to."""
    heated = f"after {result['seconds']:.0f} s of heating the dense network takes {ratio:.3f} times as long as at first"
    celsius = result["celsius"]
    if celsius["hot"] is None:
        heated += ", no temperature can be read"
    else:
        heated += f", at {celsius['hot']:.0f} degrees Celsius" + (
            f" instead of {celsius['cool']:.0f}" if celsius["cool"] is not None else ""
        )
    if result["settled"]:
        return f"{heated}; the board is in equilibrium"
    moved = "too short to tell" if result["moved"] is None else f"its latency still moves by {result['moved']:.1%}"
    return f"{heated}; the board is not in equilibrium: {moved}"


def with_sustained(table: LatencyTable, found: Mapping[str, Any]) -> LatencyTable:
    """The table with sustained latencies of its networks in its header; those of networks measured earlier are kept."""
    keys = {row["key"]: network_key(row["kernels"]) for row in table.rows if row["kind"] == "network"}
    former = table.header.get("sustained", {})
    networks = {**former.get("networks", {}), **{keys[name]: dict(one) for name, one in found["networks"].items()}}
    return LatencyTable({**table.header, "sustained": {**found, "networks": networks}}, table.rows)
