"""The law of lowering: for random plans, `at(widths)` is what the runtime executes for the cut model."""

from __future__ import annotations

import gc
import tempfile
from collections import Counter

import pytest
import torch
from torch import nn

import edgeprune
from edgeprune.backends import registry
from edgeprune.backends._base import OperatorGraph
from edgeprune.errors import EdgepruneError, ModelError, PlanError, UnsupportedKernelError
from edgeprune.lowering.kernel_graph import _join
from edgeprune.lowering.trained_form import in_trained_form
from edgeprune.quickstart.network import DigitNet
from edgeprune.surgery.plan import make_plan


@pytest.fixture(scope="module")
def net() -> DigitNet:
    torch.manual_seed(0)
    return DigitNet((32, 48, 64)).eval()


@pytest.fixture(scope="module")
def lowered(net, tmp_path_factory):
    graph = edgeprune.trace(net, torch.zeros(1, 1, 32, 32))
    return edgeprune.lower(graph, workdir=tmp_path_factory.mktemp("lowered"))


def random_widths(graph, seed, multiple):
    generator = torch.Generator().manual_seed(seed)
    return {
        group.name: min(
            group.size, multiple * int(torch.randint(1, -(-group.size // multiple) + 1, (), generator=generator))
        )
        for group in graph.groups
    }


@pytest.mark.parametrize(("multiple", "seed"), [(1, 0), (1, 1), (4, 2), (4, 3), (8, 4), (16, 5)])
def test_kernels_of_a_candidate_are_those_of_the_cut_model(net, lowered, tmp_path, multiple, seed):
    widths = random_widths(lowered.graph, seed, multiple)
    plan = make_plan(lowered.graph, {name: range(width) for name, width in widths.items()})
    engine = tmp_path / "cut.onnx"
    lowered.backend.export(in_trained_form(edgeprune.apply(net, plan)), lowered.graph.example_inputs, engine)
    predicted = Counter(kernel.key for kernel in lowered.at(widths))
    executed = Counter(kernel.key for kernel in lowered.backend.parse_engine(engine))
    assert sum((predicted & executed).values()) >= 0.95 * sum(executed.values())
    assert sum(predicted.values()) == sum(executed.values())


def test_dense_kernels_are_those_of_the_dense_engine(lowered):
    executed = Counter(kernel.key for kernel in lowered.backend.parse_engine(lowered.dense_engine))
    assert Counter(kernel.key for kernel in lowered.at({})) == executed


def test_every_kernel_names_traced_nodes(lowered):
    nodes = {node.name for node in lowered.graph.program.graph.nodes}
    for kernel in lowered.at(random_widths(lowered.graph, 7, 1)):
        assert kernel.origin
        assert set(kernel.origin) <= nodes


def test_network_for_timing_has_the_kernels_of_its_widths(lowered, tmp_path):
    widths = random_widths(lowered.graph, 8, 4)
    engine = tmp_path / "timing.onnx"
    engine.write_bytes(lowered.network_engine(widths))
    assert Counter(k.key for k in lowered.backend.parse_engine(engine)) == Counter(k.key for k in lowered.at(widths))


@pytest.mark.parametrize(("index", "place"), [(-1, ""), (-2, r" in \S+ \(\S+:\d+\)")])
def test_an_operator_whose_shape_does_not_follow_from_the_widths_is_named(lowered, index, place):
    operators = lowered.operators
    chosen = operators.operators[index]
    strange = OperatorGraph(
        operators=operators.operators,
        inputs=operators.inputs,
        outputs=operators.outputs,
        shapes={**operators.shapes, chosen.outputs[0]: (1, 3, 5)},
        sources={name: node for name, node in operators.sources.items() if name != chosen.outputs[0]},
    )
    words = rf"must follow from the widths, that of .* at {chosen.op} '\S+'{place} \(dense .*\) is not"
    with pytest.raises(UnsupportedKernelError, match=words):
        _join(strange, lowered.graph, lowered.backend)


def test_board_architecture_decides_the_kernels(net, lowered, tmp_path):
    arm = edgeprune.lower(
        lowered.graph, model=net, device={"architecture": "aarch64", "isa": ("asimd",)}, workdir=tmp_path
    )
    assert not [kernel.op for kernel in arm.at({}) if kernel.op.startswith("nchwc.")]
    assert registry.get(arm.backend) is arm.backend


def test_a_temporary_folder_goes_with_its_kernel_graph(net, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    graph = edgeprune.trace(net, torch.zeros(1, 1, 32, 32))
    kernel_graph = edgeprune.lower(graph)
    assert kernel_graph.dense_engine.is_relative_to(tmp_path)
    assert kernel_graph.dense_engine.is_file()
    del kernel_graph
    gc.collect()
    assert not list(tmp_path.iterdir())
    with pytest.raises(EdgepruneError):
        edgeprune.lower(graph, model=nn.Linear(2, 2))
    assert not list(tmp_path.iterdir())


def test_a_slice_ends_where_the_channels_that_are_left_do(tmp_path):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.end = nn.Linear(8, 32), nn.Linear(32, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.wide(x)
            return self.end(torch.cat([torch.sigmoid(x), torch.tanh(x)], 1)[:, :32])

    net = Net().eval()
    lowered = edgeprune.lower(edgeprune.trace(net, torch.zeros(1, 8)))
    (group,) = lowered.graph.groups
    widths = {group.name: 20}
    cut = edgeprune.apply(net, make_plan(lowered.graph, {group.name: range(20)}))
    lowered.backend.export(in_trained_form(cut), lowered.graph.example_inputs, tmp_path / "cut.onnx")
    executed = Counter(kernel.key for kernel in lowered.backend.parse_engine(tmp_path / "cut.onnx"))
    assert Counter(kernel.key for kernel in lowered.at(widths)) == executed
    (tmp_path / "timed.onnx").write_bytes(lowered.network_engine(widths))
    assert Counter(kernel.key for kernel in lowered.backend.parse_engine(tmp_path / "timed.onnx")) == executed


def test_what_is_no_traced_model_is_not_lowered(net):
    with pytest.raises(
        ModelError, match=r"must be traced before it is lowered, found DigitNet\. .*edgeprune\.trace\(model"
    ):
        edgeprune.lower(net)


def test_widths_name_groups_or_their_first_layers(lowered):
    whole = "stem.0 (+2 layers)"
    assert lowered.at({"stem.0": 8}) == lowered.at({whole: 8}) != lowered.at({})
    assert lowered.graph.shapes({"stem.0": 8}) == lowered.graph.shapes({whole: 8})
    with pytest.raises(PlanError, match="must name each group once"):
        lowered.at({"stem.0": 8, whole: 8})
    with pytest.raises(PlanError, match=r"groups, found 'stem\.1'\. Try: one of 'stem\.0 \(\+2 layers\)'"):
        lowered.at({"stem.1": 8})
    for width in ("16", 16.0):
        with pytest.raises(PlanError, match=rf"must be a whole number, found {width!r}\. Try: 1 to"):
            lowered.at({whole: width})
    with pytest.raises(PlanError, match=r"must be a mapping .* found list\. Try: KernelGraph\.of_plan"):
        lowered.at([8])


def test_graphs_are_told_in_a_line(lowered):
    groups = len(lowered.graph.groups)
    assert repr(lowered.graph).startswith(f"ChannelGraph(DigitNet: {groups} groups with ")
    assert repr(lowered).endswith(f"{groups} channel groups, onnxruntime fp32, {lowered.architecture})")
    assert "\n" not in repr(lowered.graph) + repr(lowered)
