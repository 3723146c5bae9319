"""Summaries of timings."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeprune.profiling.statistics import Samples, median_ratio, outlying, own_times, summarize, undisturbed

times = st.lists(st.floats(0.01, 100.0), min_size=1, max_size=9)


def calm(*times_ms: float) -> Samples:
    return Samples(times_ms, (1.0,) * len(times_ms))


def test_median_is_that_of_the_rounds_and_not_of_all_samples() -> None:
    found = summarize([calm(1.0, 1.1, 1.2), calm(1.4), calm(1.3, 1.3, 1.3, 9.0)])
    assert found.rounds_ms == (1.1, 1.4, 1.3)
    assert found.median_ms == 1.3
    assert found.min_ms == 1.0
    assert found.samples == 8
    assert found.spread == pytest.approx(0.1 / 1.3)


def test_overhead_is_taken_off_and_a_time_never_vanishes() -> None:
    found = summarize([calm(0.0124, 0.0126), calm(0.0024)], overhead_ms=0.0025)
    assert found.rounds_ms == pytest.approx((0.01, 0.05 * 0.0025))
    assert found.min_ms > 0


def test_interrupted_samples_count_with_their_cpu_time_and_only_where_there_is_no_other() -> None:
    assert undisturbed(Samples((4.06, 2.02, 4.25), (0.51, 1.0, 0.53))) == [2.02]
    assert own_times(Samples((4.06, 2.02, 4.25), (0.51, 1.0, 0.53))) == [2.02]
    slowed = Samples((2.3, 2.02, 2.4, 4.1), (1.0, 1.0, 1.0, 0.5), (True, False, True, False))
    assert undisturbed(slowed) == [2.02]
    assert undisturbed(Samples((2.3, 2.4), (1.0, 1.0), (True, True))) == [2.3, 2.4], "there are no others"
    assert own_times(Samples((4.0, 5.0), (0.5, 0.4))) == [2.0, 2.0]
    found = summarize([Samples((4.06, 2.02, 4.25), (0.51, 1.0, 0.53))])
    assert found.median_ms == found.min_ms == 2.02
    # The tail that a user sees is told of all samples.
    assert found.p90_ms > 4.0
    assert (found.times_ms, found.cpu_share) == ((4.06, 2.02, 4.25), (0.51, 1.0, 0.53))


def test_interrupted_samples_of_several_threads_are_told_by_the_most_that_the_engine_got() -> None:
    # Four threads, of which another program took most of one core: CPU time per wall time stays far above one.
    rounds = [Samples((2.0, 2.02), (3.8, 3.9)), Samples((3.1, 2.04, 3.0), (2.9, 3.85, 2.8)), Samples((3.2,), (2.9,))]
    found = summarize(rounds, threads=4)
    # Without an undisturbed sample there is only wall-clock time: the CPU time of four threads says nothing of it.
    assert found.rounds_ms == pytest.approx((2.01, 2.04, 3.2))
    assert found.median_ms == pytest.approx(2.04)


def test_outliers_are_counted_round_by_round_and_taken_out_of_nothing() -> None:
    steady = [calm(1.00, 1.01, 0.99, 1.00, 1.02), calm(1.20, 1.21, 1.19, 1.20, 1.22)]
    assert outlying(steady) == 0.0, "rounds that differ are no outliers"
    spoilt = [calm(1.00, 1.01, 0.99, 1.00, 1.60), calm(1.20, 1.21, 1.19, 1.90, 1.22)]
    assert outlying(spoilt) == pytest.approx(0.2)
    assert summarize(spoilt).samples == 10
    assert outlying([calm(1.0), calm(2.0)]) == 0.0
    # What another program interrupted is told by its CPU time, and is no outlier of the engine.
    assert outlying([Samples((1.0, 1.01, 0.99, 4.0, 1.0), (1.0, 1.0, 1.0, 0.25, 1.0))]) == 0.0


@given(rounds=st.lists(times, min_size=1, max_size=5), overhead_ms=st.floats(0.0, 0.01))
def test_summary_is_ordered_and_within_what_was_measured(rounds: list[list[float]], overhead_ms: float) -> None:
    found = summarize([calm(*samples) for samples in rounds], overhead_ms)
    assert 0 < found.min_ms <= found.median_ms * (1 + 1e-12)
    assert found.median_ms <= max(map(max, rounds))
    assert len(found.rounds_ms) == len(rounds)
    assert found.samples == sum(map(len, rounds))


def test_ratio_is_the_median_over_rounds_with_an_interval_around_it() -> None:
    noise = np.random.default_rng(3).normal(1.0, 0.01, size=(2, 40))
    drift = np.linspace(1.0, 2.0, 40)
    found = median_ratio(list(0.5 * drift * noise[0]), list(drift * noise[1]))
    assert found.ratio == pytest.approx(0.5, rel=0.01)
    assert found.low <= found.ratio <= found.high
    assert found.high - found.low < 0.02
    assert len(found.rounds) == 40
    assert found == median_ratio(list(0.5 * drift * noise[0]), list(drift * noise[1]))


def test_interval_of_the_ratio_covers_the_truth_about_as_often_as_it_says() -> None:
    source = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        noise = source.normal(1.0, 0.02, size=(2, 20))
        found = median_ratio(list(0.8 * noise[0]), list(noise[1]), resamples=300)
        covered += found.low <= 0.8 <= found.high
    assert 0.88 <= covered / 200 <= 1.0


@pytest.mark.parametrize(("processes", "rounds"), [(4, 20), (12, 60)])
def test_interval_of_the_ratio_covers_the_truth_where_processes_differ(processes: int, rounds: int) -> None:
    source = np.random.default_rng(1)
    owners = np.repeat(np.arange(processes), rounds // processes)
    covered, pseudo, widths = 0, 0, []
    for _ in range(300):
        layout = source.normal(0.0, 0.0027, processes)[owners]
        ratios = 0.5 * (1 + layout + source.normal(0.0, 0.002, rounds))
        ones = [1.0] * rounds
        found = median_ratio(list(ratios), ones, processes=list(owners), process_spread=0.0027, resamples=300)
        covered += found.low <= 0.5 <= found.high
        widths.append((found.high - found.low) / 2 / 0.5)
        blind = median_ratio(list(ratios), ones, resamples=300)
        pseudo += blind.low <= 0.5 <= blind.high
    assert covered / 300 >= 0.92
    # Rounds taken as independent would promise the same and keep it far less often.
    assert pseudo / 300 < 0.85
    assert np.median(widths) < 2.5 * 1.96 * 0.0027 / math.sqrt(processes)


def test_interval_is_never_narrower_than_the_known_spread_of_processes() -> None:
    found = median_ratio([0.5] * 8, [1.0] * 8, processes=[0, 0, 1, 1, 2, 2, 3, 3], process_spread=0.0027)
    assert (found.low, found.high) == pytest.approx((0.5 * (1 - 1.96 * 0.00135), 0.5 * (1 + 1.96 * 0.00135)), rel=1e-5)
