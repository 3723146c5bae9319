"""Lowering in int8: for random plans, `at(widths)` is what the runtime executes for the cut model when it is quantized."""

from __future__ import annotations

import random
from collections import Counter

import onnx
import pytest
import torch
from torch import nn

import edgeprune
from edgeprune.allocation.resources import MultiplyAccumulates
from edgeprune.backends.onnxruntime import engines
from edgeprune.backends.onnxruntime.backend import OnnxRuntime
from edgeprune.backends.onnxruntime.int8_numbers import Int8Numbers
from edgeprune.backends.onnxruntime.operators import base
from edgeprune.errors import CompileError, ConfigError, UnsupportedKernelError
from edgeprune.lowering.trained_form import in_trained_form
from edgeprune.surgery.plan import make_plan

X = torch.zeros(1, 3, 16, 16)


class Net(nn.Module):
    """A residual branch, a depthwise convolution, pools, a gate, a concatenation, what stays in float, and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 24, 3, padding=1), nn.BatchNorm2d(24)
        self.body, self.end = nn.Conv2d(24, 32, 3, padding=1, bias=False), nn.Conv2d(32, 24, 1)
        self.depthwise, self.point = nn.Conv2d(24, 24, 3, padding=1, groups=24), nn.Conv2d(24, 40, 1)
        self.gate = nn.Conv2d(40, 40, 1)
        self.side = nn.Conv2d(40, 16, 1)
        self.pool, self.up = nn.MaxPool2d(2), nn.ConvTranspose2d(56, 20, 2, stride=2)
        self.hidden, self.head = nn.Linear(20, 28), nn.Linear(28, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(x + self.end(torch.relu(self.body(x))))
        x = nn.functional.hardswish(self.point(self.pool(nn.functional.relu6(self.depthwise(x)))))
        x = x * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True)))
        x = self.up(torch.cat([x, self.side(x)], 1))
        return self.head(torch.relu(self.hidden(x.mean((2, 3)))))


class Bytes(nn.Module):
    """A model that takes an image of bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.stem(x.float() / 255)).mean((2, 3))


@pytest.fixture(scope="module")
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def graph(net):
    return edgeprune.trace(net, X)


@pytest.fixture(scope="module")
def lowered(graph):
    return edgeprune.lower(graph, precision="int8")


def drawn(graph, seed):
    dice = random.Random(seed)
    return {group.name: dice.randint(max(2, group.size // 8), group.size) for group in graph.groups}


def keys(kernels):
    return Counter(kernel.key for kernel in kernels)


@pytest.mark.parametrize("seed", [None, 1])
def test_kernels_of_a_candidate_are_those_of_the_quantized_cut_model(net, lowered, tmp_path, seed):
    widths = {} if seed is None else drawn(lowered.graph, seed)
    plan = make_plan(lowered.graph, {name: range(width) for name, width in widths.items()}, allow_empty=True)
    cut = net if seed is None else edgeprune.apply(net, plan)
    lowered.backend.export(in_trained_form(cut), lowered.graph.example_inputs, tmp_path / "cut.onnx")
    executed = keys(lowered.backend.parse_engine(tmp_path / "cut.onnx"))
    assert keys(lowered.at(widths)) == executed
    # What is timed as a whole network, with meaningless weights, runs them too.
    (tmp_path / "timed.onnx").write_bytes(lowered.network_engine(widths))
    assert keys(lowered.backend.parse_engine(tmp_path / "timed.onnx")) == executed


def test_layers_are_in_int8_and_what_the_runtime_leaves_in_float_says_so(lowered):
    kernels = lowered.at({})
    by_precision = {
        precision: {base(kernel.op) for kernel in kernels if kernel.precision == precision}
        for precision in ("int8", "fp32")
    }
    assert {"QLinearConv", "QLinearAdd", "QuantizeLinear", "DequantizeLinear", "QGemm"} <= by_precision["int8"]
    assert by_precision["fp32"]
    assert not any(name.startswith("Q") for name in by_precision["fp32"])
    first = next(kernel for kernel in kernels if base(kernel.op) == "QLinearConv")
    # As of every convolution: channels first, whatever lies in memory.
    assert (first.inputs, first.output, first.attribute("channels_last")) == (((1, 3, 16, 16),), (1, 24, 16, 16), 1)


@pytest.mark.parametrize("architecture", ["x86_64", "aarch64"])
def test_each_kernel_runs_alone_as_itself_in_the_numbers_of_the_processor(lowered, architecture):
    backend = OnnxRuntime(precision="int8", numbers=Int8Numbers.of(architecture, ["avx512_vnni"]))
    wanted = onnx.TensorProto.UINT8 if architecture == "x86_64" else onnx.TensorProto.INT8
    types = set()
    for kernel in lowered.at(drawn(lowered.graph, 4)):
        found = engines.optimized(backend.kernel_engine(kernel), "BASIC").graph
        assert [node.op_type for node in found.node] == [base(kernel.op)]
        if kernel.precision == "int8" and kernel.attribute("constant") is None:
            types |= {value.type.tensor_type.elem_type for value in (*found.input, *found.output)}
    assert types == {wanted, onnx.TensorProto.FLOAT}


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_what_turns_bytes_into_floats_is_no_int8_arithmetic(precision, tmp_path):
    image = torch.randint(0, 255, (1, 3, 16, 16), dtype=torch.uint8)
    lowered = edgeprune.lower(edgeprune.trace(Bytes().eval(), image), precision=precision)
    kernels = lowered.at({})
    casts = [kernel for kernel in kernels if kernel.op == "Cast"]
    assert [kernel.precision for kernel in casts] == ["fp32"]
    assert any(kernel.precision == "int8" for kernel in kernels) == (precision == "int8")
    assert engines.optimized(lowered.backend.kernel_engine(casts[0]), "BASIC").graph.node[0].op_type == "Cast"
    (tmp_path / "timed.onnx").write_bytes(lowered.network_engine({}))
    assert keys(lowered.backend.parse_engine(tmp_path / "timed.onnx")) == keys(kernels)


def test_multiply_accumulates_are_those_of_the_float_model(graph, lowered):
    widths = drawn(graph, 5)
    floating = edgeprune.lower(graph)
    # The transposed convolution is none that is counted, in either.
    assert MultiplyAccumulates(lowered).value(widths) == MultiplyAccumulates(floating).value(widths)


def test_what_is_not_known_of_int8_is_refused(graph, lowered):
    with pytest.raises(ConfigError, match="precision of onnxruntime must be one of fp32, int8, found 'fp16'"):
        edgeprune.lower(graph, precision="fp16")
    assert lowered.graph.branches
    assert lowered.removable == ()
    with pytest.raises(UnsupportedKernelError, match="a removed branch must be in fp32"):
        lowered.at(dict.fromkeys(lowered.graph.branches[0].groups, 0))
    with pytest.raises(CompileError, match="int8 needs a model with convolutions or linear layers"):
        edgeprune.lower(edgeprune.trace(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), X), precision="int8")
    with pytest.raises(ConfigError, match="int8 engines need calibration data"):
        OnnxRuntime(precision="int8").export(nn.Linear(3, 3), (torch.zeros(1, 3),), None)
