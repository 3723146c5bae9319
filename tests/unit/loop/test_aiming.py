"""Where to aim after what was measured."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeprune.loop.aiming import NEAR, Seen, aim_ms, corrected_ms

LATENCIES = st.floats(0.1, 100.0)
ERRORS = st.floats(0.7, 1.4)


@st.composite
def seen(draw):
    predicted = draw(st.lists(LATENCIES, min_size=1, max_size=4))
    return [Seen(value, value * draw(ERRORS)) for value in predicted]


def test_nothing_seen_leaves_predictions_as_they_are():
    assert corrected_ms(3.0, []) == 3.0
    assert aim_ms(3.0, []) == pytest.approx(3.0)


@given(seen(), LATENCIES)
def test_a_plan_aimed_at_would_be_measured_to_take_the_target(known, target_ms):
    assert corrected_ms(aim_ms(target_ms, known), known) == pytest.approx(target_ms)


@given(seen(), LATENCIES)
def test_a_correction_is_a_mean_of_the_errors_that_were_seen(known, predicted_ms):
    errors = [one.high_ms / one.predicted_ms for one in known]
    corrected = corrected_ms(predicted_ms, known) / predicted_ms
    assert min(errors) * (1 - 1e-9) <= corrected <= max(errors) * (1 + 1e-9)


@given(LATENCIES, ERRORS, ERRORS)
def test_of_two_plans_far_apart_the_near_one_counts(predicted_ms, near, far):
    known = [
        Seen(predicted_ms * (1 + NEAR / 10), predicted_ms * (1 + NEAR / 10) * near),
        Seen(predicted_ms / 2, predicted_ms / 2 * far),
    ]
    assert corrected_ms(predicted_ms, known) == pytest.approx(predicted_ms * near)


def test_the_upper_bound_is_aimed_with_and_not_the_middle():
    sure, unsure = [Seen(1.0, 1.1)], [Seen(1.0, 1.2)]
    assert aim_ms(1.0, sure) == pytest.approx(1 / 1.1)
    assert aim_ms(1.0, unsure) == pytest.approx(1 / 1.2)


def test_by_hand():
    """Two neighbors NEAR apart, in the middle between them: the mean of both logs, whatever a third one far away says."""
    known = [Seen(1.0, 1.1), Seen(math.exp(NEAR), 1.3 * math.exp(NEAR)), Seen(10.0, 30.0)]
    middle = math.exp(NEAR / 2)
    assert corrected_ms(middle, known) == pytest.approx(middle * math.sqrt(1.1 * 1.3))
