"""`profile`, `fit` and `prune` with TensorRT on a stand-in whose layers and times are made up for each model: *modelled*."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

onnx = pytest.importorskip("onnx")
torch = pytest.importorskip("torch")
pytest.importorskip("onnxruntime")

from torch import nn  # noqa: E402 (after the skips)

import edgeprune  # noqa: E402
from edgeprune.backends.tensorrt import exports, fusing, model, versions  # noqa: E402
from edgeprune.backends.tensorrt.backend import TensorRt  # noqa: E402
from edgeprune.backends.tensorrt.layer_times import BuiltLayer, group_times, unquantized  # noqa: E402
from edgeprune.boards.board import Board  # noqa: E402
from edgeprune.errors import CompileError, ConfigError, UnsupportedKernelError  # noqa: E402
from edgeprune.latency.table import LatencyTable  # noqa: E402
from edgeprune.lowering.kernel_graph import KernelGraph  # noqa: E402
from edgeprune.profiling import layered, staging  # noqa: E402
from edgeprune.profiling.run import DENSE, preview, profile  # noqa: E402
from edgeprune.testing import trtexec_model, trtexec_says  # noqa: E402

INPUT = torch.zeros(1, 3, 32, 32)


class Net(nn.Module):
    """A residual block between two convolutions, as wide as it takes to see its widths in a time."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 3, padding=1)
        self.first = nn.Conv2d(64, 128, 3, padding=1)
        self.bn = nn.BatchNorm2d(128)
        self.second = nn.Conv2d(128, 64, 3, padding=1)
        self.head = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.second(torch.relu(self.bn(self.first(x)))))
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def kernel_graph(net: nn.Module) -> KernelGraph:
    """Lowered in fp16, without a board."""
    return edgeprune.lower(edgeprune.trace(net, INPUT), "tensorrt", model=net, precision="fp16")


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """As few networks and rounds as can be: each timing is a process."""
    monkeypatch.setattr(layered, "LEAST_NETWORKS", 3)
    monkeypatch.setattr(staging, "ROUNDS", 2)


def stages(root: Path, step: str) -> list[Path]:
    return sorted((root / "tensorrt").glob(f"*/{step}.json"))


def test_a_table_holds_the_layers_of_networks_that_were_built_on_the_board(
    stand_in, few, net, kernel_graph, tmp_path
) -> None:
    stand_in("10.3.0", modelled=True)
    out, root = tmp_path / "table.parquet", tmp_path / "root"
    journal = tmp_path / "table.parquet.journal.jsonl"

    def interrupt(done: int, total: int, left_s: float, message: str) -> None:
        if done == 2:
            raise KeyboardInterrupt

    settings: dict[str, Any] = {"backend": "tensorrt", "minutes": 0.01, "precision": "fp16", "out": out}
    with Board.open("local") as board:
        with pytest.raises(KeyboardInterrupt):
            profile(net, INPUT, board, progress=interrupt, **settings)
        assert not out.exists()
        built = {path: path.read_text() for path in stages(root, "build")}
        assert len(built) == 3
        assert not stages(root, "time"), "engines for timing are timed in rounds, not when they are built"
        kept = sum('"kind":"sample"' in line for line in journal.read_text().splitlines())
        said: list[str] = []
        table = profile(net, INPUT, board, told=said.append, **settings)
    # Nothing was built or measured twice.
    assert {path: path.read_text() for path in stages(root, "build")} == built
    assert said[0].startswith(f"going on: {kept} measurements of the interrupted run are kept")
    assert LatencyTable.load(out).hash == table.hash
    assert not journal.exists()
    header = table.header
    assert (header["runtime"], header["precision"], header["unsupported"]) == ("tensorrt", "fp16", {})
    assert header["timing"].startswith("trtexec's times on the device")
    networks = {network.name: network for network in table.networks}
    assert len(networks) == 3
    # What is lowered without a board are the kernels of these networks.
    for network in networks.values():
        assert Counter(kernel.key for kernel in kernel_graph.at(network.widths)) == network.kernels
    # Every kernel of every network has a time, and nothing else is in the table.
    assert {key for network in networks.values() for key in network.kernels} == {kernel.key for kernel in table.kernels}
    assert {kernel.op for kernel in table.kernels} >= {"Conv+Relu", "Conv+Add+Relu", "Gemm"}
    dense = networks[DENSE]
    layers = sum(table.measurements[key].median_ms * count for key, count in dense.kernels.items())
    # Layers are timed one by one, the copy of the input too: the sum is too much, by what the stand-in adds to each.
    surplus = (sum(dense.kernels.values()) + 1) * 0.0021 - 0.004
    assert layers - dense.measurement.median_ms == pytest.approx(surplus, abs=0.02 * dense.measurement.median_ms)
    # What several networks run was timed in each of them.
    assert max(len(table.measurements[kernel.key].rounds_ms) for kernel in table.kernels) > 2


