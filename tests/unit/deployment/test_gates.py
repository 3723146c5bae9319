import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeprune.budget import Budget
from edgeprune.deployment.gates import Latency, check_latency
from edgeprune.errors import LatencyGateError, UnstableMeasurementError


def latency(low, value, high, dense_ms=10.0):
    return Latency(
        measured_ms=value,
        dense_ms=dense_ms,
        ratio=value / dense_ms,
        ratio_low=low / dense_ms,
        ratio_high=high / dense_ms,
        latency_ms=value,
        low_ms=low,
        high_ms=high,
        conditions={},
    )


def check(found, budget, tolerance=0.05):
    """Result of the gate when measurements give `found` one after the other, and the rounds that were asked for."""
    asked = []

    def measure(rounds):
        asked.append(rounds)
        return found[len(asked) - 1]

    return check_latency(measure, budget, tolerance=tolerance, rounds=20, name="net", board="orin"), asked


def test_interval_below_the_limit_passes_at_once():
    fits = latency(4.9, 5.0, 5.2)
    assert check([fits], Budget(latency_ms=5.0)) == (fits, [20])


def test_without_budget_any_latency_is_reported():
    slow = latency(90, 100, 110)
    assert check([slow], None) == (slow, [20])


def test_interval_above_the_limit_fails_at_once_with_both_numbers():
    with pytest.raises(LatencyGateError) as caught:
        check([latency(5.3, 5.5, 5.7)], Budget(latency_ms=5.0))
    assert caught.value.message == (
        "latency of 'net' on board orin must be at most 5 ms (+5%), found 5.5 ms (95 % interval 5.3 to 5.7)."
    )


def test_interval_that_straddles_the_limit_is_measured_longer():
    fits = latency(4.9, 5.0, 5.1)
    assert check([latency(4.0, 5.0, 6.0), fits], Budget(latency_ms=5.0)) == (fits, [20, 60])


def test_no_verdict_when_the_longer_measurement_straddles_too():
    noisy = latency(4.0, 5.0, 6.0)
    with pytest.raises(UnstableMeasurementError, match=r"must be told apart from 5 ms \(\+5%\)") as caught:
        check([noisy, noisy], Budget(latency_ms=5.0))
    assert caught.value.exit_code == 4


def test_relative_budget_looks_at_the_ratio():
    assert check([latency(4.9, 5.0, 5.2, dense_ms=10.0)], Budget(latency_ratio=0.5))[1] == [20]
    with pytest.raises(LatencyGateError, match="must be at most 40 % of dense"):
        check([latency(4.9, 5.0, 5.2, dense_ms=10.0)], Budget(latency_ratio=0.4))


@given(st.floats(0.1, 100), st.floats(0, 0.3), st.floats(0, 0.3), st.floats(0.1, 100), st.floats(0, 0.5))
def test_what_passes_is_never_above_the_limit(value, below, above, budget_ms, tolerance):
    found = latency(value * (1 - below), value, value * (1 + above))
    limit = budget_ms * (1 + tolerance)
    try:
        passed, _ = check([found, found], Budget(latency_ms=budget_ms), tolerance)
    except LatencyGateError:
        assert found.low_ms > limit
    except UnstableMeasurementError:
        assert found.low_ms <= limit < found.high_ms
    else:
        assert passed.high_ms <= limit
        assert math.isfinite(passed.high_ms)
