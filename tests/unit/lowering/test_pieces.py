"""The law of lowering where channels are cut up: chunk, split, narrow, slices, unbind, with parts that are pruned apart."""

from __future__ import annotations

import operator
import random
from collections import Counter

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import edgeprune
from edgeprune.backends._base import Operator, OperatorGraph
from edgeprune.backends.onnxruntime.engines import kernel_engine
from edgeprune.backends.onnxruntime.operators import resized
from edgeprune.backends.onnxruntime.pieces import split_settings
from edgeprune.backends.onnxruntime.shapes import inferred
from edgeprune.backends.onnxruntime.versions import OnnxVersions
from edgeprune.lowering.trained_form import in_trained_form
from edgeprune.spec import Kernel
from edgeprune.surgery.plan import make_plan


class ShuffleUnit(nn.Module):
    """Half of the channels stay, half are computed, both are interleaved (Ma et al., "ShuffleNet V2", 2018, figure 3c)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.branch = nn.Sequential(
            *(nn.Conv2d(half, half, 1, bias=False), nn.BatchNorm2d(half), nn.ReLU()),
            *(nn.Conv2d(half, half, 3, 1, 1, groups=half, bias=False), nn.BatchNorm2d(half)),
            *(nn.Conv2d(half, half, 1, bias=False), nn.BatchNorm2d(half), nn.ReLU()),
        )

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=1)
        x = torch.cat((left, self.branch(right)), dim=1)
        batch, channels, height, width = x.shape
        x = x.view(batch, 2, channels // 2, height, width).transpose(1, 2).contiguous()
        return x.view(batch, channels, height, width)


class Images(nn.Module):
    """Two shuffled units, three chunks of which each goes its own way and one is not read, a gate that is the other half."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.units = nn.Conv2d(3, 64, 3, 2, 1), nn.Sequential(ShuffleUnit(64), ShuffleUnit(64))
        self.four = nn.Conv2d(64, 96, 1)
        self.one, self.two, self.three = (nn.Conv2d(24, 16, 3, 1, 1) for _ in range(3))
        self.gated, self.head = nn.Conv2d(48, 80, 1), nn.Linear(40, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.units(torch.relu(self.stem(x)))
        a, b, _, d = self.four(x).chunk(4, 1)
        x = torch.cat([self.one(a), torch.tanh(self.two(b)), self.three(d)], 1)
        value, gate = self.gated(x).split(40, 1)
        return self.head((value * torch.sigmoid(gate)).mean((2, 3)))


class Tokens(nn.Module):
    """Keys and values of one layer, a layer of three unequal parts, slices one behind the other, two of one axis unbound."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.query, self.both = nn.Linear(12, 32), nn.Linear(32, 24), nn.Linear(32, 48)
        self.mixed, self.parts = nn.Linear(24, 32), nn.Linear(32, 64)
        self.small, self.large = nn.Linear(12, 4), nn.Linear(20, 4)
        self.first, self.second, self.third = nn.Linear(16, 32), nn.Linear(24, 32), nn.Linear(16, 32)
        self.pair = nn.Linear(32, 40)
        self.last = nn.Linear(20, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.words(x))
        key, value = self.both(x).chunk(2, -1)
        q, k, v = (part.unflatten(-1, (3, -1)).transpose(1, 2) for part in (self.query(x), key, value))
        y = ((q @ k.transpose(-2, -1)).softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + self.mixed(y)
        one, two, three = self.parts(x).split([16, 24, 16, 8], -1)[:3]
        x = x + self.first(one) * self.second(torch.relu(two)).sigmoid() + self.third(three)
        wide = self.parts(torch.tanh(x))
        x = x + self.first(wide.narrow(-1, 0, 16)) + self.second(wide[..., 16:40])
        left, right = self.pair(x).unflatten(-1, (2, 20)).unbind(-2)
        small, large = torch.relu(self.last(left * right)).tensor_split([12], -1)
        return (self.small(small) + self.large(large)).mean(1)


NETS = {"images": (Images, torch.randn(1, 3, 16, 16)), "tokens": (Tokens, torch.randn(1, 5, 12))}


@pytest.fixture(scope="module", params=NETS)
def lowered(request, tmp_path_factory):
    torch.manual_seed(0)
    make, x = NETS[request.param]
    model = make().eval()
    return model, edgeprune.lower(
        edgeprune.trace(model, x), model=model, workdir=tmp_path_factory.mktemp(request.param)
    )


def drawn(graph, seed):
    """Every group another share; one seed in two without any multiple of four, which no blocked convolution reads."""
    dice = random.Random(seed)
    return {group.name: max(1, dice.randint(group.size // 4, group.size) | seed % 2) for group in graph.groups}


def halved(graph):
    """The parts stay alike."""
    return {group.name: (group.size + 1) // 2 for group in graph.groups}


def executed_by(kernels, engine):
    return Counter(kernel.key for kernel in kernels.backend.parse_engine(engine))


def test_dense_kernels_are_those_of_the_dense_engine(lowered):
    _, kernels = lowered
    assert Counter(kernel.key for kernel in kernels.at({})) == executed_by(kernels, kernels.dense_engine)


@pytest.mark.parametrize("widths", [halved, lambda graph: drawn(graph, 1)])
def test_kernels_of_a_candidate_are_those_of_the_cut_model(lowered, tmp_path, widths):
    model, kernels = lowered
    widths = {name: min(width, kernels.graph.group(name).size) for name, width in widths(kernels.graph).items()}
    plan = make_plan(kernels.graph, {name: range(width) for name, width in widths.items()}, allow_empty=True)
    kernels.backend.export(
        in_trained_form(edgeprune.apply(model, plan)), kernels.graph.example_inputs, tmp_path / "cut.onnx"
    )
    predicted = Counter(kernel.key for kernel in kernels.at(widths))
    executed = executed_by(kernels, tmp_path / "cut.onnx")
    left, right = (sorted((a - b).elements()) for a, b in ((predicted, executed), (executed, predicted)))
    assert predicted == executed, "\n".join([str(widths), *left, "instead of", *right])
    (tmp_path / "timed.onnx").write_bytes(kernels.network_engine(widths))
    assert executed_by(kernels, tmp_path / "timed.onnx") == predicted


def test_parts_have_widths_of_their_own(lowered):
    """What the test above compares are splits into unequal parts, and not only some that stayed alike."""
    _, kernels = lowered
    splits = [kernel for kernel in kernels.at(drawn(kernels.graph, 0)) if kernel.op == "Split"]
    assert any(len(set(kernel.attribute("operand1", ()))) > 1 for kernel in splits)


def test_every_part_is_joined_to_the_node_that_reads_it_out(lowered):
    _, kernels = lowered
    program = {node.name: node for node in kernels.graph.program.graph.nodes}
    joined = 0
    for split in (one for one in kernels.operators.operators if one.op == "Split"):
        nodes = {
            place: program.get(kernels.operators.sources.get(name, "")) for place, name in enumerate(split.outputs)
        }
        parts = {place: node for place, node in nodes.items() if node is not None and node.target is operator.getitem}
        assert {place: node.args[1] for place, node in parts.items()} == {place: place for place in parts}
        assert len({node.args[0] for node in parts.values()}) <= 1
        joined += len(parts)
    assert joined >= 4
    splits = [kernel.origin for kernel in kernels.at({}) if kernel.op == "Split"]
    assert any(len(origin) > 1 for origin in splits), "who needs any part needs the split"


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        ({"x": (1, 10), "a": (1, 3), "b": (1, 5)}, {"c": (1, 2)}),
        ({"a": (1, 3), "b": (1, 5), "c": (1, 2)}, {"x": (1, 10)}),
        ({"x": (1, 24)}, {"a": (1, 8), "b": (1, 8), "c": (1, 8)}),
        ({"x": (1, 12)}, {"a": (1, 4), "b": (1, 4), "c": (1, 4)}),
        ({"x": (1, 10)}, None),
        ({"x": (1, 12), "a": (1, 4)}, None),
        ({"a": (1, 4), "b": (1, 4)}, None),
    ],
)
def test_parts_follow_from_the_whole_and_from_each_other(known, expected):
    split = Operator("n", "Split", ("x",), ("a", "b", "c"), (("axis", 1), ("num_outputs", 3)))
    dense = {"x": (1, 24), "a": (1, 8), "b": (1, 8), "c": (1, 8)}
    assert inferred(split, dense, known) == expected


def sliced(name, begin, end):
    places = {"operand1": (begin,), "operand2": (end,), "operand3": (-1,), "operand4": (1,)}
    return Operator(name, "Slice", ("x",), (name,), tuple(places.items()))


@pytest.mark.parametrize(
    ("pieces", "left", "sizes", "expected"),
    [
        ([(0, 8), (8, 20), (20, 2**63 - 1)], 12, [3, 5, 4], [(0, 3), (3, 8), (8, 2**63 - 1)]),
        ([(8, 32), (0, 8)], 12, [5, 7], [(7, 32), (0, 7)]),
        ([(8, 20), (-12, 32)], 13, [5, 4], [(8, 20), (9, 32)]),
        ([(0, 20), (8, 32)], 32, [20, 24], [(0, 20), (8, 32)]),
    ],
)
def test_a_slice_begins_behind_those_in_front_of_it(pieces, left, sizes, expected):
    """In the third case what lies in front of the first is not there, so they stay, or end where the channels do."""
    slices = [sliced(f"y{place}", *piece) for place, piece in enumerate(pieces)]
    dense = {one.name: (1, len(range(32)[slice(*piece)])) for one, piece in zip(slices, pieces, strict=True)}
    graph = OperatorGraph(tuple(slices), (), (), {"x": (1, 32), **dense}, {})
    shapes = {"x": (1, left), **{one.name: (1, size) for one, size in zip(slices, sizes, strict=True)}}
    moved = [resized(one, graph, shapes) for one in slices]
    assert [(one["operand1"][0], one["operand2"][0]) for one in moved] == expected


@pytest.mark.parametrize("sizes", [(4, 4, 4), (2, 7, 3)])
def test_a_split_has_one_text_and_runs_in_every_opset(sizes):
    attributes = split_settings({"axis": 1, "num_outputs": 3}, sizes)
    assert attributes == split_settings({"axis": 1, "operand1": sizes}, sizes)
    kernel = Kernel("Split", "concat", ((1, 12),), (1, sizes[0]), tuple(sorted(attributes.items())))
    session = onnxruntime.InferenceSession(kernel_engine(kernel, OnnxVersions(15, 8)))
    assert [part.shape for part in session.run(None, {"input0": np.zeros((1, 12), np.float32)})] == [
        (1, n) for n in sizes
    ]
