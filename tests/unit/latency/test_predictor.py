"""What a predictor promises, on measurements of a real CPU."""

from __future__ import annotations

import json
import math
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeprune.errors import (
    ConfigError,
    TableFormatError,
    TableMismatchError,
    TableMissingError,
    UnsupportedKernelError,
)
from edgeprune.latency import fitting
from edgeprune.latency.fitting import fit
from edgeprune.latency.predictor import Predictor
from edgeprune.latency.table import LatencyTable
from edgeprune.latency.table_rows import kernel_row, network_row
from edgeprune.spec import Kernel, Measurement

DATA = Path(__file__).parents[2] / "data" / "onnxruntime_avx512_kernels.parquet"


def split(table: LatencyTable) -> tuple[LatencyTable, list[Kernel]]:
    """The table without the kernels of a fifth of all pairs of channel counts, and these kernels."""
    convs = [kernel for kernel in table.kernels if kernel.family == "conv"]
    pairs = sorted({(kernel.inputs[0][1], kernel.output[1]) for kernel in convs})
    chosen = set(pairs[::5])
    held_out = [kernel for kernel in convs if (kernel.inputs[0][1], kernel.output[1]) in chosen]
    hidden = {kernel.key for kernel in held_out}
    return table.filter(key=[row["key"] for row in table.rows if row["key"] not in hidden]), held_out


def fused(table: LatencyTable) -> list[str]:
    return [kernel.key for kernel in table.kernels if kernel.op == "FusedConv"]


@pytest.fixture(scope="module")
def held_out(measured: LatencyTable) -> tuple[Predictor, list[Kernel], np.ndarray]:
    rest, kernels = split(measured)
    times = np.array([measured.measurements[kernel.key].median_ms for kernel in kernels])
    return fit(rest), kernels, times


def test_kernels_of_unseen_channel_counts_are_predicted(
    held_out: tuple[Predictor, list[Kernel], np.ndarray],
) -> None:
    predictor, kernels, times = held_out
    assert len(kernels) >= 50
    errors = np.abs(predictor.kernel_ms(kernels) / times - 1)
    assert np.median(errors) < 0.05
    assert np.mean(errors < 0.10) > 0.80


def test_intervals_cover_unseen_kernels(held_out: tuple[Predictor, list[Kernel], np.ndarray]) -> None:
    predictor, kernels, times = held_out
    frame = predictor.predict(kernels)
    assert list(frame.columns) == ["ms", "low_ms", "high_ms", "source"]
    assert set(frame["source"]) == {"predicted"}
    inside = ((frame["low_ms"] <= times) & (times <= frame["high_ms"])).mean()
    assert (
        inside >= 0.80
    )  # 90 % nominal; with some 80 kernels that share channel counts, less than 80 % would be a fault
    assert np.median(frame["high_ms"] / frame["low_ms"] - 1) < 0.30


def test_networks_that_no_calibration_saw_are_predicted_better_than_by_the_sum(measured: LatencyTable) -> None:
    """Either half by the other."""
    networks = measured.networks
    errors, sums, inside = [], [], []
    for half in (0, 1):
        taught = {network.name for network in networks[half::2]}
        keys = [row["key"] for row in measured.rows if row["kind"] == "kernel" or row["key"] in taught]
        predictor = fit(measured.filter(key=keys))
        for network in networks[1 - half :: 2]:
            kernels = [Kernel.from_key(key) for key in network.kernels.elements()]
            ms, low, high = predictor.network(kernels)
            truth = network.measurement.median_ms
            errors.append(abs(ms / truth - 1))
            sums.append(abs(predictor.kernel_ms(kernels).sum() / truth - 1))
            inside.append(low <= truth <= high)
            assert ms == predictor.network_ms(kernels)
    assert len(errors) == len(networks)
    assert np.median(errors) < 0.05
    assert np.median(errors) < np.median(sums)
    assert np.mean(inside) >= 0.75


def test_measured_kernels_keep_what_was_measured(predictor: Predictor, measured: LatencyTable) -> None:
    frame = predictor.predict(measured.kernels)
    assert set(frame["source"]) == {"measured"}
    times = np.array([measured.measurements[kernel.key].median_ms for kernel in measured.kernels])
    assert frame["ms"].to_numpy() == pytest.approx(times, rel=1e-9)
    assert (frame["low_ms"] < frame["ms"]).all()


def test_the_origin_of_a_kernel_does_not_matter(predictor: Predictor, measured: LatencyTable) -> None:
    kernel = measured.kernels[0]
    elsewhere = replace(kernel, origin=("layers.0.conv1",))
    assert predictor.predict([elsewhere])["source"].tolist() == ["measured"]