@pytest.mark.slow
def test_a_plan_is_made_with_it_and_compared_on_the_board(stand_in, net, tmp_path) -> None:
    stand_in("11.1.0", modelled=True)
    with Board.open("local") as board:
        table = profile(net, INPUT, board, "tensorrt", 0.3, out=tmp_path / "table.parquet")
        predictor = edgeprune.fit(table)
        kernel_graph = edgeprune.lower(edgeprune.trace(net, INPUT), "tensorrt", model=net, device=table.target())
        for network in table.networks:
            ms, low, high = predictor.network(kernel_graph.at(network.widths))
            assert low <= ms <= high
            assert ms == pytest.approx(network.measurement.median_ms, rel=0.05)
        result = edgeprune.prune(net, INPUT, "70%", board, predictor, backend="tensorrt", kernel_graph=kernel_graph)
    # Of a device that does not exist: that its engines were built there and compared is all that this says.
    assert result.budget_met
    assert result.measured_ms <= 0.7 * result.dense_ms
    assert result.rounds[-1].measured is not None
    assert result.plan.widths() != edgeprune.trace(net, INPUT).widths()


@pytest.mark.slow
@pytest.mark.parametrize("release", ["8.6.1", "11.1.0"])
def test_a_plan_is_made_for_int8(stand_in, few, net, tmp_path, release) -> None:
    stand_in(release, modelled=True)
    with Board.open("local") as board:
        table = profile(net, INPUT, board, "tensorrt", 0.01, precision="int8")
        assert table.header["precision"] == "int8"
        assert {kernel.precision for kernel in table.kernels if kernel.family == "conv"} == {"int8"}
        predictor = edgeprune.fit(table)
        result = edgeprune.prune(net, INPUT, "80%", board, predictor, backend="tensorrt")
    assert result.measured_ms < result.dense_ms
    # Those that were compared on the board too.
    said = [path.read_text() for path in (tmp_path / "root" / "tensorrt").glob("*/build.log")]
    assert len(said) > len(table.networks)
    assert all((" --int8" in words) == (release == "8.6.1") for words in said)


@pytest.mark.slow
def test_a_table_is_extended_by_networks_that_it_lacks(stand_in, few, net, monkeypatch) -> None:
    stand_in("10.3.0", modelled=True)
    with Board.open("local") as board:
        first = profile(net, INPUT, board, "tensorrt", 0.01)
        assert not preview(net, INPUT, board, "tensorrt", 0.01, table=first).to_measure
        assert profile(net, INPUT, board, "tensorrt", 0.01, table=first).hash == first.hash
        monkeypatch.setattr(layered, "LEAST_NETWORKS", 6)
        seen = preview(net, INPUT, board, "tensorrt", 0.01, table=first)
        assert (seen.kernels, seen.networks, seen.known) == (0, 3, 3)
        second = profile(net, INPUT, board, "tensorrt", 0.01, table=first)
    assert set(first.frame["key"]) < set(second.frame["key"])
    assert len(second.networks) == len(first.networks) + 3
    # The dense network is timed again, and its layers say how the board compares.
    link = second.header["runs"][-1]["link"]
    assert 0.95 < link["change"] < 1.05
    assert set(link["ratios"]) >= set({one.name: one for one in first.networks}[DENSE].kernels)


@pytest.mark.slow
def test_a_network_whose_layers_are_not_its_own_is_refused(stand_in, few, net) -> None:
    # Recorded layers: of another network.
    stand_in("10.3.0")
    with Board.open("local") as board, pytest.raises(UnsupportedKernelError, match="must have layers of their own"):
        profile(net, INPUT, board, "tensorrt", 0.01)


def test_what_only_fails_after_all_timing_is_refused_at_once(net: nn.Module) -> None:
    with pytest.raises(ConfigError, match="loaded by a process of their own each time, and the board cools") as caught:
        profile(net, INPUT, "nowhere", "tensorrt", sustained=True)
    assert caught.value.hint


