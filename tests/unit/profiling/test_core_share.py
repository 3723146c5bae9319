"""How much of a core the measuring process got, from which it follows how much fits into the time."""

from types import SimpleNamespace

import pytest

from edgeprune.profiling.core_share import core_share


@pytest.mark.parametrize(
    ("times_ms", "shares", "threads", "expected"),
    [
        ([5.0, 5.0], [1.0, 0.99], 1, 1.0),
        ([5.0] * 40, [0.5, *[1.0] * 39], 1, 1.0),
        # A quota: full speed, then nothing for the rest of the period.
        ([5.0, 5.0, 90.0], [1.0, 1.0, 0.2], 1, 0.28),
        ([50.0], [0.05], 1, 0.2),
        ([50.0], [0.3], 2, 1.0),
        ([], [], 1, 1.0),
    ],
)
def test_share_of_a_core(times_ms, shares, threads, expected):
    found = SimpleNamespace(times_ms=tuple(times_ms), cpu_share=tuple(shares))
    run = SimpleNamespace(measurements={"dense": found}, lost_s=0.0, spent_s=1.0)
    assert core_share(run, threads) == pytest.approx(expected)


@pytest.mark.parametrize(("lost_s", "expected"), [(0.0, 1.0), (6.0, 0.4), (10.0, 0.2)])
def test_what_was_lost_to_a_neighbor_will_be_lost_again(lost_s, expected):
    found = SimpleNamespace(times_ms=(5.0, 5.0), cpu_share=(1.0, 1.0))
    run = SimpleNamespace(measurements={"dense": found}, lost_s=lost_s, spent_s=10.0)
    assert core_share(run, 1) == pytest.approx(expected)