def test_the_file_of_a_table_is_fitted_as_the_table(
    measured: LatencyTable, predictor: Predictor, tmp_path: Path
) -> None:
    path = measured.save(tmp_path / "t.parquet")
    assert fit(path) is fit(str(path)) is predictor
    with pytest.raises(TableMissingError):
        fit(tmp_path / "none.parquet")
    with pytest.raises(ConfigError, match="fitted to a latency table or to the file of one, found dict"):
        fit({})  # type: ignore[arg-type]


def test_what_is_no_kernels_is_refused(predictor: Predictor) -> None:
    for ask in (predictor.predict, predictor.network, predictor.network_ms):
        with pytest.raises(ConfigError, match=r"must be given kernels, found object\. Try: kernel_graph\.at\(widths\)"):
            ask(object())  # type: ignore[operator]
        with pytest.raises(ConfigError, match=r"must be given kernels, found dict\."):
            ask([{}])  # type: ignore[operator]


def test_fitting_is_deterministic_and_cached(measured: LatencyTable, monkeypatch: pytest.MonkeyPatch) -> None:
    convs = set(fused(measured))
    small = measured.filter(key=[row["key"] for row in measured.rows if row["family"] != "conv" or row["key"] in convs])
    unseen = [kernel for kernel in measured.kernels if kernel.op == "nchwc.Conv"][:40]
    first = fit(small)
    assert fit(LatencyTable.from_rows(small.header, list(small.rows)[::-1])) is first
    gemm = measured.filter(op="Gemm")
    assert fit(gemm, seed=1) is not fit(gemm)
    monkeypatch.setattr(fitting, "_cache", type(fitting._cache)())
    again = fit(small)
    assert again is not first
    assert again.kernel_ms(unseen).tolist() == first.kernel_ms(unseen).tolist()
    assert again.calibration == first.calibration


def test_prediction_is_quick_and_known_kernels_are_free(held_out: tuple[Predictor, list[Kernel], np.ndarray]) -> None:
    predictor, kernels, _ = held_out
    fresh = [
        [replace(kernel, attributes=(*kernel.attributes, ("turn", turn))) for kernel in kernels[:50]]
        for turn in range(9)
    ]
    spent, again = [], []
    for network in fresh:
        begun = time.process_time()
        predictor.network(network)
        spent.append(time.process_time() - begun)
        begun = time.process_time()
        predictor.network(network)
        again.append(time.process_time() - begun)
    # With its interval; 3.6 ms and 0.24 ms on the machine that it was last timed on, beside other work, where 5 ms
    # are promised; slower machines get the rest.
    assert np.median(spent) < 0.015
    assert np.median(again) < 0.002


def test_an_operation_that_the_table_lacks_gets_a_wider_interval(measured: LatencyTable) -> None:
    without = measured.filter(kind="kernel", op={kernel.op for kernel in measured.kernels} - {"FusedConv"})
    kernels = [kernel for kernel in measured.kernels if kernel.op == "FusedConv"]
    known = [kernel for kernel in split(measured)[1] if kernel.op == "nchwc.Conv"]
    frame = fit(without).predict(kernels)
    assert set(frame["source"]) == {"fallback"}
    usual = fit(split(measured)[0]).predict(known)
    assert (frame["high_ms"] / frame["low_ms"]).min() > (usual["high_ms"] / usual["low_ms"]).median()


def test_a_memory_bound_family_without_rows_is_judged_by_its_traffic(predictor: Predictor) -> None:
    small = Kernel("Concat", "concat", ((1, 32, 16, 16), (1, 32, 16, 16)), (1, 64, 16, 16))
    large = Kernel("Concat", "concat", ((1, 64, 32, 32), (1, 64, 32, 32)), (1, 128, 32, 32))
    frame = predictor.predict([small, large])
    assert set(frame["source"]) == {"fallback"}
    assert frame["ms"].is_monotonic_increasing
    assert (frame["high_ms"] / frame["low_ms"]).min() >= 3.99
    assert 0.002 < frame["ms"].min() < frame["ms"].max() < 0.2


def test_a_family_without_rows_is_named(measured: LatencyTable) -> None:
    convs = fit(measured.filter(family=("conv", "network")).filter(op=("FusedConv",)))
    linear = Kernel("Gemm", "gemm", ((1, 64),), (1, 10))
    with pytest.raises(UnsupportedKernelError, match=r"family 'gemm' to predict Gemm \[\(1, 64\)\] -> \(1, 10\)"):
        convs.kernel_ms([linear])
    quantized = replace(convs.table.kernels[0], precision="int8")
    with pytest.raises(UnsupportedKernelError, match="must hold int8 kernels of family 'conv'"):
        convs.predict([quantized])
    with pytest.raises(UnsupportedKernelError, match="sizes must be whole numbers from 1"):
        convs.predict([replace(convs.table.kernels[0], output=(1, 0, 8, 8))])


