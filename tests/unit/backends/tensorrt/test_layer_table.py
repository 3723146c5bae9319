"""Layers of recorded engines as a latency table: exports of trtexec by others (see tests/data), and records of `compile`."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from edgeprune.backends.tensorrt.building import RECORD_NAME
from edgeprune.backends.tensorrt.layer_table import layer_table
from edgeprune.errors import BackendError, ConfigError, TableFormatError, TableMissingError
from edgeprune.latency.fitting import fit
from edgeprune.latency.table import LatencyTable
from edgeprune.spec import Kernel

DATA = Path(__file__).parents[3] / "data" / "trtexec"
RESNET = ",".join(str(DATA / f"resnet18.{what}.json") for what in ("layers", "profile", "times"))
ALEXNET = ",".join(str(DATA / f"alexnet.{what}.json") for what in ("layers", "profile"))


def test_layers_of_real_engines_become_kernels_and_engines_networks(tmp_path: Path) -> None:
    table = layer_table([RESNET, ALEXNET], device="RTX 3060 Laptop", version="10.0", facts={"multiprocessors": 30})
    assert LatencyTable.load(table.save(tmp_path / "table.parquet")) == table
    header = table.header
    assert (header["label"], header["runtime"], header["precision"]) == ("imported", "tensorrt", "fp16")
    assert [(entry["source"], entry["rows"], entry["left_out"]) for entry in header["imported"]] == [
        ("resnet18", 24, 2),  # a NoOp takes no time, and generated code's call for shapes has none
        ("alexnet", 13, 1),
    ]
    (network,) = table.networks
    assert network.name == "resnet18"
    assert sum(network.kernels.values()) == 24
    whole = sum(table.measurements[key].median_ms * count for key, count in network.kernels.items())
    assert whole / network.measurement.median_ms == pytest.approx(1.3, abs=0.03), "layers are timed one by one"
    families = {kernel.family for kernel in table.kernels}
    assert {"conv", "pool", "gemm"} <= families
    convolution = next(kernel for kernel in table.kernels if kernel.attribute("kernel") == (7, 7))
    assert (convolution.inputs, convolution.output) == (((1, 3, 224, 224),), (1, 64, 112, 112))
    # Equal layers, tactic and all, are rounds of one measurement.
    assert max(len(measurement.rounds_ms) for measurement in table.measurements.values()) >= 2
    card = table.card()
    assert "imported" in card
    assert header["imported"][0]["sha256"].split(", ")[0][:12] in card


def test_a_fit_of_them_predicts_them_and_learns_the_surplus_of_the_sum() -> None:
    table = layer_table([RESNET, ALEXNET], device="RTX 3060 Laptop", facts={"multiprocessors": 30})
    predictor = fit(table)
    frame = predictor.predict(table.kernels)
    assert (frame["low_ms"] <= frame["ms"]).all()
    assert (frame["ms"] > 0).all()
    (network,) = table.networks
    kernels = list(Counter({Kernel.from_key(key): count for key, count in network.kernels.items()}).elements())
    ms, low, high = predictor.network(kernels)
    assert low <= ms <= high
    total = sum(table.measurements[kernel.key].median_ms for kernel in kernels)
    assert abs(ms - network.measurement.median_ms) < abs(total - network.measurement.median_ms)


def test_records_of_compile_are_read_with_release_and_gpu(stand_in, model, build, tmp_path: Path) -> None:
    stand_in("10.3.0")
    sources = []
    for name in ("dense", "cut"):
        folder = tmp_path / name
        folder.mkdir()
        record = build(model, folder / "engine.plan", gpu={"gpu": "Orin", "compute_capability": "8.7"})
        (folder / RECORD_NAME).write_text(json.dumps({**record, "gpu": "Orin"}))
        sources.append(folder)
    table = layer_table([str(source) for source in sources], device="orin")
    assert table.header["identity"] == {
        "device": "orin",
        "runtime": "tensorrt",
        "runtime_version": "10.3.0",
        "gpu": "Orin",
    }
    assert [network.name for network in table.networks] == ["cut", "dense"]
    other = json.loads((sources[1] / RECORD_NAME).read_text())
    (sources[1] / RECORD_NAME).write_text(json.dumps({**other, "gpu": "Thor"}))
    with pytest.raises(ConfigError, match="must have the same gpu, found Orin and, of cut, Thor"):
        layer_table(sources, device="orin")


@pytest.mark.parametrize(
    ("source", "error", "words"),
    [
        ("nowhere", TableMissingError, "there must be a record of an engine at nowhere"),
        ("a.json", BackendError, "a.json must be a record that compile leaves beside an engine"),
        ("a.json,a.json", BackendError, "the layers that trtexec exports must be readable"),
        ("a.json,a.json,a.json,a.json", ConfigError, "found 4 paths"),
        ("names.json,none.json", TableFormatError, "at least one layer with sizes and a time"),
    ],
)
def test_what_is_no_record_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, error: type[Exception], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.json").write_text('{"format": 7}')
    Path("names.json").write_text('{"Layers": ["conv1", "relu1"], "Bindings": []}')
    Path("none.json").write_text('[{"count": 3}, {"name": "conv1", "averageMs": 0.2}]')
    with pytest.raises(error, match=words):
        layer_table([source], device="x")


def test_there_must_be_an_engine_and_a_device() -> None:
    with pytest.raises(ConfigError, match="at least one engine"):
        layer_table([], device="x")
    with pytest.raises(ConfigError, match="must name the device"):
        layer_table([RESNET], device=" ")
