"""What the board says about two sets of outputs; the module is imported as the runner imports it."""

import importlib
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import edgeprune.boards

TOLERANCE = {"relative": 1e-4, "snr_db": 80.0}


@pytest.fixture(scope="module")
def parity():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(edgeprune.boards.__file__).parent / "onboard"))
        yield importlib.import_module("parity")


@pytest.fixture
def report(parity):
    def made(cases, tolerance=TOLERANCE):
        difference = parity.Difference("y")
        for kind, golden, found in cases:
            difference.add(np.asarray(golden), np.asarray(found), kind)
        return difference.report(tolerance)

    return made


def sample(rng, shape=(2, 10)):
    return rng.standard_normal(shape).astype(np.float32)


def test_equal_outputs_are_exact(report):
    values = sample(np.random.default_rng(0))
    found = report([("sample", values, values)])
    assert found["passed"]
    assert (found["max_abs"], found["required_relative"], found["snr_db"]) == (0.0, 0.0, None)
    assert found["top1_agreement"] == 1.0
    assert found["cosine"] == pytest.approx(1.0)


@settings(max_examples=50)
@given(st.integers(0, 1000), st.floats(1e-7, 1e-1))
def test_the_tolerance_that_is_reported_would_have_passed_and_nothing_less(parity, seed, noise):
    rng = np.random.default_rng(seed)
    golden = sample(rng)
    found = golden + noise * rng.standard_normal(golden.shape)
    difference = parity.Difference("y")
    difference.add(golden, found, "sample")
    needed = difference.report(TOLERANCE)["required_relative"]
    lenient = {"snr_db": -400.0}
    assert difference.report({**lenient, "relative": needed})["passed"]
    assert not difference.report({**lenient, "relative": needed * (1 - 1e-9)})["passed"]
    expected = 10 * math.log10(float((golden.astype(float) ** 2).sum() / ((golden - found) ** 2).sum()))
    assert difference.report(TOLERANCE)["snr_db"] == pytest.approx(expected)


@pytest.mark.parametrize(("value", "field"), [(np.nan, "nan"), (np.inf, "inf"), (-np.inf, "inf")])
def test_value_that_is_not_finite_fails_and_is_counted(report, value, field):
    golden = sample(np.random.default_rng(0))
    found = golden.copy()
    found[0, 3] = value
    result = report([("sample", golden, found)], {"relative": 1e9, "snr_db": -400.0})
    assert not result["passed"]
    assert result[field] == 1


def test_nan_must_be_where_the_golden_output_has_it(report):
    golden = np.array([[1.0, np.nan]], dtype=np.float32)
    assert report([("zeros", golden, golden)])["passed"]
    assert not report([("zeros", golden, np.array([[1.0, 2.0]], dtype=np.float32))])["passed"]


def test_huge_edge_case_does_not_hide_the_error_of_a_sample(report):
    golden = np.ones((1, 4), dtype=np.float32)
    huge = ("extremes", golden * 1e6, golden * 1e6)
    assert not report([("sample", golden, golden * 1.001), huge])["passed"]


def test_output_near_zero_is_held_against_the_typical_scale(report):
    golden = np.ones((1, 4), dtype=np.float32)
    tiny = ("zeros", golden * 1e-9, golden * 1e-9 + 1e-7)
    assert report([("sample", golden, golden), tiny])["passed"]


def test_top1_counts_samples_only_and_only_what_looks_like_logits(report):
    golden = np.array([[1.0, 2.0], [2.0, 1.0]], dtype=np.float32)
    swapped = golden[:, ::-1]
    assert report([("sample", golden, swapped), ("zeros", golden, golden)])["top1_agreement"] == 0.0
    assert report([("sample", golden.reshape(1, 2, 2), golden.reshape(1, 2, 2))])["top1_agreement"] is None
