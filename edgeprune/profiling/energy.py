"""`measure_energy`: energy per inference of compiled engines on a board, by replay while its power is read.

Source of the protocol: engines are repeated for at least 5 s and 20 renewals of the sensor, and idle power is measured
before and after at the same clocks (compare MLPerf Power, https://github.com/mlcommons/power-dev, which measures the wall
and keeps idle in). Energy of single layers is not measured: sensors are renewed every 1 to 100 ms and slower, layers take
a hundredth of that.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeprune.boards.power import BoardPower, PowerScope
from edgeprune.errors import ConfigError, PowerUnavailableError
from edgeprune.latency.table import LatencyTable
from edgeprune.latency.table_rows import network_key
from edgeprune.profiling.changes import changes
from edgeprune.profiling.energy_windows import EnergyMeasurement, Window, energies
from edgeprune.profiling.host_meter import HostMeter, look
from edgeprune.profiling.power_trace import LEAST_S, LEAST_UPDATES, PowerTrace
from edgeprune.profiling.uploads import upload

if TYPE_CHECKING:
    from edgeprune.boards.board import Board

SETTLE_S = 1.0
"""Runs before a replay window begins and rest before an idle window begins, seconds."""
POLL_S = 0.02
"""Between two readings of a sensor that is asked, seconds."""
# Sources that cost a process per reading.
_SLOW_POLLS_S: Mapping[str, float] = {"pmic": 0.1}

_MARGIN = 1.25
"""Windows are so much longer than their sensors need, since renewals come late at times."""
_SLOWEST_S = 1.0
"""Period that is taken for a sensor of which nobody states one, seconds."""
_START_S, _PATIENCE = 120.0, 2.0
_OFTEN = 0.01
"""Share of its readings that a sensor may fail without a word: INA3221s answer with an error now and then."""


def measure_energy(
    board: Board,
    engines: Mapping[str, bytes | Path],
    *,
    runtime: str = "onnxruntime",
    threads: int = 1,
    rounds: int = 2,
    replay_s: float | None = None,
    idle_s: float | None = None,
    settle_s: float = SETTLE_S,
    rails: Sequence[str] | None = None,
    meter: str | None = None,
    host_meter: str | None = None,
    power: BoardPower | None = None,
    least_updates: int = LEAST_UPDATES,
    least_s: float = LEAST_S,
    seed: int = 0,
    start_s: float = 0.0,
    progress: Callable[[int, int, float, str], None] | None = None,
) -> dict[str, EnergyMeasurement]:
    """Measure the energy per inference of engines.

    Args:
        board: Where; nobody else should use it meanwhile (`Board.hold`), and its clocks should not change.
        engines: Id to engine file or its bytes.
        runtime: Runtime that executes them.
        threads: Threads inside one operation.
        rounds: Replay windows of each engine; each round has another order.
        replay_s: Length of a replay window, seconds; by default what the slowest sensor needs, at least 5 s.
        idle_s: Length of an idle window, seconds; by default the same.
        settle_s: Runs before each replay window, and rest before each idle window, seconds.
        rails: Rails that are summed; by default those that are the whole board (`BoardPower.scope`).
        meter: Command on the board that prints an external meter's watts.
        host_meter: Command on this machine that does, instead.
        power: What `power_of` said, where the caller has it.
        least_updates: Fewest renewals of a sensor in a window; with fewer, the window is refused.
        least_s: Least length of a window, seconds; a shorter one is refused.
        seed: Of the orders.
        start_s: What it takes about until an engine runs, seconds, where each replay is a process of its own.
        progress: Told (windows done, windows in all, seconds left, what happens).

    Raises:
        ConfigError: There are no engines, a duration is not positive, or a meter hangs on both machines.
        PowerUnavailableError: No power can be read, or nothing says which rails are the board's.
        ShortWindowError: A window is too short for a sensor.
        BackendError: An engine does not load or run on the board.
        RemoteError: The board was lost.
    """
    if not engines or rounds < 1:
        raise ConfigError(f"there must be at least one engine and one round, found {len(engines)} and {rounds}.")
    for name, seconds in (("replay_s", replay_s), ("idle_s", idle_s), ("settle_s", settle_s)):
        if seconds is not None and not seconds > 0:
            raise ConfigError(f"{name} must be greater than 0, found {seconds}.")
    scope = (power or power_of(board, meter=meter, host_meter=host_meter)).scope(rails)
    window_s = needed_s(scope)
    replay_s, idle_s = replay_s or window_s, idle_s or window_s
    order = _order(sorted(engines), rounds, seed)
    request = {
        "runtime": runtime,
        "threads": threads,
        "engines": upload(board, engines, kernels=()),
        "order": order,
        "channels": [sensor.name for sensor in scope.sensors] if host_meter is None else [],
        "interval_s": max(_SLOW_POLLS_S.get(sensor.source, POLL_S) for sensor in scope.sensors),
        "idle_s": idle_s,
        "replay_s": replay_s,
        "settle_s": settle_s,
        "meter": meter,
    }
    nominal_s = settle_s + idle_s + len(order) * (2 * settle_s + replay_s + idle_s)
    nominal_s += (len(engines) + len(order)) * start_s  # each is tried once before
    windows, traces, doubts = _replayed(board, request, scope, nominal_s, progress, host_meter)
    return energies(windows, traces, scope, least_updates=least_updates, least_s=least_s, doubts=doubts)


def power_of(board: Board, *, meter: str | None = None, host_meter: str | None = None) -> BoardPower:
    """What can be read of a board's power, by its own sensors or by an external meter.

    Args:
        board: Which.
        meter: Command on the board that prints the meter's watts.
        host_meter: Command on this machine that does.

    Raises:
        ConfigError: Both are given.
        RemoteError: The board was lost.
    """
    if host_meter is None:
        return board.power(meter=meter)
    if meter is not None:
        raise ConfigError("an external meter must hang on the board or on this machine, found a command for each.")
    return look(host_meter)


def with_energies(table: LatencyTable, found: Mapping[str, EnergyMeasurement]) -> LatencyTable:
    """The table with the energies of its networks in its header, by name; those of networks measured earlier are kept."""
    keys = {row["key"]: network_key(row["kernels"]) for row in table.rows if row["kind"] == "network"}
    records = {keys[name]: measurement.record() for name, measurement in found.items()}
    return LatencyTable({**table.header, "energy": {**table.header.get("energy", {}), **records}}, table.rows)


def needed_s(scope: PowerScope) -> float:
    """Length of a window that holds enough renewals of every sensor, seconds, its averaging window included."""
    lengths = [LEAST_S * _MARGIN]
    for sensor in scope.sensors:
        period_s = sensor.period_s
        if period_s is None:
            # A counter that is asked is renewed about as often, as far as is known of them; others may be slow.
            period_s = 0.1 if sensor.kind == "energy" else _SLOWEST_S
        averaging_s = sensor.window_s or 0.0
        lengths.append(_MARGIN * max(LEAST_S, LEAST_UPDATES * period_s) + averaging_s)
    return max(lengths)


def _order(names: list[str], rounds: int, seed: int) -> list[str]:
    """Every engine once per round, each round shuffled."""
    shuffler = random.Random(seed)
    return [name for _ in range(rounds) for name in shuffler.sample(names, len(names))]


def _replayed(
    board: Board,
    request: Mapping[str, Any],
    scope: PowerScope,
    nominal_s: float,
    progress: Callable[[int, int, float, str], None] | None,
    host_meter: str | None,
) -> tuple[list[Window], dict[str, PowerTrace], list[str]]:
    """Windows, readings by sensor, and sentences on what happened meanwhile that makes them doubtful."""
    windows: list[Window] = []
    readings: dict[str, tuple[list[float], list[float]]] = {sensor.name: ([], []) for sensor in scope.sensors}
    total, begun = 2 * len(request["order"]) + 1, time.monotonic()
    here = None if host_meter is None else HostMeter(host_meter, scope.sensors[0].name)

    def on_event(event: dict[str, Any]) -> None:
        if event["event"] == "window":
            if here is not None:
                here.hear(event["end_s"])
            windows.append(Window(**{name: event[name] for name in Window.__dataclass_fields__}))
            if progress is not None:
                left_s = max(0.0, nominal_s - (time.monotonic() - begun))
                progress(len(windows), total, left_s, f"energy by replay on {' + '.join(scope.rails)}")
        elif event["event"] == "readings" and event["channel"] in readings:
            times, values = readings[event["channel"]]
            times.extend(event["t_s"])
            values.extend(event["values"])

    with here or contextlib.nullcontext():
        ended = board.call("energy", request, timeout_s=_START_S + _PATIENCE * nominal_s, on_event=on_event)
        if here is not None:
            readings[here.name] = here.readings()
    silent = [name for name, (times, _) in readings.items() if not times]
    if silent:
        raise PowerUnavailableError(
            f"power sensor {silent[0]} must give readings while engines run, found none.", hint="edgeprune device probe"
        )
    traces = {
        sensor.name: PowerTrace(sensor, np.array(readings[sensor.name][0]), np.array(readings[sensor.name][1]))
        for sensor in scope.sensors
    }
    states = ended["conditions"]
    doubts = [*changes((states["before"], states["after"])), *missed(ended["missed"], traces)]
    return windows, traces, doubts


def missed(counts: Mapping[str, int], traces: Mapping[str, PowerTrace]) -> Iterator[str]:
    """A sentence for each sensor that failed so often that it should be known.

    Args:
        counts: Readings that failed, by sensor.
        traces: Those that did not.
    """
    for name, trace in traces.items():
        failed = counts.get(name, 0)
        asked = failed + len(trace.t_s)
        if failed > _OFTEN * asked:
            yield f"{name} gave no value in {failed} of {asked} readings; they are left out."
