"""The integrator on synthetic sensors, whose true energy is known: emulated, no board is involved."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgeprune.boards.power import PowerScope, PowerSensor
from edgeprune.errors import ShortWindowError
from edgeprune.profiling.energy_windows import EnergyMeasurement, Window, energies
from edgeprune.profiling.power_trace import PowerTrace

Floats = NDArray[np.float64]

STEP_S = 1e-3
IDLE_MW, ACTIVE_MW = 2000.0, 5000.0
SETTLE_S = 1.5
TOLERANCE = 0.02


class Truth:
    """Power of a board over two replays with idle before, between and after, on a grid of a millisecond.

    Idle drifts by 25 % along a curve, a replay warms up by 3 %, and power follows single inferences by +- 5 %.
    """

    def __init__(self, window_s: float) -> None:
        phases = [("settle", SETTLE_S), ("idle", window_s)]
        for name in ("a", "b"):
            phases += [("run", SETTLE_S), (name, window_s), ("settle", SETTLE_S), ("idle", window_s)]
        total_s = sum(length for _, length in phases) + 2.0
        self.t_s = np.arange(0.0, total_s, STEP_S)
        share = self.t_s / total_s
        self.idle_mw = IDLE_MW * (1 + 0.25 * share + 0.02 * share**2)
        active = np.zeros_like(self.t_s)
        self.windows: list[Window] = []
        now = 0.0
        for name, length in phases:
            inside = (self.t_s >= now) & (self.t_s < now + length)
            if name in ("run", "a", "b"):
                scale = 1.0 if name != "b" else 0.6
                ripple = 1 + 0.05 * np.sin(2 * np.pi * 37.3 * self.t_s[inside])
                active[inside] = scale * ACTIVE_MW * ripple * (1 + 0.03 * (self.t_s[inside] - now) / length)
            if name in ("idle", "a", "b"):
                runs = 0 if name == "idle" else 400
                phase = "idle" if name == "idle" else "replay"
                self.windows.append(Window(phase, now, now + length, None if name == "idle" else name, runs))
            now += length
        # The replay of b begins with a run of a's power: what a slow sensor still holds must not count.
        self.power_mw = self.idle_mw + active
        self.active_mw = active
        self.energy_mj = np.concatenate([[0.0], np.cumsum(self.power_mw) * STEP_S])[:-1]

    def per_run_mj(self, name: str) -> float:
        """True energy above idle of one run, millijoules."""
        window = next(window for window in self.windows if window.id == name)
        inside = (self.t_s >= window.start_s) & (self.t_s < window.end_s)
        return float(self.active_mw[inside].sum() * STEP_S / window.runs)

    def at(self, t_s: Floats) -> Floats:
        """Power at these times, milliwatts."""
        return np.interp(t_s, self.t_s, self.power_mw)

    def counter(self, t_s: Floats) -> Floats:
        """Energy until these times, millijoules."""
        return np.interp(t_s, self.t_s, self.energy_mj)


def times(truth: Truth, hz: float, *, jitter: float = 0.0, dropped: float = 0.0, seed: int = 0) -> Floats:
    """Reading times with jitter, as a share of the period, and a share of them dropped."""
    random = np.random.default_rng(seed)
    regular = np.arange(0.3 / hz, truth.t_s[-1], 1 / hz)
    regular = regular + jitter / hz * random.uniform(-0.5, 0.5, len(regular))
    kept: Floats = regular[random.random(len(regular)) >= dropped]
    return kept


def instant(truth: Truth, hz: float, **disturbance: float) -> PowerTrace:
    sensor = PowerSensor("s", "rail", "synthetic", "power", period_s=1 / hz, window_s=0.0)
    t_s = times(truth, hz, **disturbance)
    return PowerTrace(sensor, t_s, truth.at(t_s))


def averaging(truth: Truth, hz: float, window_s: float, **disturbance: float) -> PowerTrace:
    sensor = PowerSensor("s", "rail", "synthetic", "average", period_s=1 / hz, window_s=window_s)
    t_s = times(truth, hz, **disturbance)
    t_s = t_s[t_s > window_s]
    return PowerTrace(sensor, t_s, (truth.counter(t_s) - truth.counter(t_s - window_s)) / window_s)


def held(truth: Truth, hz: float, polled_hz: float, **disturbance: float) -> PowerTrace:
    """A sensor that repeats its last value until the next, and states no period."""
    sensor = PowerSensor("s", "rail", "synthetic", "power")
    renewed = times(truth, hz, **disturbance)
    polled = times(truth, polled_hz, jitter=0.3, seed=1)
    polled = polled[polled > renewed[0]]
    latest = renewed[np.searchsorted(renewed, polled, side="right") - 1]
    return PowerTrace(sensor, polled, np.round(truth.at(latest)))


def counting(truth: Truth, hz: float, tick_hz: float, wrap_mj: float | None, **disturbance: float) -> PowerTrace:
    """A counter of whole millijoules that is renewed `tick_hz` times a second and starts anew at `wrap_mj`."""
    sensor = PowerSensor("s", "rail", "synthetic", "energy", wrap_mj=wrap_mj)
    t_s = times(truth, hz, **disturbance)
    values = np.floor(truth.counter(np.floor(t_s * tick_hz) / tick_hz) + 7000.0)
    return PowerTrace(sensor, t_s, values if wrap_mj is None else values % wrap_mj)


def measured(truth: Truth, trace: PowerTrace) -> dict[str, EnergyMeasurement]:
    scope = PowerScope((trace.sensor,), "a synthetic sensor")
    return energies(truth.windows, {trace.sensor.name: trace}, scope)


SENSORS: dict[str, tuple[float, Callable[[Truth], PowerTrace]]] = {
    "1 Hz": (26.0, lambda truth: instant(truth, 1)),
    "10 Hz": (6.5, lambda truth: instant(truth, 10)),
    "100 Hz": (6.5, lambda truth: instant(truth, 100)),
    "1 Hz, jitter": (26.0, lambda truth: instant(truth, 1, jitter=0.6)),
    "10 Hz, jitter, 20 % dropped": (6.5, lambda truth: instant(truth, 10, jitter=0.9, dropped=0.2)),
    "100 Hz, jitter, half dropped": (6.5, lambda truth: instant(truth, 100, jitter=0.9, dropped=0.5)),
    "mean over 1 s at 1 Hz": (26.0, lambda truth: averaging(truth, 1, 1.0, jitter=0.2)),
    "mean over 1 s at 10 Hz": (7.5, lambda truth: averaging(truth, 10, 1.0, dropped=0.1)),
    "mean over 0.1 s at 10 Hz": (6.5, lambda truth: averaging(truth, 10, 0.1)),
    "mean over 1 s at 100 Hz": (7.5, lambda truth: averaging(truth, 100, 1.0, jitter=0.5)),
    "10 Hz, asked at 50 Hz, no period stated": (6.5, lambda truth: held(truth, 10, 50)),
    "1 Hz, asked at 10 Hz, no period stated": (26.0, lambda truth: held(truth, 1, 10)),
    "counter at 100 Hz": (6.5, lambda truth: counting(truth, 100, 1000, None)),
    "counter at 10 Hz, jitter": (6.5, lambda truth: counting(truth, 10, 1000, None, jitter=0.9)),
    "counter at 1 Hz": (26.0, lambda truth: counting(truth, 1, 1000, None)),
    "counter renewed at 10 Hz, asked at 50 Hz": (6.5, lambda truth: counting(truth, 50, 10, None, jitter=0.3)),
    "counter that wraps": (6.5, lambda truth: counting(truth, 20, 1000, 21000.0, jitter=0.3, dropped=0.1)),
    "counter that wraps at 1 Hz": (26.0, lambda truth: counting(truth, 1, 1000, 65000.0)),
}


@pytest.mark.parametrize("name", SENSORS)
def test_energy_above_idle_is_within_two_percent_of_the_truth(name: str) -> None:
    window_s, sensor = SENSORS[name]
    truth = Truth(window_s)
    found = measured(truth, sensor(truth))
    assert set(found) == {"a", "b"}
    for engine, measurement in found.items():
        error = measurement.energy_mj / truth.per_run_mj(engine) - 1
        assert abs(error) <= TOLERANCE, f"{engine}: {error:+.2%}"
        assert measurement.updates >= 20
        assert measurement.error_mj < 0.05 * measurement.energy_mj
        assert not [doubt for doubt in measurement.doubts if "uncertainty" in doubt]


def test_a_sensor_that_averages_is_not_fooled_by_what_was_before_its_window() -> None:
    truth = Truth(7.5)
    trace = averaging(truth, 10, 1.4)
    believed = measured(truth, trace)["b"].energy_mj
    # The same readings, were their averaging not known: idle windows begin while the average still holds the replay.
    late = [replace(window, start_s=window.start_s - SETTLE_S + 0.01) for window in truth.windows]
    unknown = PowerTrace(replace(trace.sensor, kind="power", window_s=None), trace.t_s, trace.values)
    scope = PowerScope((unknown.sensor,), "a synthetic sensor")
    naive = energies(late, {"s": unknown}, scope)["b"].energy_mj
    assert abs(believed / truth.per_run_mj("b") - 1) <= TOLERANCE < abs(naive / truth.per_run_mj("b") - 1)


def test_the_drift_of_idle_is_taken_out_and_told_in_the_uncertainty() -> None:
    truth = Truth(6.5)
    steady = Truth(6.5)
    steady.power_mw = steady.active_mw + IDLE_MW
    drifting, still = (measured(each, instant(each, 100))["a"] for each in (truth, steady))
    assert drifting.energy_mj == pytest.approx(still.energy_mj, rel=TOLERANCE)
    assert drifting.error_mj > still.error_mj
    # What idle would be without the windows after: the one before alone.
    before = instant(truth, 100).window(truth.windows[0].start_s, truth.windows[0].end_s)
    one_sided = (drifting.power_mw - before.mean_mw) * drifting.run_ms / 1e3
    wrong, right = (abs(energy_mj / truth.per_run_mj("a") - 1) for energy_mj in (one_sided, drifting.energy_mj))
    assert wrong > 5 * right


def test_several_rails_are_added_and_so_are_their_uncertainties() -> None:
    truth = Truth(6.5)
    trace = instant(truth, 100)
    parts = [
        PowerTrace(replace(trace.sensor, name=name, rail=name), trace.t_s, share * trace.values)
        for name, share in (("gpu", 0.3), ("cpu", 0.7))
    ]
    scope = PowerScope(tuple(part.sensor for part in parts), "both")
    both = energies(truth.windows, {part.sensor.name: part for part in parts}, scope)["a"]
    whole = measured(truth, trace)["a"]
    assert both.energy_mj == pytest.approx(whole.energy_mj)
    assert both.rails == ("gpu", "cpu")
    assert 0 < both.error_mj <= whole.error_mj


# Refusals -----------------------------------------------------------------------------------------------------------------


def steady(hz: float, seconds: float, **fields: object) -> PowerTrace:
    sensor = replace(PowerSensor("s", "rail", "synthetic", "power"), **fields)  # type: ignore[arg-type]
    t_s = np.arange(0, seconds, 1 / hz)
    values = 1000.0 * t_s if sensor.kind == "energy" else np.full(len(t_s), 1000.0)
    return PowerTrace(sensor, t_s, values)


@pytest.mark.parametrize(
    ("trace", "window", "words"),
    [
        (steady(100, 20, period_s=0.01), (1, 5.9), r"must last 5 s beside its averaging window, found 4\.90 s"),
        (steady(100, 20, kind="average", period_s=0.01, window_s=1.0), (1, 6.5), r"found 4\.50 s"),
        (
            steady(1, 20, period_s=1.0),
            (1, 13),
            r"must hold 20 renewals of s, found 13 in 12\.0 s; it is renewed every 1 s",
        ),
        (steady(100, 20, period_s=1.0), (1, 13), r"must hold 20 renewals of s, found 1[23] in 12\.0 s"),
        (steady(100, 20), (1, 13), r"must hold 20 renewals of s, found 0 .*its period is unknown"),
        (steady(1, 20, kind="energy"), (1, 13), r"must hold 20 renewals of s, found 13"),
        (steady(10, 20, period_s=0.1), (18, 26), r"must hold 20 renewals|no more than 25%"),
    ],
)
def test_a_window_that_is_too_short_is_refused_and_says_why(
    trace: PowerTrace, window: tuple[float, float], words: str
) -> None:
    with pytest.raises(ShortWindowError, match=words) as caught:
        trace.window(*window)
    assert caught.value.hint == "replay for longer"


def test_a_long_gap_is_refused() -> None:
    trace = steady(100, 20, period_s=0.01)
    gap = (trace.t_s < 8) | (trace.t_s > 12)
    with pytest.raises(
        ShortWindowError, match=r"no more than 25% of a window may pass without a reading of s, found 4\.0 s"
    ):
        PowerTrace(trace.sensor, trace.t_s[gap], trace.values[gap]).window(5, 15)


def test_a_counter_that_was_set_back_in_a_window_is_refused_and_elsewhere_is_none_the_worse() -> None:
    trace = steady(10, 40, kind="energy", wrap_mj=1e6)
    values = np.where(trace.t_s < 20, trace.values, trace.values - 20000.0)
    broken = PowerTrace(trace.sensor, trace.t_s, values)
    assert broken.resets == pytest.approx((20.0,))
    with pytest.raises(ShortWindowError, match=r"must not be set back within a window"):
        broken.window(15, 25)
    assert broken.window(22, 32).mean_mw == pytest.approx(1000.0)


def test_a_replay_needs_idle_on_both_sides() -> None:
    trace = steady(100, 40, period_s=0.01)
    windows = [Window("idle", 1, 7), Window("replay", 8, 14, "a", 10)]
    with pytest.raises(ShortWindowError, match=r"must have an idle window before and after it"):
        energies(windows, {"s": trace}, PowerScope((trace.sensor,), ""))


# Doubts -------------------------------------------------------------------------------------------------------------------


def test_what_makes_a_figure_doubtful_is_said() -> None:
    random = np.random.default_rng(0)
    t_s = np.arange(0, 40, 0.01)
    sensor = PowerSensor("s", "rail", "synthetic", "power", period_s=0.01)
    trace = PowerTrace(sensor, t_s, 1000.0 + random.normal(0, 50, len(t_s)))
    windows = [Window("idle", 1, 7), Window("replay", 8, 14, "a", 10, 1.0, 0.6), Window("idle", 15, 21)]
    doubts = energies(windows, {"s": trace}, PowerScope((sensor,), ""))["a"].doubts
    assert len(doubts) == 3
    assert "is not more than twice its uncertainty" in doubts[0]
    assert "nothing states over what time s averages" in doubts[1]
    assert "other programs kept up to 0.60 cores busy" in doubts[2]


# Laws ---------------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    power=st.floats(1.0, 1e5),
    gaps=st.lists(st.floats(0.05, 0.5), min_size=60, max_size=80),
    kind=st.sampled_from(["power", "average", "energy"]),
    wrap=st.floats(0.6, 20.0),
)
def test_a_constant_power_is_found_whatever_the_times(power: float, gaps: list[float], kind: str, wrap: float) -> None:
    t_s = np.cumsum(gaps)
    # A counter must be read before it has gone half way round.
    wrap_mj = power * wrap * 2
    values = power * t_s % wrap_mj if kind == "energy" else np.full(len(t_s), power)
    sensor = PowerSensor(
        "s", "rail", "x", kind, period_s=0.05, window_s=0.2, wrap_mj=wrap_mj if kind == "energy" else None
    )
    shuffled = np.random.default_rng(0).permutation(len(t_s))
    trace = PowerTrace(sensor, t_s[shuffled], values[shuffled])
    found = trace.window(float(t_s[2]), float(t_s[-1]), least_updates=5, least_s=0.5)
    assert found.mean_mw == pytest.approx(power, rel=1e-6)
    assert found.error_mw <= 1e-5 * power


@settings(max_examples=100, deadline=None)
@given(
    points=st.lists(
        st.tuples(st.floats(-1e3, 1e3), st.floats(allow_nan=True, allow_infinity=True, width=32)), max_size=60
    ),
    kind=st.sampled_from(["power", "average", "energy"]),
    wrap=st.none() | st.floats(1.0, 1e6),
)
@example(  # as good as no time between changes
    [(0.0, 0.5), (1.0, 1.0), (2.0, 0.0), (2.2e-313, 0.0), (-1.0, 0.0), (-2.2e-311, 1.0)], "power", None
)
def test_no_readings_break_it(points: list[tuple[float, float]], kind: str, wrap: float | None) -> None:
    sensor = PowerSensor("s", "rail", "x", kind, wrap_mj=wrap)
    trace = PowerTrace(sensor, np.array([t for t, _ in points]), np.array([value for _, value in points]))
    try:
        found = trace.window(-500.0, 500.0, least_updates=3, least_s=1.0)
    except ShortWindowError:
        return
    assert np.isfinite(found.mean_mw)
    assert found.error_mw >= 0


def test_a_record_is_read_back_as_it_was() -> None:
    truth = Truth(6.5)
    found = measured(truth, instant(truth, 100))["a"]
    assert EnergyMeasurement.from_record(found.record()) == found
