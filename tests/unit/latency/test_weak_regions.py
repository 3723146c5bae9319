"""Kinds of kernels that are missed by more than the rest are named, and no others are."""

from __future__ import annotations

import numpy as np
import pytest

from edgeprune.latency.predictor import Predictor
from edgeprune.latency.weak_regions import weak_regions
from edgeprune.spec import Kernel, Measurement


def conv(channels: int, kernel: int, groups: int = 1) -> Kernel:
    attributes = (("groups", groups), ("kernel", (kernel, kernel)), ("stride", (1, 1)))
    shape = (1, channels, 14, 14)
    return Kernel("Conv", "conv", (shape,), shape, attributes)


KERNELS = [
    conv(channels, size, groups)
    for channels in range(8, 88, 4)
    for size, groups in ((1, 1), (3, 1), (3, channels), (5, 1))
]
TIMED = {
    kernel.key: Measurement(
        median_ms=0.1 + place, p90_ms=0.2 + place, min_ms=0.1, spread=0.01, rounds_ms=(0.1 + place,), samples=5
    )
    for place, kernel in enumerate(KERNELS)
}


def usual(seed: int) -> np.ndarray:
    return np.abs(np.random.default_rng(seed).normal(0, 0.03, len(KERNELS)))


@pytest.mark.parametrize("seed", range(5))
def test_a_kind_of_kernel_that_is_missed_is_named(seed: int) -> None:
    bad = np.array([kernel.attribute("groups") != 1 for kernel in KERNELS])
    first, *_ = weak_regions("conv", KERNELS, usual(seed) + 0.15 * bad, TIMED)
    assert (first["region"], first["n"]) == ("depthwise", bad.sum())
    assert first["median_error_percent"] > 15 > 5 > first["elsewhere_median_percent"]
    assert first["within_10_percent"] == 0
    assert first["noise_median_percent"] is None  # one round says nothing of repetition


def test_channel_counts_that_are_not_aligned_are_a_region() -> None:
    bad = np.array([bool(kernel.output[1] % 8) for kernel in KERNELS])
    regions = [row["region"] for row in weak_regions("conv", KERNELS, usual(0) + 0.1 * bad, TIMED)]
    assert regions == ["channels no multiple of 8"]


def test_errors_that_are_the_same_everywhere_have_no_weak_region() -> None:
    """At 1 % per family, fifty families in a hundred would be far too many."""
    assert sum(bool(weak_regions("conv", KERNELS, usual(seed), TIMED)) for seed in range(100)) <= 4


def test_few_kernels_say_nothing() -> None:
    assert weak_regions("conv", KERNELS[:12], usual(0)[:12] + 1, TIMED) == []


def test_a_report_names_them_on_real_measurements(predictor: Predictor) -> None:
    """Convolutions that left the blocked layout, of which this table holds fewer."""
    weak = predictor.report().weak
    assert {"FusedConv", "channels no multiple of 8"} <= {row["region"] for row in weak if row["family"] == "conv"}
    assert all(row["median_error_percent"] > row["elsewhere_median_percent"] for row in weak)
