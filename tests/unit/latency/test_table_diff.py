"""Two tables side by side, and one table described."""

from __future__ import annotations

import re

import numpy as np
import pytest

from edgeprune.latency.table import LatencyTable
from edgeprune.latency.table_rows import kernel_row
from edgeprune.spec import Kernel, Measurement

HEADER = {
    "identity": {"architecture": "aarch64", "cpu_model": "Cortex-A72", "runtime": "onnxruntime"},
    "runtime": "onnxruntime",
    "threads": 1,
    "precision": "fp32",
    "label": "measured",
    "protocol": {"minutes": 2.0, "overhead_ms": 0.002, "spent_s": 118.0},
}


def table(channels: range, factor: float = 1.0, **header: object) -> LatencyTable:
    rows = []
    for count in channels:
        kernel = Kernel("Relu", "elementwise", ((1, count, 8, 8),), (1, count, 8, 8))
        ms = 0.01 * count * factor
        rounds = (0.99 * ms, ms, 1.01 * ms)
        rows.append(kernel_row(kernel, Measurement(ms, 1.1 * ms, 0.98 * ms, 0.01, rounds, 9)))
    return LatencyTable.from_rows({**HEADER, **header}, rows)


def test_tables_of_one_device_are_compared_by_ratio() -> None:
    diff = table(range(1, 41)).diff(
        table(range(11, 61), 1.2, protocol={"minutes": 2.0, "overhead_ms": 0.003, "spent_s": 121.0})
    )
    assert diff.may_be_merged
    assert diff.protocol == ()
    assert (diff.only_first, diff.only_second, diff.common) == (10, 20, 30)
    (row,) = diff.ratios
    assert (row.family, row.count) == ("elementwise", 30)
    assert (row.low, row.median, row.high) == pytest.approx((1.2, 1.2, 1.2))
    assert 0.3 < row.noise_percent < 3
    assert diff.summary() == (
        "the tables may be compared and merged; 30 rows are in both, and the second table takes 1.2 times as long in the "
        "middle of 30 elementwise rows."
    )


def test_what_must_not_be_mixed_is_named() -> None:
    other = {**HEADER["identity"], "cpu_model": "Cortex-A76"}  # type: ignore[dict-item]
    diff = table(range(1, 9)).diff(table(range(20, 30), identity=other, threads=4))
    assert not diff.may_be_merged
    assert [difference.field for difference in diff.identity] == ["identity.cpu_model", "threads"]
    assert diff.identity[1][1:] == (1, 4)
    assert diff.summary().startswith("the tables describe different things and must not be mixed (identity.cpu_model, ")
    assert diff.summary().endswith("no kernel is in both.")


def test_another_protocol_is_told_and_does_not_forbid() -> None:
    other = table(range(1, 9), label="imported", timing="of another clock", protocol={"minutes": 9.0})
    diff = table(range(1, 9)).diff(other)
    assert diff.may_be_merged
    assert {difference.field for difference in diff.protocol} == {"label", "timing", "protocol.minutes"}
    assert "though measured differently" in diff.summary()


def test_a_table_and_itself_do_not_differ(measured: LatencyTable) -> None:
    diff = measured.diff(measured)
    assert (diff.identity, diff.protocol, diff.only_first, diff.only_second) == ((), (), 0, 0)
    assert diff.common == len(measured)
    assert {row.median for row in diff.ratios} == {1.0}


def test_the_card_says_what_was_measured_and_how_well_it_repeats(measured: LatencyTable) -> None:
    card = measured.card()
    assert card.startswith(
        "# Latency table: x86-64 server CPU with AVX-512, onnxruntime\n\n477 kernels and 30 networks, "
    )
    assert measured.hash in card
    conv = next(line for line in card.splitlines() if line.startswith("| conv |"))
    assert "| 420 | nchwc.Conv 330, FusedConv 90 |" in conv
    noise = float(re.search(r"([0-9.]+) % \|$", conv)[1])  # type: ignore[index]
    assert 0 < noise < 5
    times = [timed.median_ms for key, timed in measured.measurements.items() if '"family":"conv"' in key]
    assert f"| {min(times):.4g} | {np.median(times):.4g} | {max(times):.4g} |" in conv
    widths = {len(re.findall(r"(?<!\\)\|", line)) for line in card.splitlines() if line.startswith("| ")}
    assert widths == {3, 9}


def test_the_card_tells_doubts_and_stays_one_line_per_row() -> None:
    erased = [Kernel("Erf", "elementwise", ((1, size),), (1, size)).key for size in (4, 8, 12)]
    doubtful = table(
        range(1, 5),
        flags={"drifted": ["a", "b"], "unstable": []},
        unsupported={"GroupNorm": "no rule | for\nit", **dict.fromkeys(erased, "no layer of its own")},
        timing="of a device's own clock",
        clocks={"locked": True},
        drift={"largest": 0.04, "repeated_stretches": 2},
    )
    card = doubtful.card()
    assert "- 2 rows are flagged `drifted`." in card
    assert "unstable" not in card
    assert "- `GroupNorm` is not in it: no rule \\| for it" in card
    assert "- 3 kernels of `Erf` are not in it: no layer of its own\n" in card
    assert '| timing | of a device\'s own clock |\n| clocks | {"locked": true} |' in card
    assert "drifted by at most 4.0%; 2 stretches were repeated, 0 s were lost" in card
