"""What a table lacks for a further model, and whether the board is what it was."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest

from edgeprune.errors import TableMismatchError, UnstableMeasurementError
from edgeprune.latency.fitting import fit
from edgeprune.latency.predictor import Estimate, Predictor
from edgeprune.latency.table import LatencyTable
from edgeprune.latency.table_rows import kernel_row
from edgeprune.profiling import extending
from edgeprune.profiling.space import Reach
from edgeprune.spec import Kernel, Measurement

IDENTITY = {
    "architecture": "x86_64",
    "cpu_model": "a CPU",
    "isa": ["avx2"],
    "power_mode": None,
    "runtime_sha256": 64 * "a",
    "runtime_version": "1.2",
}


def conv(inputs: int, outputs: int, size: int = 16, op: str = "Conv") -> Kernel:
    attributes = (("bias", True), ("groups", 1), ("kernel", (3, 3)), ("stride", (1, 1)))
    return Kernel(op, "conv", ((1, inputs, size, size),), (1, outputs, size, size), attributes)


def timed(ms: float, spread: float = 0.01) -> Measurement:
    return Measurement(ms, 1.1 * ms, 0.9 * ms, spread, (ms, ms * (1 + spread), ms * (1 - spread)), 9)


def ms_of(kernel: Kernel) -> float:
    """About proportional to its work, with a part that no regression finds."""
    work = kernel.inputs[0][1] * kernel.output[1] * 9 * kernel.output[2] ** 2
    return (2e-3 + 3e-8 * work) * (1 + 0.08 * math.sin(work))


def table(**header: Any) -> LatencyTable:
    kernels = [conv(first, second) for first in (16, 32, 48, 64) for second in range(8, 72, 8)]
    return LatencyTable.from_rows(
        {"identity": IDENTITY, "runtime": "onnxruntime", "threads": 1, "precision": "fp32", **header},
        [kernel_row(kernel, timed(ms_of(kernel), 0.01 + 0.001 * (place % 7))) for place, kernel in enumerate(kernels)],
    )


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return fit(table())


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"runtime_version": "1.3"}, "runtime_version is 1.2 in the table and 1.3 on the board"),
        ({"cpu_model": "another CPU"}, "cpu_model is a CPU in the table and another CPU on the board"),
        ({"power_mode": "15W"}, "power_mode is not told in the table and 15W on the board"),
        ({"runtime_sha256": 64 * "b"}, "runtime_sha256 is aaaaaaaaaaaa in the table and bbbbbbbbbbbb on the board"),
        (
            {"runtime_sha256": 64 * "b", "runtime_version": "1.3", "cpu_model": "another CPU"},
            "runtime_version is 1.2 in the table and 1.3 on the board",
        ),
    ],
)
def test_table_of_another_device_or_runtime_is_refused(change: dict[str, str], named: str) -> None:
    extending.require_same(table(), IDENTITY, "onnxruntime", 1, "fp32")
    with pytest.raises(TableMismatchError, match=named) as caught:
        extending.require_same(table(), {**IDENTITY, **change}, "onnxruntime", 1, "fp32")
    assert "without --table" in str(caught.value)
    with pytest.raises(TableMismatchError, match="threads is 1 in the table and 2 asked for"):
        extending.require_same(table(), IDENTITY, "onnxruntime", 2, "fp32")


def test_what_is_measured_or_predicted_closely_is_known(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    held, near = predictor.table.kernels[0], conv(40, 40)
    foreign = Kernel("Softmax", "softmax", ((1, 10),), (1, 10))
    unknown_op = conv(16, 16, op="FusedConv")
    reached = Reach((Counter([held]),), (Counter([held, near, unknown_op]),), ("avx2",))
    wanted = [foreign, held, near, unknown_op]
    monkeypatch.setattr(extending, "WIDE_HALF_WIDTH", 10.0)
    assert extending.lacking(wanted, reached, predictor) == [foreign, unknown_op]
    monkeypatch.setattr(extending, "WIDE_HALF_WIDTH", 0.0)
    assert extending.lacking(wanted, reached, predictor) == [foreign, near, unknown_op]
    # However wide its interval, a kernel that takes next to nothing of any network need not be measured.
    big = Counter({conv(64, 64): 5000, near: 1})
    assert near not in extending.lacking([near], Reach((big,), (big,), ("avx2",)), predictor)


def test_estimates_leave_out_what_nothing_is_like(predictor: Predictor) -> None:
    softmax = Kernel("Attention", "softmax_like", ((1, 10),), (1, 10))
    near = conv(40, 40)
    found = extending.estimates(predictor, [softmax, near, near])
    assert list(found) == [near]
    assert isinstance(found[near], Estimate)
    assert found[near].ms == pytest.approx(ms_of(near), rel=0.3)


def test_anchors_reach_from_quick_to_slow_and_repeat_well() -> None:
    base = table()
    doubted = {kernel.key for kernel in base.kernels[::3]}
    found = extending.anchors(table(flags={"drifted": sorted(doubted)}), 6)
    assert len(found) == len(set(found)) == 6
    assert not doubted & {kernel.key for kernel in found}
    times = [base.measurements[kernel.key].median_ms for kernel in found]
    assert times == sorted(times)
    every = [measurement.median_ms for measurement in base.measurements.values()]
    assert times[-1] > 0.6 * max(every)
    assert times[0] < 0.3 * max(every)
    spreads = [base.measurements[kernel.key].spread for kernel in found]
    assert max(spreads) < 0.014
    assert len(extending.anchors(base.filter(key=[base.kernels[0].key]), 6)) == 1


def remeasured(factors: list[float]) -> dict[str, Measurement]:
    base = table()
    kernels = extending.anchors(base, len(factors))
    return {
        kernel.key: timed(base.measurements[kernel.key].median_ms * factor)
        for kernel, factor in zip(kernels, factors, strict=True)
    }


def test_a_board_that_is_as_quick_as_it_was_scales_nothing() -> None:
    link = extending.link(table(), remeasured([1.01, 1.02, 1.0, 0.99, 1.02, 1.03]))
    assert link.scale == 1.0
    assert link.change == pytest.approx(1.015)
    assert "1.5% slower" in link.sentence()
    assert "nothing is scaled" in link.sentence()
    assert link.scaled(timed(2.0)) == timed(2.0)


def test_a_common_change_is_taken_out_and_said() -> None:
    link = extending.link(table(), remeasured([1.10, 1.09, 1.11, 1.10, 1.12, 1.08]))
    assert link.scale == pytest.approx(1 / 1.10, rel=0.01)
    assert "10.0% slower" in link.sentence()
    assert "multiplied by 0.909" in link.sentence()
    scaled = link.scaled(timed(2.2))
    assert scaled.median_ms == pytest.approx(2.0, rel=0.01)
    assert scaled.rounds_ms == pytest.approx([2.0, 2.02, 1.98], rel=0.01)
    assert (scaled.spread, scaled.samples) == (timed(2.2).spread, timed(2.2).samples)
    assert "quicker" in extending.link(table(), remeasured([0.9] * 6)).sentence()


def test_what_no_common_factor_explains_is_refused() -> None:
    with pytest.raises(UnstableMeasurementError, match=r"found -30% to \+45%"):
        extending.link(table(), remeasured([1.0, 1.45, 0.7, 1.2, 0.8, 1.3]))
    # One anchor in eight that was disturbed does not decide.
    assert extending.link(table(), remeasured([1.0, 1.0, 1.01, 3.0, 0.99, 1.0, 1.0, 1.01])).scale == 1.0
    with pytest.raises(TableMismatchError, match=r"within 25%, found \+40%"):
        extending.link(table(), remeasured([1.4] * 6))
    with pytest.raises(TableMismatchError, match=r"found -40%"):
        extending.link(table(), remeasured([0.6] * 6))
    with pytest.raises(TableMismatchError, match="runs none"):
        extending.link(table(), {})
