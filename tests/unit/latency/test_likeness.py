"""Networks of one model are told from those of another, whatever their widths, and each model keeps its own calibration."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeprune.latency.calibration import OWN_NETWORKS, Totals, fit_calibration, fit_calibrations, leave_one_out
from edgeprune.latency.fitting import fit
from edgeprune.latency.likeness import ALIKE, grouped, likeness, nearest, skeleton
from edgeprune.latency.table import LatencyTable
from edgeprune.latency.table_rows import kernel_row, network_row
from edgeprune.spec import Kernel, Measurement

HEADER = {"identity": {"architecture": "x86_64"}, "runtime": "onnxruntime", "threads": 1, "precision": "fp32"}


def conv(inputs: int, outputs: int, size: int, window: int = 3) -> Kernel:
    attributes = (("bias", True), ("groups", 1), ("kernel", (window, window)), ("stride", (1, 1)))
    return Kernel("Conv", "conv", ((1, inputs, size, size),), (1, outputs, size, size), attributes)


def reorder(channels: int) -> Kernel:
    return Kernel("nchwc.ReorderOutput", "layout", ((1, channels, 8, 8),), (1, channels, 8, 8))


def plain(widths: list[int]) -> list[Kernel]:
    """A stack of 3x3 convolutions at 16x16 and 8x8; odd widths need a copy between layouts."""
    pairs = zip([3, *widths], widths, strict=False)
    convs = [conv(before, after, 16 if place < 3 else 8) for place, (before, after) in enumerate(pairs)]
    return [*convs, *(reorder(width) for width in widths if width % 4)]


def bottleneck(widths: list[int]) -> list[Kernel]:
    """The same with every other window 1x1."""
    pairs = zip([3, *widths], widths, strict=False)
    return [conv(before, after, 16, 1 + 2 * (place % 2)) for place, (before, after) in enumerate(pairs)]


WIDTHS = st.lists(st.integers(1, 300), min_size=6, max_size=6)


@given(first=WIDTHS, second=WIDTHS)
def test_pruning_leaves_the_skeleton(first: list[int], second: list[int]) -> None:
    assert likeness(skeleton(plain(first)), skeleton(plain(second))) == 1.0
    assert likeness(skeleton(plain(first)), skeleton(bottleneck(second))) < ALIKE
    assert nearest(skeleton(plain(first)), [skeleton(bottleneck(second)), skeleton(plain(second))]) == 1
    assert nearest(skeleton(plain(first)), [skeleton(bottleneck(second))]) is None


@given(widths=WIDTHS)
def test_likeness_is_symmetric_and_counts_repeats(widths: list[int]) -> None:
    once, twice = skeleton(plain(widths)), skeleton([*plain(widths), *plain(widths)])
    assert likeness(once, twice) == likeness(twice, once) == 0.5
    assert skeleton(Counter(plain(widths))) == once


def test_networks_are_grouped_in_the_order_of_their_models() -> None:
    nets = [plain([8] * 6), bottleneck([8] * 6), plain([5] * 6), bottleneck([7] * 6)]
    assert grouped([skeleton(kernels) for kernels in nets]) == [[0, 2], [1, 3]]
    assert grouped([]) == []
    assert nearest(Counter(), [Counter()]) is None


def two_models() -> tuple[list[Totals], np.ndarray, list[list[int]]]:
    """Six networks of each of two models that pay 10 % more, and 15 % less, than the sum of their kernels."""
    source = np.random.default_rng(1)
    totals = [Totals(ms, 20, {"Conv": 1e6}) for ms in source.uniform(1.0, 6.0, 12).tolist()]
    measured = np.array([one.sum_ms for one in totals]) * np.where(np.arange(12) < 6, 1.10, 0.85)
    return totals, measured, [list(range(6)), list(range(6, 12))]


def test_each_model_has_its_own_calibration_and_none_has_what_it_lacks() -> None:
    totals, measured, models = two_models()
    common, own = fit_calibrations(totals, measured, 0.01, models)
    assert common == fit_calibration(totals, measured, 0.01)
    for rows, found in zip(models, own, strict=True):
        assert found is not None
        assert found.networks == 6
        predicted = [found.ms(totals[row]) for row in rows]
        assert predicted == pytest.approx(measured[rows], rel=0.01)
    assert max(abs(common.ms(one) / ms - 1) for one, ms in zip(totals, measured, strict=True)) > 0.05
    few = [list(range(OWN_NETWORKS - 1)), list(range(OWN_NETWORKS - 1, 12))]
    assert fit_calibrations(totals, measured, 0.01, few)[1][0] is None
    assert fit_calibrations(totals, measured, 0.01, [list(range(12))])[1] == [None], "one model: that of all"


def test_what_is_left_out_is_left_out_of_both_calibrations() -> None:
    totals, measured, models = two_models()
    disturbed = measured.copy()
    disturbed[0] *= 3
    before, after = (leave_one_out(totals, times, 0.01, models)[0] for times in (measured, disturbed))
    assert before == after
    assert before.networks == 5
    assert before.ms(totals[0]) == pytest.approx(measured[0], rel=0.01)


def test_predictor_calibrates_a_network_as_the_model_it_is_of() -> None:
    """A table with two models of which one pays much more per network: each is predicted by its own."""
    source = np.random.default_rng(0)

    def widths() -> list[int]:
        return [int(width) * 4 for width in source.integers(2, 16, 6)]

    def ms(kernel: Kernel) -> float:
        window = kernel.attribute("kernel")
        assert isinstance(window, tuple)
        return 1e-3 + 2e-8 * kernel.inputs[0][1] * kernel.output[1] * kernel.output[2] ** 2 * float(window[0]) ** 2

    def timed(value: float) -> Measurement:
        return Measurement(value, value, value, 0.0, (value, value, value), 9)

    factors = {plain: 1.25, bottleneck: 1.0}
    nets = [
        (f"{make.__name__}-{number}", make(widths()), factor) for number in range(5) for make, factor in factors.items()
    ]
    kernels = {kernel for _, members, _ in nets for kernel in members}
    rows = [kernel_row(kernel, timed(ms(kernel))) for kernel in kernels]
    rows += [network_row(name, members, timed(factor * sum(map(ms, members)))) for name, members, factor in nets]
    predictor = fit(LatencyTable.from_rows(HEADER, rows))
    found, common = {}, {}
    for make in factors:
        totals = predictor.totals(make([32] * 6))
        found[make] = predictor.network_ms(make([32] * 6)) / totals.sum_ms
        common[make] = predictor.calibration.ms(totals) / totals.sum_ms
    assert found[plain] == pytest.approx(1.25, rel=0.03)
    assert found[bottleneck] == pytest.approx(1.0, rel=0.03)
    assert common[bottleneck] > found[bottleneck]
    assert common[plain] < found[plain]
    foreign = [conv(8, 8, 4, 5), conv(8, 8, 4, 7)]
    assert predictor.calibration_of(foreign) == predictor.calibration
    residuals = [abs(held.predicted_ms / held.measured_ms - 1) for held in predictor.held_out()[1]]
    assert max(residuals) < 0.05