@pytest.mark.slow
def test_energy_and_percentiles_are_those_of_its_networks(stand_in, few, net, tmp_path) -> None:
    """What the meter prints means nothing here; a test of replays says what energies are worth."""
    stand_in("10.3.0", modelled=True, real_time=True)
    meter = "while echo 3.5; do sleep 0.02; done"
    with Board.open("local") as board:
        table = profile(net, INPUT, board, "tensorrt", 0.01, energy=True, meter=meter, percentiles=True)
    timed = {network.name: network.measurement.median_ms for network in table.networks}
    assert len(timed) == 3
    for name, ms in timed.items():
        assert table.energy[name]["run_ms"] == pytest.approx(ms, rel=0.02)
    for record in table.header["percentiles"].values():
        assert (record["rounds"], record["runs"]) == (5, 500)
        assert 1.0 < record["ratio"]["90"] < record["ratio"]["99"] < 1.02
    chosen = table.chosen(percentile=95)
    assert {network.name: network.measurement.median_ms for network in chosen.networks} == pytest.approx(
        timed, rel=0.02
    )


def test_in_int8_what_quantizes_belongs_to_the_layer_that_it_is_for(net: nn.Module, kernel_graph: KernelGraph) -> None:
    in_int8 = edgeprune.lower(kernel_graph.graph, "tensorrt", model=net, precision="int8")
    widths = {name: size // 2 for name, size in kernel_graph.graph.widths().items()}
    operators, shapes = in_int8._candidate(widths)
    family = versions.dialect(versions.parse("10.3.0"))
    ready = model.quantized_for_timing(model.prepared(model.network(operators, shapes), family, "int8"))
    assert ready == model.quantized_for_timing(model.prepared(model.network(operators, shapes), family, "int8"))
    assert trtexec_says.unparsed(ready.SerializeToString(), "10.3.0") is None
    # Every layer with weights reads int8, as an engine that is compiled does where none is too noisy.
    found = {node.name: node for node in ready.graph.node}
    served = model.served(ready)
    assert {found[name].op_type for name in served} == set(model.QUANTIZING)
    leading = {name for name, node in found.items() if node.op_type in ("Conv", "Gemm", "MatMul")}
    assert leading <= set(served.values()) <= set(found) - set(served)

    kernels = in_int8.at(widths)
    assert {kernel.precision for kernel in kernels if kernel.family in ("conv", "gemm")} == {"int8"}
    assert [kernel.op for kernel in kernels] == [kernel.op for kernel in kernel_graph.at(widths)]
    made = trtexec_model.made_up(onnx.ModelProto.FromString(ready.SerializeToString()))
    layers = exports.read_layers(json.dumps(made["layers"]))
    assert len(layers) > len(kernels)
    built = tuple(BuiltLayer(layer.name, layer.nodes) for layer in layers)
    groups = fusing.groups(operators)
    times = group_times(unquantized(built, served), made["profile"], groups)
    assert set(times) == set(range(len(kernels)))
    assert sum(times.values()) == pytest.approx(sum(ms for _, ms in made["profile"]))
    # Taken for work of their own, the nodes that quantize would leave the layer beside the input's without a time.
    assert sum(group_times(built, made["profile"], groups).values()) < sum(times.values())


def test_engines_without_a_board_are_refused(net: nn.Module, kernel_graph: KernelGraph) -> None:
    with pytest.raises(CompileError, match="found no board to build on"):
        kernel_graph.network_engine(kernel_graph.graph.widths())
    with pytest.raises(UnsupportedKernelError, match="timed as layers of networks"):
        TensorRt().kernel_engine(kernel_graph.at({})[0])


def test_the_network_for_timing_is_the_model_at_other_widths(kernel_graph: KernelGraph) -> None:
    widths = {name: size // 2 for name, size in kernel_graph.graph.widths().items()}
    made = model.network(*kernel_graph._candidate(widths))
    onnx.checker.check_model(made, full_check=True)
    # What an importer computes from a shape may be no weight to it: every weight is there.
    assert not [node for node in made.graph.node if node.op_type in ("Constant", "ConstantOfShape")]
    assert {entry.domain for entry in made.opset_import} == {""}
    named = {operator.name for operator in kernel_graph.operators.operators}
    assert {node.name for node in made.graph.node} <= named
    assert sorted(tensor.dims[0] for tensor in made.graph.initializer if len(tensor.dims) == 4) == [32, 32, 64]
