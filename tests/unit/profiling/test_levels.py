"""Which level a machine comes back to: made up times, and shares of a quiet and a disturbed state as recorded."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeprune.profiling.levels import SLOWED, WITHIN, slowest_pace, usual


def alternating(slow: float, share: float, seed: int, count: int = 4000, noise: float = 0.01) -> list[float]:
    """Times of 1 ms, in runs of 3 to 15 of them `slow` times as long, which makes about a `share` of all."""
    dice = np.random.default_rng(seed)
    times: list[float] = []
    while len(times) < count:
        length = int(dice.integers(3, 16))
        factor = slow if dice.random() < share else 1.0
        times += list(factor * np.exp(noise * dice.standard_normal(length)))
    return times[:count]


@given(slow=st.floats(1.1, 1.9), share=st.floats(0.0, 0.55), seed=st.integers(0, 999))
def test_neighbors_that_come_and_go_do_not_move_the_level(slow: float, share: float, seed: int) -> None:
    assert usual(alternating(slow, share, seed)) == pytest.approx(1.0, abs=0.015)


def test_the_median_would_be_moved() -> None:
    times = alternating(1.5, 0.55, 1)
    assert np.median(times) > 1.2
    assert usual(times) == pytest.approx(1.0, abs=0.015)


@given(st.floats(0.01, 1000.0), st.integers(1, 60), st.integers(0, 99))
def test_quiet_times_keep_their_median(ms: float, count: int, seed: int) -> None:
    times = ms * np.exp(0.004 * np.random.default_rng(seed).standard_normal(count))
    assert usual(list(times)) == pytest.approx(ms, rel=0.02)


@pytest.mark.parametrize("count", [60, 200, 801])
def test_a_board_that_warms_up_is_taken_as_it_is_in_the_middle_of_the_run(count: int) -> None:
    times = list(np.linspace(1.0, 1.4, count))
    assert usual(times) == pytest.approx(1.2, abs=0.05)


def test_a_state_that_never_came_back_is_not_usual() -> None:
    """A boost that lasts a tenth of the run, as a cold board has it."""
    assert usual([1.0] * 20 + [1.3] * 180) == pytest.approx(1.3)


@given(st.lists(st.floats(0.1, 10.0), min_size=1, max_size=100))
def test_level_lies_among_the_times(times: list[float]) -> None:
    assert min(times) <= usual(times) <= max(times) * (1 + WITHIN)


@given(share=st.floats(0.0, 0.7), seed=st.integers(0, 99))
def test_arithmetic_beside_a_neighbor_is_slowed_and_none_else(share: float, seed: int) -> None:
    paces = [37.0 * time for time in alternating(1.6, share, seed)]
    assert slowest_pace(paces) == pytest.approx(SLOWED * 37.0, rel=0.03)


def test_where_nobody_looked_nothing_is_slowed() -> None:
    assert slowest_pace([]) == np.inf
