"""End-to-end calibration finds what networks really pay; intervals cover what they promise."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from edgeprune.latency.calibration import (
    Calibration,
    Totals,
    fit_calibration,
    fit_calibrations,
    kept_time,
    leave_one_out,
)
from edgeprune.latency.intervals import (
    MOST_HALF_WIDTH,
    NO_NOISE,
    RUN_SPREAD,
    UNSTEADY_SHARE,
    NetworkNoise,
    among,
    conformal_half_width,
    cross_coverage,
    median_noise,
    network_half_width,
    network_noise,
    repeatability,
    round_noise,
)


def networks(count: int, seed: int = 0, longest_ms: float = 8.0) -> tuple[list[Totals], np.ndarray, np.ndarray]:
    """Totals of random networks, and as arrays the sums and the counts."""
    source = np.random.default_rng(seed)
    sums, counts = source.uniform(0.5, longest_ms, count), source.integers(10, 80, count).astype(float)
    weights = source.uniform(1e5, 1e7, (count, 2))
    totals = [
        Totals(ms, kernels, {"blocked": blocked, "plain": plain})
        for ms, kernels, (blocked, plain) in zip(sums, counts.astype(int), weights, strict=True)
    ]
    return totals, sums, counts


def test_without_networks_the_sum_stands() -> None:
    assert fit_calibration([], np.empty(0), 0.01) == Calibration()
    assert Calibration().ms(Totals(3.25, 20, {"plain": 1e6})) == 3.25


def test_the_cost_of_calls_is_found_again() -> None:
    totals, sums, counts = networks(20)
    measured = 1.05 * sums - 0.0025 * counts + 0.03
    found = fit_calibration(totals, measured, smallest_kernel_ms=0.003)
    predicted = [found.ms(one) for one in totals]
    assert predicted == pytest.approx(measured, rel=0.01)
    assert found.per_kernel_ms == pytest.approx(-0.0025, abs=5e-4)


def test_one_network_moves_the_calibration_only_so_far() -> None:
    one = Totals(2.0, 20, {"plain": 1e6})
    found = fit_calibration([one], np.array([2.4]), 0.01)
    assert 1.0 < found.scale < 1.2
    assert 2.2 < found.ms(one) <= 2.4


def test_weights_that_come_from_farther_away_among_others_are_found_again() -> None:
    totals, sums, _ = networks(12)
    blocked = np.array([one.weight_bytes["blocked"] for one in totals])
    measured = sums + 6e-8 * blocked
    found = fit_calibration(totals, measured, smallest_kernel_ms=0.003)
    assert [found.ms(one) for one in totals] == pytest.approx(measured, rel=0.01)
    assert found.per_byte_ms["blocked"] == pytest.approx(6e-8, rel=0.1)
    assert found.per_byte_ms["plain"] < 3e-9, "another operation fetches its weights for less"
    parts = [found.part_ms(Totals(one.sum_ms / 2, one.kernels // 2, one.weight_bytes)) for one in totals]
    rest = [found.part_ms(Totals(one.sum_ms / 2, one.kernels - one.kernels // 2)) for one in totals]
    assert np.add(parts, rest) + found.fixed_ms == pytest.approx([found.ms(one) for one in totals])
    assert found.ms(Totals(2.0, 20, {"unseen": 1e6})) == found.ms(Totals(2.0, 20))
    without = fit_calibration(totals, 1.1 * sums, smallest_kernel_ms=0.003)
    assert all(0 <= value < 1e-9 for value in without.per_byte_ms.values())


def test_quick_networks_find_their_weights_still_in_the_cache() -> None:
    totals, sums, _ = networks(12, longest_ms=4.0)
    blocked = np.array([one.weight_bytes["blocked"] for one in totals])
    measured = 1.05 * sums + 6e-8 * blocked * (1 - np.exp(-((sums / 2.0) ** 3)))
    kept_ms = kept_time(totals, measured, 0.003)
    assert kept_ms == pytest.approx(2.0, rel=0.25)
    found = fit_calibration(totals, measured, 0.003, kept_ms=kept_ms)
    assert [found.ms(one) for one in totals] == pytest.approx(measured, rel=0.02)
    regardless = fit_calibration(totals, measured, 0.003)
    assert max(abs(regardless.ms(one) / ms - 1) for one, ms in zip(totals, measured, strict=True)) > 0.06

    for one in totals:
        assert found.at(found.ms(one)).ms(one) == pytest.approx(found.ms(one), rel=1e-9), (
            "it pays for as long as it takes"
        )
    long = Totals(9.0, 20, {"blocked": 1e6})
    quick = Totals(0.2, 20, {"blocked": 1e6})
    weights_ms = found.per_byte_ms["blocked"] * 1e6
    assert found.ms(long) == pytest.approx(found.ms(Totals(9.0, 20)) + weights_ms)
    assert found.ms(quick) == pytest.approx(found.ms(Totals(0.2, 20)), abs=0.01 * weights_ms)
    assert found.at(9.0).ms(quick) == pytest.approx(found.ms(Totals(0.2, 20)) + weights_ms), "prices of a long network"
    assert found.at(9.0).at(0.2) == found.at(9.0)


def test_how_long_weights_are_kept_shows_in_small_errors_of_networks_that_repeat_well() -> None:
    """A price that moves networks by about 3 %: other terms pass for most of it, and leave a percent or two."""
    totals, sums, _ = networks(9, longest_ms=4.0)
    read = np.array([one.weight_bytes["blocked"] for one in totals])
    exact = sums + 2.5e-8 * read * (1 - np.exp(-((sums / 2.0) ** 3)))
    dice = np.random.default_rng(0)
    found = [kept_time(totals, exact * np.exp(dice.normal(0, 0.003, 9)), 0.003) for _ in range(10)]
    assert found == pytest.approx([2.0] * 10, rel=0.25)


def test_what_little_quick_networks_pay_does_not_become_a_price_for_long_ones() -> None:
    totals, sums, _ = networks(12, longest_ms=0.8)
    measured = sums + 1e-8 * np.array(
        [one.weight_bytes["blocked"] for one in totals]
    )  # what they pay whatever they take
    found = fit_calibration(totals, measured, 0.003, kept_ms=2.0)
    read = {op: 10 * float(np.mean([one.weight_bytes[op] for one in totals])) for op in totals[0].weight_bytes}
    long = Totals(10 * float(sums.mean()), 20, read)
    assert found.ms(long) == pytest.approx(long.sum_ms, rel=0.25)


def test_nobody_asks_how_long_weights_are_kept_where_that_explains_nothing() -> None:
    totals, sums, _ = networks(12)
    noise = np.exp(np.random.default_rng(3).normal(0, 0.02, 12))
    blocked = np.array([one.weight_bytes["blocked"] for one in totals])
    assert kept_time(totals, (sums + 6e-8 * blocked) * noise, 0.003) == 0.0
    assert kept_time(totals[:5], sums[:5], 0.003) == 0.0, "five networks do not tell"
    assert fit_calibrations(totals, sums * noise, 0.003)[0].kept_ms == 0.0


def test_weights_of_operations_that_a_model_was_not_measured_with_cost_what_they_do_in_others() -> None:
    totals, sums, _ = networks(18)
    totals[12:] = [replace(one, weight_bytes={"blocked": one.weight_bytes["blocked"]}) for one in totals[12:]]
    blocked, plain = (np.array([one.weight_bytes.get(op, 0.0) for one in totals]) for op in ("blocked", "plain"))
    measured = sums + 6e-8 * blocked + 3e-8 * plain
    models = [range(12), range(12, 18)]
    common, (first, second) = fit_calibrations(totals, measured, 0.003, models)
    assert first is not None
    assert second is not None
    assert second.per_byte_ms["plain"] == common.per_byte_ms["plain"] == pytest.approx(3e-8, rel=0.1)
    assert second.per_byte_ms["blocked"] == pytest.approx(6e-8, rel=0.1)
    assert first.per_byte_ms["plain"] != common.per_byte_ms["plain"], "it has its own"
    for index, fitted in enumerate(leave_one_out(totals, measured, 0.003, models)):
        assert fitted.per_byte_ms["plain"] == pytest.approx(3e-8, rel=0.2), index


def test_one_disturbed_network_does_not_spoil_the_others() -> None:
    totals, sums, _ = networks(12)
    measured = 1.1 * sums
    measured[5] *= 2.5
    found = fit_calibration(totals, measured, 0.01)
    others = np.arange(12) != 5
    predicted = np.array([found.ms(one) for one in totals])
    assert predicted[others] == pytest.approx(measured[others], rel=0.03)


def test_no_kernel_comes_to_cost_less_than_nothing() -> None:
    totals, sums, counts = networks(12)
    found = fit_calibration(totals, np.maximum(sums - 0.05 * counts, 0.1 * sums), smallest_kernel_ms=0.004)
    assert found.per_kernel_ms >= -0.004
    assert found.fixed_ms >= 0
    assert found.ms(Totals(0.004, 1)) > 0


def test_leave_one_out_does_not_see_its_network() -> None:
    totals, sums, _ = networks(5)
    measured = 1.1 * sums
    before = leave_one_out(totals, measured, 0.01)
    measured[2] *= 1.3
    after = leave_one_out(totals, measured, 0.01)
    assert after[2] == before[2]
    assert after[1] != before[1]


def test_for_how_long_weights_are_kept_is_not_asked_of_the_network_that_is_left_out() -> None:
    totals, sums, _ = networks(8, longest_ms=4.0)
    blocked = np.array([one.weight_bytes["blocked"] for one in totals])
    measured = 1.05 * sums + 6e-8 * blocked * (1 - np.exp(-((sums / 2.0) ** 3)))
    before, kept_ms = leave_one_out(totals, measured, 0.003), kept_time(totals, measured, 0.003)
    quickest = int(np.argmin(sums))
    measured[quickest] *= 1.3
    assert kept_time(totals, measured, 0.003) != kept_ms
    after = leave_one_out(totals, measured, 0.003)
    assert after[quickest] == before[quickest]
    assert before[quickest].kept_ms > 0


@pytest.mark.parametrize("count", [12, 40, 200])
def test_conformal_intervals_cover_new_residuals(count: int) -> None:
    source = np.random.default_rng(count)
    inside = [abs(source.standard_t(3)) <= conformal_half_width(source.standard_t(3, count), 0.9) for _ in range(1500)]
    # The guarantee is 90 % on average; 1 500 trials leave 2.3 % at three standard deviations.
    assert 0.877 <= np.mean(inside) <= 0.9 + 1 / (count + 1) + 0.023


def test_few_residuals_give_a_wide_interval_and_none_a_finite_one() -> None:
    few = np.array([0.01, -0.02, 0.015])
    assert conformal_half_width(few, 0.9) >= math.log(1.25)
    assert math.isfinite(conformal_half_width(np.empty(0), 0.9))


def test_cross_coverage_is_measured_on_other_folds() -> None:
    residuals = np.concatenate([np.full(50, 0.01), np.full(50, 0.5)])
    folds = np.repeat([0, 1], 50)
    assert cross_coverage(residuals, folds, 0.9) == 0.5


def another_run(source: np.random.Generator, spread: float) -> float:
    """What a network misses in another run than the one that the calibration was fitted to."""
    return source.normal(0, spread) + source.normal(0, RUN_SPREAD)


def half_width(residuals: list[float]) -> float:
    """Of networks whose kernels were all measured."""
    return network_half_width(residuals, [0.0] * len(residuals), 0.0, 0.9)


def test_network_intervals_cover_and_narrow_with_the_number_of_networks() -> None:
    source = np.random.default_rng(3)
    for count in (3, 6, 12, 30):
        inside = [
            abs(another_run(source, 0.03)) <= half_width(source.normal(0, 0.03, count).tolist()) for _ in range(1500)
        ]
        assert 0.86 <= np.mean(inside) <= 0.95
    widths = [half_width([0.02, -0.02] * half) for half in (0, 1, 3, 10)]
    assert widths == sorted(widths, reverse=True)


@pytest.mark.parametrize("own", [0.01, 0.03])
@pytest.mark.parametrize("share", [0.005, 0.02, 0.05])
def test_errors_of_predicted_kernels_are_counted_once(own: float, share: float) -> None:
    """Networks that were measured hold predicted kernels too, and miss by them; another one may hold more or fewer."""
    source = np.random.default_rng(5)
    inside = []
    for _ in range(1500):
        shares = source.uniform(0.01, 0.04, 15)
        residuals = source.normal(0, np.hypot(own, shares))
        width = network_half_width(residuals.tolist(), shares.tolist(), share, 0.9)
        inside.append(abs(another_run(source, math.hypot(own, share))) <= width)
    assert 0.86 <= np.mean(inside) <= 0.97


def test_a_network_of_predicted_kernels_does_not_hide_what_another_one_misses() -> None:
    """Few networks, one measured and 40 % off, one predicted with wide intervals: nothing explodes, nothing is lost."""
    width = network_half_width([0.4, 0.01], [0.0, 0.6], 0.3, 0.9)
    assert 0.4 < width < 1.2
    assert network_half_width([0.4, 0.01], [0.0, 1e4], 1e9, 0.9) == MOST_HALF_WIDTH


def test_one_disturbed_network_does_not_widen_the_intervals_of_all() -> None:
    quiet = [0.01, -0.012, 0.008, -0.011, 0.009, 0.01, -0.01]
    assert half_width([*quiet, 0.8]) < 0.06


def test_networks_that_missed_less_than_they_are_noisy_were_lucky() -> None:
    source = np.random.default_rng(7)
    rounds = [np.exp(source.normal(0, 0.08, 16)).tolist() for _ in range(200)]
    noise = network_noise(rounds)
    assert noise.median == pytest.approx(np.std([np.log(np.median(one)) for one in rounds]), rel=0.2)
    lucky = [0.001, -0.002, 0.001, 0.002] * 3
    width = network_half_width(lucky, [0.0] * 12, 0.0, 0.9, noise)
    inside = [
        abs(another_run(source, noise.median) + source.normal(0, UNSTEADY_SHARE * noise.single)) <= width
        for _ in range(1500)
    ]
    assert 0.87 <= np.mean(inside) <= 0.97
    assert width > 1.5 * half_width(lucky)
    unlucky = [0.04, -0.05, 0.06, -0.05] * 3
    steady = NetworkNoise(noise.median, 0.0)
    assert network_half_width(unlucky, [0.0] * 12, 0.0, 0.9, steady) == pytest.approx(half_width(unlucky))
    assert network_half_width(unlucky, [0.0] * 12, 0.0, 0.9, noise) > half_width(unlucky), "another run differs by more"
    assert network_noise([[1.0], [2.0]]) == NO_NOISE


def test_noise_of_rounds_is_estimated_without_bias() -> None:
    source = np.random.default_rng(0)
    rounds = np.exp(source.normal(0, 0.05, (400, 5)))
    assert round_noise(rounds.tolist()) == pytest.approx(0.05, rel=0.15)
    medians = np.log(np.median(rounds, axis=1))
    assert median_noise(rounds[0].tolist(), 0.05) >= 0.9 * medians.std()
    assert round_noise([[1.0], [2.0]]) > 0


@pytest.mark.parametrize("rounds", [2, 3, 5])
def test_noise_ceiling_is_the_error_of_a_perfect_prediction(rounds: int) -> None:
    source = np.random.default_rng(rounds)
    timed = np.exp(source.normal(0, 0.03, (3000, rounds)))
    perfect = np.abs(1 / np.median(timed, axis=1) - 1)
    assert np.median(repeatability(timed.tolist())) == pytest.approx(np.median(perfect), rel=0.15)
    assert len(repeatability([[1.0], [2.0]])) == 0


def test_errors_of_networks_at_the_edges_are_made_those_of_networks_among_them() -> None:
    """A plain regression on networks at the edges of what is asked for: how far errors tell those of what lies between."""
    dice = np.random.default_rng(0)
    edges = np.column_stack(
        [np.ones(12), np.tile([-1.0, 1.0, 0.9], 4), np.repeat([-1.0, 1.0, 0.8], 4), np.tile([-1, 1], 6)]
    )
    asked = np.column_stack([np.ones(50), dice.uniform(-0.7, 0.7, (50, 3))])
    told, left_out, real = [], [], []
    for _ in range(400):
        noise = dice.normal(0, 0.01, 12)
        found = np.linalg.lstsq(edges, noise, rcond=None)[0]
        fitted = edges @ found - noise
        without = [
            float(
                edges[row] @ np.linalg.lstsq(np.delete(edges, row, 0), np.delete(noise, row), rcond=None)[0]
                - noise[row]
            )
            for row in range(12)
        ]
        told.append(np.mean(np.square(among(fitted, without))))
        left_out.append(np.mean(np.square(without)))
        real.append(np.mean(np.square(asked @ found - dice.normal(0, 0.01, 50))))
    assert 0.95 < np.mean(told) / np.mean(real) < 1.25
    assert np.mean(left_out) / np.mean(real) > 1.3
    assert among([], []) == ()
    assert among([0.0, 0.0], [0.0, 0.0]) == (0.0, 0.0)
