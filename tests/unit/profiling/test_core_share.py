"""How much of a core the measuring process got, from which it follows how much fits into the time."""

from types import SimpleNamespace

import pytest

from edgeprune.profiling.run import _core_share


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
    assert _core_share(SimpleNamespace(measurements={"dense": found}), threads) == pytest.approx(expected)
