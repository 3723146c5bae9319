"""From readings of one power sensor to its mean power over a window, with an uncertainty, or a stated refusal.

A window is part of a *replay*: one thing is repeated, or nothing is done, from before the window begins until it ends. So
the power in it is steady but for noise and slow drift, and the mean over what of the window was seen is the mean over the
window. That is what makes slow sensors usable, and the reason why windows must hold many renewals of the sensor.

The readings of a window are integrated by the kind of sensor:

- ``power``: trapezoids between readings, so jitter and lost readings only thin them out;
- ``average``: a reading stands for the time before it; the averaging window's length after the start is left out, because
  averages that end there still hold what was before;
- ``energy``: the difference of the counter between its first and last renewal in the window, wraps added.

Source of the default limits: Yang, Adamek, Armour, "Part-time Power Measurements: nvidia-smi's Lack of Attention"
(arXiv 2312.02741): many repetitions, or seconds of them, because a sensor's period and averaging hide what is shorter.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from edgeprune.boards.power import METER, PowerSensor
from edgeprune.errors import ShortWindowError

LEAST_UPDATES, LEAST_S = 20, 5.0
"""A window must hold so many renewals of the sensor and be so long, seconds."""
LARGEST_GAP = 0.25
"""Largest share of a window that may pass without a reading."""

_BLOCKS = 10
_FEW_CHANGES = 5
_LEAST_PERIOD_S = 1e-6
"""No sensor is renewed more often; a clock that is read wrongly may say so."""


@dataclass(frozen=True)
class WindowPower:
    """Power over one window.

    Attributes:
        mean_mw: Mean power, milliwatts.
        error_mw: Standard error of the mean, milliwatts, from blocks of the window, so that slow noise counts.
        updates: Renewals of the sensor that were seen.
    """

    mean_mw: float
    error_mw: float
    updates: int


class PowerTrace:
    """Readings of one sensor, in order of time.

    Args:
        sensor: What was read.
        t_s: Times of the readings, seconds, in any order; of readings at the same time the last one counts.
        values: Milliwatts or millijoules, as the sensor's kind says; those that are not finite are dropped.

    Attributes:
        t_s: Times, seconds, strictly increasing.
        values: Readings; a counter's wraps are undone.
        resets: Times at which a counter went back without a known wrap, seconds.
    """

    def __init__(self, sensor: PowerSensor, t_s: NDArray[np.float64], values: NDArray[np.float64]) -> None:
        self.sensor = sensor
        times, readings = np.asarray(t_s, dtype=float), np.asarray(values, dtype=float)
        sound = np.isfinite(times) & np.isfinite(readings)
        times, readings = times[sound], readings[sound]
        order = np.argsort(times, kind="stable")
        times, readings = times[order], readings[order]
        last = np.append(times[1:] > times[:-1], True)[: len(times)]
        self.t_s, self.values = times[last], readings[last]
        self.resets: tuple[float, ...] = ()
        if sensor.kind == "energy":
            self._unwrap()

    def _unwrap(self) -> None:
        """Make the counter rise throughout, and note where it cannot be known by how much it did."""
        back = np.flatnonzero(np.diff(self.values) < 0) + 1
        wrap = self.sensor.wrap_mj
        added = np.zeros(len(self.values))
        resets = []
        for index in back:
            # A counter that wrapped was near its end before and is near its start now; else it was set back.
            fell = self.values[index - 1] - self.values[index]
            if wrap is not None and fell > 0.5 * wrap:
                added[index] = wrap
            else:
                added[index] = fell
                resets.append(float(self.t_s[index]))
        self.values = self.values + np.cumsum(added)
        self.resets = tuple(resets)

    def period_s(self) -> float | None:
        """How often the sensor is renewed, seconds: as stated, else the usual least gap between changes, else None.

        Readings come faster than renewals where a sensor is slow, and repeat its last value until then. An external meter
        prints a reading when it has one.
        """
        if self.sensor.period_s is not None:
            return self.sensor.period_s
        if self.sensor.source == METER:
            return max(float(np.median(np.diff(self.t_s))), _LEAST_PERIOD_S) if len(self.t_s) > 1 else None
        changes = self.t_s[1:][np.diff(self.values) != 0]
        if len(changes) < _FEW_CHANGES:
            return None
        return max(float(np.quantile(np.diff(changes), 0.1)), _LEAST_PERIOD_S)

    def updates(self, start_s: float, end_s: float) -> NDArray[np.intp]:
        """Indices of the readings within a window that are renewals of the sensor, in order."""
        inside = np.flatnonzero((self.t_s >= start_s) & (self.t_s <= end_s))
        if self.sensor.kind == "energy":
            return np.array(
                [index for index in inside if index > 0 and self.values[index] > self.values[index - 1]], int
            )
        period = self.period_s()
        if period is None:
            changed = [index for index in inside if index > 0 and self.values[index] != self.values[index - 1]]
            return np.array(changed, dtype=int)
        kept: list[int] = []
        for index in inside:
            # Half a period of tolerance: polls and renewals are not in step.
            if not kept or self.t_s[index] - self.t_s[kept[-1]] >= 0.5 * period:
                kept.append(int(index))
        # A sensor that is asked more often than it is renewed has no more renewals for that.
        return np.array(kept[: int((end_s - start_s) / period) + 1], dtype=int)

    def window(
        self, start_s: float, end_s: float, *, least_updates: int = LEAST_UPDATES, least_s: float = LEAST_S
    ) -> WindowPower:
        """Mean power over a window of a replay.

        Args:
            start_s: Its start on the clock of the readings, seconds.
            end_s: Its end, seconds.
            least_updates: Fewest renewals of the sensor.
            least_s: Least length, seconds, the averaging window not counted.

        Raises:
            ShortWindowError: The window is too short, holds too few renewals or too long a gap, or the counter was set
                back in it.
        """
        name = self.sensor.name
        begin = start_s + (self.sensor.window_s or 0.0 if self.sensor.kind == "average" else 0.0)
        if end_s - begin < least_s:
            raise ShortWindowError(
                f"a window of {name} must last {least_s:g} s beside its averaging window, found {max(end_s - begin, 0):.2f} s.",
                hint="replay for longer",
            )
        if any(begin <= time_s <= end_s for time_s in self.resets):
            raise ShortWindowError(f"the counter {name} must not be set back within a window, found that it was.")
        found = self.updates(begin, end_s)
        if len(found) < max(least_updates, 2):
            period = self.period_s()
            pace = "its period is unknown" if period is None else f"it is renewed every {period:.3g} s"
            raise ShortWindowError(
                f"a window must hold {least_updates} renewals of {name}, found {len(found)} in {end_s - begin:.1f} s; {pace}.",
                hint="replay for longer",
            )
        edges = [begin, *self.t_s[(self.t_s >= begin) & (self.t_s <= end_s)], end_s]
        gap = max(after - before for before, after in pairwise(edges))
        if gap > LARGEST_GAP * (end_s - begin):
            raise ShortWindowError(
                f"no more than {LARGEST_GAP:.0%} of a window may pass without a reading of {name}, found {gap:.1f} s "
                f"of {end_s - begin:.1f} s.",
                hint="replay for longer",
            )
        power, seconds = self._steps(begin, end_s, found)
        mean = float(np.dot(power, seconds) / seconds.sum())
        return WindowPower(mean, _block_error(power, seconds), len(found))

    def _steps(
        self, start_s: float, end_s: float, updates: NDArray[np.intp]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Power, milliwatts, and duration, seconds, of consecutive pieces of the window."""
        if self.sensor.kind == "energy":
            # From renewal to renewal: between them the counter stands still and says nothing.
            times, values = self.t_s[updates], self.values[updates]
            seconds = np.diff(times)
            return np.diff(values) / seconds, seconds
        inside = (self.t_s >= start_s) & (self.t_s <= end_s)
        times, values = self.t_s[inside], self.values[inside]
        seconds = np.diff(times)
        if self.sensor.kind == "average":
            first = min(times[0] - start_s + (self.sensor.window_s or 0.0), float(np.median(seconds)))
            return values, np.insert(seconds, 0, max(first, 0.0))
        return (values[1:] + values[:-1]) / 2, seconds


def _block_error(power: NDArray[np.float64], seconds: NDArray[np.float64]) -> float:
    """Standard error of the mean from the means of up to ten blocks of equal length."""
    ends = np.cumsum(seconds)
    blocks = min(_BLOCKS, max(2, len(power) // 2))
    number = np.minimum((ends - seconds / 2) / ends[-1] * blocks, blocks - 1).astype(int)
    weights = np.bincount(number, weights=seconds, minlength=blocks)
    sums = np.bincount(number, weights=power * seconds, minlength=blocks)
    means = sums[weights > 0] / weights[weights > 0]
    return float(np.std(means, ddof=1) / np.sqrt(len(means))) if len(means) > 1 else 0.0