def test_networks_that_cannot_be_predicted_are_left_out_and_named(
    measured: LatencyTable, caplog: pytest.LogCaptureFixture
) -> None:
    table = measured.filter(key=[*fused(measured), *(network.name for network in measured.networks)])
    predictor = fit(table)
    assert predictor.calibrated_on == ()
    assert set(predictor.report().left_out) == {network.name for network in measured.networks}
    assert predictor.report().end_to_end is None
    assert predictor.held_out()[1] == []
    assert "left out of the calibration: a latency table must hold fp32 kernels of family" in caplog.text


def test_networks_of_the_calibration_are_held_out_one_by_one(measured: LatencyTable) -> None:
    strange = network_row(
        "strange", [Kernel("Gemm", "gemm", ((1, 8),), (1, 4), precision="int8")], measured.networks[0][2]
    )
    predictor = fit(LatencyTable.from_rows(measured.header, [*measured.rows, strange]))
    kernels, networks = predictor.held_out()
    assert [network.name for network in networks] == [network.name for network in measured.networks]
    assert len(kernels) == len(measured.kernels)


def test_kernels_that_the_call_hides_are_not_learned_from(measured: LatencyTable) -> None:
    convs = [kernel for kernel in measured.kernels if kernel.family == "conv"]
    hidden, alone = convs[:3], [kernel for kernel in measured.kernels if kernel.family == "gemm"]
    assert {kernel.op for kernel in hidden} <= {kernel.op for kernel in convs[3:]}
    short = replace(convs[3], op="Short")
    row = kernel_row(short, Measurement(1e-4, 1.1e-4, 0.9e-4, 0.0, (1e-4,), 5))
    header = {**measured.header, "flags": {"below-overhead": [kernel.key for kernel in (*hidden, *alone, short)]}}
    predictor = fit(LatencyTable.from_rows(header, [*measured.rows, row]))
    assert set(predictor.predict(hidden)["source"]) == {"predicted"}
    assert set(predictor.predict(convs[3:6])["source"]) == {"measured"}
    # A family, and an operation, that has no others is still learned: from other kinds it would be guessed.
    assert set(predictor.predict(alone)["source"]) == {"measured"}
    assert list(predictor.predict([short])["source"]) == ["measured"]
    assert predictor.predict([short])["ms"][0] == pytest.approx(1e-4)
    assert set(predictor.predict([replace(short, inputs=convs[4].inputs, output=convs[4].output)])["source"]) != {
        "fallback"
    }


def test_predictions_far_outside_of_the_table_follow_the_work_and_say_less(predictor: Predictor) -> None:
    inside = next(k for k in predictor.table.kernels if k.op == "nchwc.Conv" and k.inputs[0] == (1, 128, 16, 16))
    outside = replace(inside, inputs=((1, 1024, 16, 16),), output=(1, 1024, *inside.output[2:]))
    near, far = predictor.predict([inside, outside]).itertuples()
    ratio = (1024 * 1024) / (128 * inside.output[1])
    assert ratio / 3 < far.ms / near.ms < ratio * 3
    assert far.high_ms / far.low_ms > 1.5


def test_a_table_of_one_kernel_still_predicts_its_family() -> None:
    kernel = Kernel("Relu", "elementwise", ((1, 16, 32, 32),), (1, 16, 32, 32))
    row = kernel_row(kernel, Measurement(0.01, 0.011, 0.0099, 0.0, (0.01,), 5))
    header = {"identity": {"architecture": "x"}, "runtime": "onnxruntime", "threads": 1, "precision": "fp32"}
    predictor = fit(LatencyTable.from_rows(header, [row]))
    double = replace(kernel, inputs=((1, 32, 32, 32),), output=(1, 32, 32, 32))
    frame = predictor.predict([kernel, double])
    assert frame["ms"][0] == pytest.approx(0.01)
    assert 0.01 < frame["ms"][1] <= 0.021
    ms, low, high = predictor.network([kernel, double])
    assert low < 0.8 * ms
    assert high > 1.25 * ms
    assert predictor.report().summary().endswith("end to end not measured")


def test_settings_that_make_no_sense_are_refused(measured: LatencyTable) -> None:
    with pytest.raises(ConfigError, match=r"between 0 and 1, found 1\.5"):
        fit(measured, level=1.5)
    with pytest.raises(TableFormatError, match="at least one kernel"):
        fit(measured.filter(kind="network"))


