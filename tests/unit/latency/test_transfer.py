"""A few kernels of a new device on top of another device's predictor."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgeprune.errors import ConfigError
from edgeprune.latency.fitting import fit
from edgeprune.latency.predictor import Predictor
from edgeprune.latency.table import LatencyTable
from edgeprune.latency.table_rows import kernel_row
from edgeprune.latency.transfer import Line, Monotone
from edgeprune.spec import Kernel, Measurement

DEEPBENCH = Path(__file__).parents[2] / "data" / "deepbench_conv.csv"
FIELDS = ("batch", "in_channels", "height", "width", "out_channels", "kernel_size", "stride", "padding")


def deepbench(device: str) -> LatencyTable:
    return LatencyTable.from_csv(
        DEEPBENCH,
        kernel="conv2d",
        columns={name: name for name in FIELDS},
        latency_ms="forward_ms",
        where={"device": device},
        device=device,
    )


def some(table: LatencyTable, kernels: list[Kernel]) -> LatencyTable:
    return table.filter(key=[kernel.key for kernel in kernels])


def other_device(table: LatencyTable, power: float = 1.1, factor: float = 4.0) -> LatencyTable:
    """A made-up device: every kernel `factor` times as long, large ones more so, with 2 % of noise."""
    source = np.random.default_rng(0)
    rows = []
    for kernel in table.kernels:
        ms = factor * table.measurements[kernel.key].median_ms ** power * float(np.exp(source.normal(0, 0.02)))
        rows.append(kernel_row(kernel, Measurement(ms, ms, ms, 0.0, (ms,), 1)))
    header = {**table.header, "identity": {**table.header["identity"], "cpu_model": "slow"}}
    return LatencyTable.from_rows(header, rows)


def drawn(table: LatencyTable, count: int, seed: int, family: str = "conv") -> tuple[list[Kernel], list[Kernel]]:
    kernels = [kernel for kernel in table.kernels if kernel.family == family]
    order = np.random.default_rng(seed).permutation(len(kernels))
    return [kernels[place] for place in order[:count]], [kernels[place] for place in order[count:]]


def error(predictor: Predictor, table: LatencyTable, kernels: list[Kernel]) -> float:
    truth = np.array([table.measurements[kernel.key].median_ms for kernel in kernels])
    return float(np.median(np.abs(np.log(predictor.kernel_ms(kernels) / truth))))


@pytest.fixture(scope="module")
def slow(measured: LatencyTable) -> LatencyTable:
    return other_device(measured)


@pytest.mark.parametrize("count", [10, 25])
def test_a_few_kernels_find_the_map_between_two_devices(
    measured: LatencyTable, predictor: Predictor, slow: LatencyTable, count: int
) -> None:
    few, rest = drawn(measured, count, seed=1)
    table = some(slow, few)
    moved = fit(table, transfer_from=predictor)
    assert error(moved, slow, rest) < 0.06
    assert error(moved, slow, rest) < 0.5 * error(fit(table), slow, rest)
    frame = moved.predict(rest)
    known = np.array([kernel.op in {one.op for one in few} for kernel in rest])
    assert set(frame["source"][known]) == {"transferred"}
    assert set(frame["source"][~known]) <= {"fallback"}
    truth = np.array([slow.measurements[kernel.key].median_ms for kernel in rest])
    assert ((frame["low_ms"] <= truth) & (truth <= frame["high_ms"])).mean() > 0.85


def test_real_devices_are_predicted_from_another_one_and_twenty_convolutions() -> None:
    """Median error of three draws of 20 of 72 convolutions; the others are held out."""
    source, target = fit(deepbench("Titan Xp")), deepbench("V100")
    moved, alone = [], []
    for seed in range(3):
        few, rest = drawn(target, 20, seed)
        moved.append(error(fit(some(target, few), transfer_from=source), target, rest))
        alone.append(error(fit(some(target, few)), target, rest))
    # Two libraries with other algorithms: one device foretells the other to some 18 % at best.
    assert np.mean(moved) < 0.15
    assert np.mean(moved) < 0.9 * np.mean(alone)


def test_a_source_that_says_nothing_is_not_used(measured: LatencyTable) -> None:
    """The same kernels with their times dealt out at random."""
    few, rest = drawn(measured, 39, seed=0)
    known = [*few, *rest[:60]]
    times = [measured.measurements[kernel.key] for kernel in known]
    order = np.random.default_rng(0).permutation(len(times))
    shuffled = LatencyTable.from_rows(
        {**measured.header, "identity": {"device": "nonsense"}},
        [kernel_row(kernel, times[place]) for kernel, place in zip(known, order, strict=True)],
    )
    table = some(measured, few)
    moved = fit(table, transfer_from=shuffled)
    assert set(moved.predict(rest)["source"]) == {"predicted"}
    assert moved.kernel_ms(rest).tolist() == fit(table).kernel_ms(rest).tolist()
    report = moved.report()
    assert report.summary().endswith("of no use to any family")
    assert report.transferred_from is not None
    assert report.transferred_from.startswith("nonsense, onnxruntime (table ")


def test_families_that_the_new_table_lacks_are_lent(
    measured: LatencyTable, predictor: Predictor, slow: LatencyTable
) -> None:
    few, _ = drawn(measured, 20, seed=2)
    moved = fit(some(slow, few), transfer_from=predictor)
    gemms = [kernel for kernel in measured.kernels if kernel.family == "gemm"]
    frame = moved.predict(gemms)
    assert set(frame["source"]) == {"fallback"}
    truth = np.array([slow.measurements[kernel.key].median_ms for kernel in gemms])
    assert np.median(np.abs(np.log(frame["ms"] / truth))) < 0.7
    assert (frame["high_ms"] / frame["low_ms"]).min() >= 3.99
    assert {row["family"]: row["n"] for row in moved.report().rows()} == {"conv": 20}


def test_another_precision_is_judged_by_the_one_that_the_source_has(
    measured: LatencyTable, predictor: Predictor
) -> None:
    few, rest = drawn(measured, 20, seed=3)
    halves = {kernel: replace(kernel, precision="fp16") for kernel in measured.kernels}
    rows = []
    for kernel in measured.kernels:
        ms = 0.5 * measured.measurements[kernel.key].median_ms
        rows.append(kernel_row(halves[kernel], Measurement(ms, ms, ms, 0.0, (ms,), 1)))
    half = LatencyTable.from_rows({**measured.header, "precision": "fp16"}, rows)
    moved = fit(some(half, [halves[kernel] for kernel in few]), transfer_from=predictor)
    assert error(moved, half, [halves[kernel] for kernel in rest]) < 0.01


def test_it_is_saved_with_the_predictor_that_it_stands_on(
    measured: LatencyTable, predictor: Predictor, slow: LatencyTable, tmp_path: Path
) -> None:
    few, rest = drawn(measured, 12, seed=4)
    moved = fit(some(slow, few), transfer_from=predictor)
    path = moved.save(tmp_path / "new.json")
    assert json.loads(path.read_text())["source"] == "new.source.json"
    names = {"new.json", "new.parquet", "new.source.json", "new.source.parquet"}
    assert {file.name for file in tmp_path.iterdir()} == names
    again = Predictor.load(path)
    assert again.source is not None
    assert again.source.table_hash == predictor.table_hash
    assert again.kernel_ms(rest).tolist() == moved.kernel_ms(rest).tolist()
    assert fit(some(slow, few)) is not moved


def test_what_was_transferred_is_not_transferred_again(predictor: Predictor, slow: LatencyTable) -> None:
    few, _ = drawn(slow, 10, seed=5)
    moved = fit(some(slow, few), transfer_from=predictor)
    with pytest.raises(ConfigError, match="of its own device's table, found one that was itself transferred"):
        fit(slow, transfer_from=moved)


def test_one_kernel_moves_the_whole_device(measured: LatencyTable, predictor: Predictor, slow: LatencyTable) -> None:
    few, rest = drawn(measured, 1, seed=6)
    assert error(fit(some(slow, few), transfer_from=predictor), slow, rest) < 0.4


def test_lines_and_curves_between_devices() -> None:
    source = np.random.default_rng(0)
    said = source.uniform(-4, 2, (80, 1))
    missed = 1.5 + 0.2 * said[:, 0]
    line = Line().fit(said, missed)
    assert line.predict(said) == pytest.approx(missed, abs=0.05)
    bent = np.where(said[:, 0] < -1, 1.0, 1.0 + 0.8 * (said[:, 0] + 1))
    curve = Monotone().fit(said, bent)
    errors = {type(map_).__name__: np.abs(map_.fit(said, bent).predict(said) - bent).mean() for map_ in (line, curve)}
    assert errors["Monotone"] < 0.7 * errors["Line"]
    outside = np.array([[-9.0], [5.0]])
    assert curve.predict(outside) == pytest.approx(Line().fit(said, bent).predict(outside))


def test_the_fixture_holds_the_same_convolutions_for_every_device() -> None:
    rows = list(csv.DictReader(io.StringIO(DEEPBENCH.read_text())))
    devices = {row["device"] for row in rows}
    assert devices == {"Titan Xp", "V100", "T4"}
    assert len({frozenset(deepbench(device).measurements) for device in devices}) == 1
