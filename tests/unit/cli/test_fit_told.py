"""What `edgeprune fit` says of a report besides its figures."""

from __future__ import annotations

from typing import Any

from edgeprune.cli.fit import besides, named
from edgeprune.latency.fit_report import END_TO_END, FitReport

CONV = {"family": "conv", "precision": "fp32", "n": 40, "median_error_percent": 2.0}
NETWORKS: dict[str, Any] = {
    **CONV,
    "family": END_TO_END,
    "n": 12,
    "median_error_percent": 1.24,
    "sum_median_error_percent": 17.6,
}


def test_the_gain_of_the_calibration_is_said_beside_the_plain_sum() -> None:
    assert list(besides(FitReport((CONV,), NETWORKS, 0.9))) == [
        "end to end: the plain sum of its kernels misses a network by 17.6 % in the median, the calibrated one by 1.2 %"
    ]
    # With one network nothing is left to be fitted to, and without any there is nothing to say.
    assert list(besides(FitReport((CONV,), {**NETWORKS, "median_error_percent": None}, 0.9))) == []
    assert list(besides(FitReport((CONV,), None, 0.9))) == []


def test_a_calibration_that_is_worse_than_none_is_warned_of() -> None:
    _, warning = besides(FitReport((CONV,), {**NETWORKS, "sum_median_error_percent": 1.2}, 0.9))
    assert warning.startswith("warning: what whole networks taught is worse than nothing here")


def test_networks_that_the_calibration_does_without_are_named() -> None:
    (said,) = besides(FitReport((CONV,), None, 0.9, left_out=("dense", "network1")))
    assert said.startswith("left out of the calibration")
    assert said.endswith(": dense, network1")


def test_families_of_several_precisions_are_told_apart() -> None:
    assert [row["family"] for row in named([CONV, NETWORKS])] == ["conv", END_TO_END]
    rows = named([CONV, {**CONV, "precision": "int8"}, {**NETWORKS, "precision": "int8"}])
    assert [row["family"] for row in rows] == ["conv, fp32", "conv, int8", "end to end, int8"]
    assert [row["n"] for row in rows] == [40, 40, 12]