def test_a_predictor_is_saved_as_its_table_and_settings(measured: LatencyTable, tmp_path: Path) -> None:
    predictor = fit(measured.filter(op="FusedConv"), seed=3, level=0.8)
    path = predictor.save(tmp_path / "predictor.json")
    document = json.loads(path.read_text())
    assert document["table_hash"] == predictor.table_hash
    assert document["settings"] == {"seed": 3, "level": 0.8, "method": predictor.settings.method}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["predictor.json", "predictor.parquet"]
    assert Predictor.load(path) is predictor


def test_a_saved_predictor_that_does_not_fit_its_table_is_refused(measured: LatencyTable, tmp_path: Path) -> None:
    path = fit(measured.filter(op="FusedConv")).save(tmp_path / "predictor.json")
    document = json.loads(path.read_text())
    measured.filter(op="Gemm").save(tmp_path / "predictor.parquet")
    with pytest.raises(TableMismatchError, match="must stand beside the table it was fitted to"):
        Predictor.load(path)
    path.write_text(json.dumps({**document, "settings": {**document["settings"], "method": 0}}))
    with pytest.raises(TableFormatError, match="must have schema 1 and method"):
        Predictor.load(path)
    path.write_text("{")
    with pytest.raises(TableFormatError, match=r"must be JSON written by Predictor\.save"):
        Predictor.load(path)
    with pytest.raises(TableMissingError, match="found no file"):
        Predictor.load(tmp_path / "other.json")


def test_the_report_stands_beside_the_noise_ceiling(predictor: Predictor, measured: LatencyTable) -> None:
    report = predictor.report()
    rows = {row["family"]: row for row in report.rows()}
    assert set(rows) == {"conv", "layout", "elementwise", "gemm", "pool", "end to end"}
    conv, total = rows["conv"], rows["end to end"]
    assert conv["n"] == sum(kernel.family == "conv" for kernel in measured.kernels)
    assert conv["median_error_percent"] < 5
    assert conv["noise_median_percent"] < conv["median_error_percent"]
    assert 85 <= conv["coverage_percent"] <= 95
    assert total["n"] == len(measured.networks)
    assert total["median_error_percent"] < 5
    # 30 networks of 90 % nominal, by intervals that are no wider than errors of this size call for.
    assert 80 <= total["coverage_percent"] <= 97
    assert total["width_percent"] < 6 * total["mean_error_percent"]
    assert total["sum_median_error_percent"] > total["median_error_percent"]
    assert all(
        value is None or isinstance(value, str) or math.isfinite(value)
        for row in rows.values()
        for value in row.values()
    )
    summary = report.summary()
    assert "\n" not in summary
    assert f"on {conv['n']} held-out kernels" in summary
    assert "measurements repeat to" in summary


def test_settings_are_never_written_over_a_table(tmp_path: Path) -> None:
    kernel = Kernel("Relu", "elementwise", ((1, 16, 32, 32),), (1, 16, 32, 32))
    header = {"identity": {"architecture": "x"}, "runtime": "onnxruntime", "threads": 1, "precision": "fp32"}
    row = kernel_row(kernel, Measurement(0.01, 0.011, 0.0099, 0.0, (0.01,), 5))
    table = LatencyTable.from_rows(header, [row])
    table.save(tmp_path / "table.parquet")
    with pytest.raises(ConfigError, match=r"must be a \.json file, found .*table\.parquet"):
        fit(table).save(tmp_path / "table.parquet")
    assert LatencyTable.load(tmp_path / "table.parquet").hash == table.hash
    assert [path.name for path in tmp_path.iterdir()] == ["table.parquet"]


def test_the_documented_program_lowers_and_predicts(predictor: Predictor, capsys: pytest.CaptureFixture[str]) -> None:
    """With a stored table, since measuring one takes half a minute."""
    section = (
        (Path(__file__).parents[3] / "docs" / "tables.md").read_text().split("\n## From Python\n")[1].split("\n## ")[0]
    )
    (program,) = re.findall("```python\n(.*?)```", section, re.DOTALL)
    program, replaced = re.subn(
        r"table = edgeprune\.profile\(.*\)", f"table = edgeprune.LatencyTable.load({str(DATA)!r})", program
    )
    assert replaced == 1
    found: dict[str, Any] = {}
    exec(compile(program, "docs/tables.md", "exec"), found)
    assert found["low_ms"] < found["ms"] < found["high_ms"]
    low, graph = found["low"], found["graph"]
    assert found["predictor"].table_hash == predictor.table_hash
    assert found["ms"] < predictor.network(low.at({}))[0]
    said = capsys.readouterr().out
    assert "channel groups: 9" in said
    assert "low_ms" in said
    (whole,) = re.findall(r'for `"([^"]*)"`', section)
    assert whole in graph.widths()
