"""What can be but is odd about a foreign table is warned of: units, kernels that were taken for one, rows left out."""

from __future__ import annotations

import io
import logging
from typing import Any

import pytest

from edgeprune.errors import ConfigError, TableFormatError
from edgeprune.latency.rates import Achieved, achieved
from edgeprune.latency.table import LatencyTable

FIELDS = {"in_channels": "cin", "out_channels": "cout", "height": "h", "kernel_size": "kernel"}
HEAD = "cin,cout,h,kernel,kind,run,ms\n"


def imported(text: str, **changes: Any) -> LatencyTable:
    given = {"kernel": "conv2d", "columns": FIELDS, "latency_ms": "ms", "device": "v100", **changes}
    return LatencyTable.from_csv(io.StringIO(text), **given)


def warned(caplog: pytest.LogCaptureFixture, text: str, **changes: Any) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="edgeprune.latency"):
        imported(text, **changes)
    return [record.getMessage() for record in caplog.records]


def rows(kinds: dict[str, float], noise: float, widths: range = range(16, 96, 16)) -> str:
    """Two runs of convolutions of several kinds, each kind so many times as long."""
    lines = [
        f"{width},{width},28,3,{kind},{run},{width**2 * 2e-5 * factor * (1 + noise * run):.6f}"
        for width in widths
        for kind, factor in kinds.items()
        for run in (0, 1)
    ]
    return HEAD + "\n".join(lines) + "\n"


def test_kernels_that_were_taken_for_one_are_told_with_the_column_that_tells_them_apart(
    caplog: pytest.LogCaptureFixture,
) -> None:
    text = rows({"Regular": 1.0, "Depthwise": 2.5}, noise=0.02)
    (said,) = warned(caplog, text)
    assert said.startswith("the given file: 5 kernels have times that differ by up to 2.6 times (lines ")
    assert "may not be mapped (kind: Depthwise, Regular); map it (columns, --column)" in said
    assert warned(caplog, text, where={"kind": "Regular"}) == []
    # Noise of every kernel is no other kernel, one that differs far more than the others is.
    assert warned(caplog, rows({"Regular": 1.0}, noise=0.15)) == []
    (said,) = warned(caplog, rows({"Regular": 1.0}, noise=0.02) + "16,16,28,3,Winograd,0,0.007\n")
    assert "1 kernel has times that differ by up to 37 % (lines 2 and 12)" in said
    assert "kind: Regular, Winograd" in said


def test_one_disturbed_repeat_of_many_is_no_other_kernel(caplog: pytest.LogCaptureFixture) -> None:
    text = HEAD + "".join(f"16,16,28,3,Regular,{run},{0.05 if run else 0.5}\n" for run in range(20))
    assert warned(caplog, text) == []


def test_rows_left_out_are_told_by_their_lines(caplog: pytest.LogCaptureFixture) -> None:
    bad = "".join(f"16,16,28,3,a,{run},nan\n" for run in range(7))
    (said,) = warned(caplog, HEAD + '16,16,28,3,"two\nlines",0,0.05\n\n' + bad, skip_invalid=True)
    assert said == (
        "the given file: 7 of 8 rows cannot be used and are left out: lines 5, 6, 7, 8, 9 and 2 more; "
        "line 5 of the given file, column 'ms': a latency must be finite, found nan"
    )
    (said,) = warned(caplog, HEAD + "16,16,28,3,a,0,1,3\n16,16,28,3,a,0,0.05\n", skip_invalid=True)
    assert "1 of 2 rows cannot be used and is left out: line 2; line 2 of the given file: a row must have" in said


@pytest.mark.parametrize(
    ("ms", "changes", "said"),
    [
        (
            25.0,
            {},
            "achieves 0.289 GFLOP/s, which any but a microcontroller surpasses: are these milliseconds, or micro",
        ),
        (0.5, {"facts": {"multiprocessors": 80}}, "which a GPU of 80 multiprocessors surpasses"),
        (25e3, {"latency_ms": None, "latency_us": "ms"}, "are these microseconds, or nanoseconds?"),
        (2e-5, {}, "achieves 361267 GFLOP/s in fp32, which none but the largest accelerators reach"),
        (8e-4, {}, "half of the kernels take 0.8 microseconds or less"),
    ],
)
def test_times_in_another_unit_are_doubted(
    caplog: pytest.LogCaptureFixture, ms: float, changes: dict[str, Any], said: str
) -> None:
    text = HEAD + f"16,32,28,3,a,0,{ms}\n"
    if "latency_us" in changes:
        text = text.replace(",ms", ",time")
        changes = {**changes, "latency_us": "time"}
    (found,) = warned(caplog, text, **changes)
    assert said in found
    assert warned(caplog, HEAD + "16,32,28,3,a,0,0.05\n") == []


def test_more_than_any_device_reaches_is_refused_by_precision() -> None:
    # 3.6e6 multiply-accumulates in two nanoseconds: 3.6 PFLOP/s.
    text = HEAD + "16,32,28,3,a,0,2e-6\n"
    with pytest.raises(TableFormatError, match=r"times that a device can reach, found 2e-06 ms for 3\.61e\+06"):
        imported(text)
    assert len(imported(text, constants={"precision": "int8"}).kernels) == 1


def test_what_kernels_achieve_is_told_in_a_line() -> None:
    def told(table: LatencyTable) -> Achieved:
        return achieved({kernel: table.measurements[kernel.key].rounds_ms for kernel in table.kernels})

    convs = told(imported(HEAD + "16,32,28,3,a,0,0.05\n16,32,28,3,a,0,0.06\n"))
    macs = 28 * 28 * 32 * 16 * 9
    assert convs.gflops == pytest.approx((2 * macs / 0.06e-3 / 1e9, 2 * macs / 0.05e-3 / 1e9), rel=1e-3)
    assert str(convs) == "times of 0.05 to 0.06 ms, convolutions and products at 120 to 145 GFLOP/s"
    moved = told(imported(HEAD + "16,32,28,3,a,0,0.05\n", kernel="relu", columns={"channels": "cin", "height": "h"}))
    assert moved.gflops is None
    assert moved.gigabytes == pytest.approx((2 * 4 * 16 * 28 * 28 / 0.05e-3 / 1e9,) * 2, rel=1e-3)
    assert str(moved) == "times of 0.05 ms, kernels at 2.01 GB/s"


def test_flags_of_a_processor_are_a_list() -> None:
    with pytest.raises(ConfigError, match="must be a list of flags, found 'asimd'"):
        imported(HEAD + "16,32,28,3,a,0,0.05\n", facts={"isa": "asimd"})
