"""From windows and power readings of a replay to the energy of one inference, idle power subtracted.

The energy of one inference is that of the replay window above idle, over the number of runs. Idle is measured in windows
before and after each replay and interpolated in time between them, so that a slow drift (heat, a fan, a battery's voltage)
is taken out; how far the two differ goes into the uncertainty.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import Any

from edgeprune.boards.power import PowerScope
from edgeprune.errors import ShortWindowError
from edgeprune.profiling.power_trace import LEAST_S, LEAST_UPDATES, PowerTrace

OTHERS_LIMIT = 0.1
"""Cores that other programs may keep busy in a window before it is told."""


@dataclass(frozen=True)
class Window:
    """One stretch of a replay.

    Attributes:
        phase: ``"idle"`` or ``"replay"``.
        start_s: Its start on the board's monotonic clock, seconds.
        end_s: Its end, seconds.
        id: Which engine was replayed, or None.
        runs: How often it ran.
        own: Cores that the replaying process kept busy.
        others: Cores that other programs kept busy meanwhile, or None where the board does not tell.
    """

    phase: str
    start_s: float
    end_s: float
    id: str | None = None
    runs: int = 0
    own: float = 0.0
    others: float | None = None

    @property
    def middle_s(self) -> float:
        """Its middle, seconds."""
        return (self.start_s + self.end_s) / 2


@dataclass(frozen=True)
class EnergyMeasurement:
    """Energy of one inference of one engine, by replay.

    Attributes:
        energy_mj: Per inference above idle, millijoules; the mean over the replay windows.
        error_mj: Standard uncertainty, millijoules: noise, drift of idle, and how far the windows disagree. The accuracy of
            the sensor itself is not in it.
        gross_mj: Per inference with idle included, millijoules.
        power_mw: Mean power while it ran, milliwatts.
        idle_mw: Mean idle power around it, milliwatts.
        run_ms: Time per inference in the replay, back to back, milliseconds.
        cores: Cores that the replaying process kept busy, on average.
        runs: Inferences in all windows.
        windows: Replay windows.
        updates: Fewest renewals of a sensor in any of the windows.
        rails: What was summed.
        covers: A phrase that says what that is the power of.
        doubts: Sentences on what makes the figure doubtful.
    """

    energy_mj: float
    error_mj: float
    gross_mj: float
    power_mw: float
    idle_mw: float
    run_ms: float
    cores: float
    runs: int
    windows: int
    updates: int
    rails: tuple[str, ...]
    covers: str
    doubts: tuple[str, ...] = ()

    def record(self) -> dict[str, Any]:
        """JSON-ready, as tables and reports store it."""
        return {**asdict(self), "rails": list(self.rails), "doubts": list(self.doubts)}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> EnergyMeasurement:
        """What `record` gave."""
        return cls(**{**record, "rails": tuple(record["rails"]), "doubts": tuple(record["doubts"])})


@dataclass(frozen=True)
class _Replay:
    """One replay window: per-run energy above idle and its standard error, millijoules, and what it came from."""

    energy_mj: float
    error_mj: float
    power_mw: float
    idle_mw: float
    updates: int
    window: Window


def energies(
    windows: Sequence[Window],
    traces: Mapping[str, PowerTrace],
    scope: PowerScope,
    *,
    least_updates: int = LEAST_UPDATES,
    least_s: float = LEAST_S,
    doubts: Sequence[str] = (),
) -> dict[str, EnergyMeasurement]:
    """Energy per inference of every engine that was replayed.

    Args:
        windows: In order of time; each replay stands between two idle windows.
        traces: Sensor name to its readings, of every sensor of `scope`.
        scope: Sensors that are summed.
        least_updates: Fewest renewals of a sensor in a window.
        least_s: Least length of a window, seconds.
        doubts: Sentences on what happened meanwhile, which are told with each of them.

    Raises:
        ShortWindowError: A window is too short for a sensor, or an idle window is missing.
    """
    limits = {"least_updates": least_updates, "least_s": least_s}
    replays: dict[str, list[_Replay]] = {}
    for position, window in enumerate(windows):
        if window.phase != "replay" or window.id is None:
            continue
        around = windows[max(position - 1, 0) : position + 2]
        if len(around) < 3 or around[0].phase != "idle" or around[2].phase != "idle" or window.runs < 1:
            raise ShortWindowError(
                f"a replay must have an idle window before and after it and at least one run, found {window.id!r} without."
            )
        replays.setdefault(window.id, []).append(_above_idle(around, traces, scope, limits))
    return {name: _combined(found, scope, windows, doubts) for name, found in replays.items()}


def _above_idle(
    around: Sequence[Window], traces: Mapping[str, PowerTrace], scope: PowerScope, limits: Mapping[str, Any]
) -> _Replay:
    before, window, after = around
    # Where the replay's middle lies between those of the idle windows.
    part = (window.middle_s - before.middle_s) / (after.middle_s - before.middle_s)
    power_mw = idle_mw = variance = 0.0
    updates: list[int] = []
    for sensor in scope.sensors:
        trace = traces[sensor.name]
        first, active, last = (trace.window(each.start_s, each.end_s, **limits) for each in around)
        power_mw += active.mean_mw
        idle_mw += (1 - part) * first.mean_mw + part * last.mean_mw
        # Idle may have been anywhere between the two, with equal chance: a twelfth of the squared distance.
        drift = (last.mean_mw - first.mean_mw) ** 2 / 12
        variance += active.error_mw**2 + ((1 - part) * first.error_mw) ** 2 + (part * last.error_mw) ** 2 + drift
        updates += [first.updates, active.updates, last.updates]
    seconds = (window.end_s - window.start_s) / window.runs
    return _Replay(
        (power_mw - idle_mw) * seconds, math.sqrt(variance) * seconds, power_mw, idle_mw, min(updates), window
    )


def _combined(
    replays: Sequence[_Replay], scope: PowerScope, windows: Iterable[Window], doubts: Sequence[str]
) -> EnergyMeasurement:
    count = len(replays)
    energy = fmean(replay.energy_mj for replay in replays)
    error = math.sqrt(sum(replay.error_mj**2 for replay in replays)) / count
    if count > 1:
        error = max(error, stdev([replay.energy_mj for replay in replays]) / math.sqrt(count))
    runs = sum(replay.window.runs for replay in replays)
    run_s = sum(replay.window.end_s - replay.window.start_s for replay in replays) / runs
    power = fmean(replay.power_mw for replay in replays)
    return EnergyMeasurement(
        energy_mj=energy,
        error_mj=error,
        gross_mj=power * run_s,
        power_mw=power,
        idle_mw=fmean(replay.idle_mw for replay in replays),
        run_ms=run_s * 1e3,
        cores=fmean(replay.window.own for replay in replays),
        runs=runs,
        windows=count,
        updates=min(replay.updates for replay in replays),
        rails=scope.rails,
        covers=scope.covers,
        doubts=(*_doubts(energy, error, scope, windows), *doubts),
    )


def _doubts(energy_mj: float, error_mj: float, scope: PowerScope, windows: Iterable[Window]) -> Iterable[str]:
    if energy_mj <= 2 * error_mj:
        yield f"the energy above idle, {energy_mj:.3g} mJ, is not more than twice its uncertainty of {error_mj:.2g} mJ."
    for sensor in scope.sensors:
        if sensor.window_s is None and sensor.kind != "energy":
            yield f"nothing states over what time {sensor.name} averages: windows may hold some of what was before them."
    others = [window.others for window in windows if window.others is not None]
    if others and max(others) > OTHERS_LIMIT:
        yield f"other programs kept up to {max(others):.2f} cores busy while power was measured."
