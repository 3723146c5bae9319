"""Int8 engines of a trained network with transposed convolutions: ONNX Runtime has no integer kernel for them."""

import random
from collections import Counter

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import edgeprune
from edgeprune.backends.onnxruntime import engines
from edgeprune.backends.onnxruntime.backend import OnnxRuntime
from edgeprune.backends.onnxruntime.int8_numbers import Int8Numbers
from edgeprune.backends.onnxruntime.quantizing import quantize
from edgeprune.deployment.compiling import compile as compile_artifact
from edgeprune.errors import CompileError
from edgeprune.lowering.trained_form import in_trained_form
from edgeprune.quickstart import digits
from edgeprune.surgery.plan import make_plan

EXAMPLE = torch.zeros(1, 1, 16, 16)


class Strokes(nn.Module):
    """Which pixels of a noisy digit are ink: down twice, up twice by transposed convolutions, with skip connections
    (Ronneberger et al., "U-Net", 2015, figure 1, with two levels)."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(1, 12, 3, padding=1), nn.Conv2d(12, 20, 3, 2, 1)
        self.three = nn.Conv2d(20, 28, 3, 2, 1)
        self.up_two, self.up_one = nn.ConvTranspose2d(28, 20, 2, 2), nn.ConvTranspose2d(20, 12, 2, 2)
        self.join_two, self.join_one = nn.Conv2d(40, 20, 3, padding=1), nn.Conv2d(24, 12, 3, padding=1)
        self.out = nn.Conv2d(12, 1, 1)

    def forward(self, x):
        one = torch.relu(self.one(x))
        two = torch.relu(self.two(one))
        x = torch.relu(self.three(two))
        x = torch.relu(self.join_two(torch.cat([torch.relu(self.up_two(x)), two], 1)))
        x = torch.relu(self.join_one(torch.cat([self.up_one(x), one], 1)))
        return self.out(x)


def loss(outputs, targets):
    return nn.functional.binary_cross_entropy_with_logits(outputs, targets)


def overlap(outputs, targets):
    """Intersection over union of the ink."""
    found, there = outputs > 0, targets > 0.5
    return float((found & there).sum() / (found | there).sum())


@pytest.fixture(scope="module")
def trained():
    """The network after two epochs on the digits of scikit-learn, and its task."""
    data = digits.load()
    dice = torch.Generator().manual_seed(0)

    def batches(split):
        images, _ = digits.resized(split, 16)
        noisy = images + 0.7 * torch.randn(images.shape, generator=dice)
        return list(zip(noisy.split(50), (images > 0).float().split(50), strict=True))

    train, validation = batches(data.train), batches(data.validation)
    torch.manual_seed(0)
    net = Strokes()
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(2):
        for images, targets in train:
            optimizer.zero_grad()
            loss(net(images), targets).backward()
            optimizer.step()
    return net.eval(), edgeprune.Task.single(train=train, validation=validation, loss=loss, metric=overlap, name="ink")


def transposed(model):
    return [node for node in model.graph.node if node.op_type == "ConvTranspose"]


def test_they_stay_in_float_and_the_network_finds_as_much(trained, tmp_path):
    net, task = trained
    artifact = compile_artifact(net, EXAMPLE, tmp_path / "int8", precision="int8", task=task)
    told, metric = artifact.manifest.quantization, artifact.manifest.metrics["ink"]
    assert (told["layers"], told["no_kernel"]) == (8, ["up_two", "up_one"])
    assert set(told["no_kernel"]) <= set(told["kept"]) < {name for name, _ in net.named_children()}
    assert metric["module"] > 0.7, "untrained"
    assert metric["engine"] >= metric["worst"]
    weights = {tensor.name: tensor.data_type for tensor in onnx.load(str(artifact.engine)).graph.initializer}
    layers = transposed(onnx.load(str(artifact.engine)))
    assert [weights[node.input[1]] for node in layers] == [onnx.TensorProto.FLOAT] * 2
    # Nothing is dequantized at each inference that could have been stored as it is needed.
    model = engines.optimized(artifact.engine, "ALL")
    constants = {tensor.name for tensor in model.graph.initializer}
    assert not [node for node in model.graph.node if node.op_type == "DequantizeLinear" and node.input[0] in constants]


def test_quantized_they_would_be_dequantized_and_run_in_float(trained, tmp_path, monkeypatch):
    """What makes the rule right, asked of the runtime that is installed here."""
    net, task = trained
    OnnxRuntime().export(net, (EXAMPLE,), tmp_path / "float.onnx")
    cases = [(image[None].numpy(),) for image in task.objectives[0].train[0][0][:8]]
    monkeypatch.setattr(Int8Numbers, "in_float", frozenset())
    found = quantize(tmp_path / "float.onnx", cases, tmp_path / "int8.onnx", needed_db=5, numbers=Int8Numbers.of_host())
    assert (found.kept, found.no_kernel) == ((), ())
    model = engines.optimized(tmp_path / "int8.onnx", "ALL")
    makers = {name: node for node in model.graph.node for name in node.output}
    for node in transposed(model):
        assert node.domain == ""
        assert [makers[name].op_type for name in node.input[:2]] == ["DequantizeLinear"] * 2


def test_tensorrt_takes_them_in_int8(trained, tmp_path):
    net, task = trained
    OnnxRuntime().export(net, (EXAMPLE,), tmp_path / "float.onnx")
    cases = [(image[None].numpy(),) for image in task.objectives[0].train[0][0][:8]]
    found = quantize(
        tmp_path / "float.onnx", cases, tmp_path / "int8.onnx", needed_db=5, numbers=Int8Numbers.of_tensorrt()
    )
    assert (found.kept, found.no_kernel) == ((), ())
    model = onnx.load(str(tmp_path / "int8.onnx"))
    makers = {name: node.op_type for node in model.graph.node for name in node.output}
    assert [makers[node.input[1]] for node in transposed(model)] == ["DequantizeLinear"] * 2


def test_lowering_says_what_the_quantized_cut_network_executes(trained, tmp_path):
    net, _ = trained
    lowered = edgeprune.lower(edgeprune.trace(net, EXAMPLE), precision="int8")
    dice = random.Random(1)
    widths = {one.name: dice.randint(2, one.size) for one in lowered.graph.groups}
    cut = edgeprune.apply(net, make_plan(lowered.graph, {name: range(width) for name, width in widths.items()}))
    lowered.backend.export(in_trained_form(cut), lowered.graph.example_inputs, tmp_path / "cut.onnx")
    executed = Counter(lowered.backend.parse_engine(tmp_path / "cut.onnx"))
    assert Counter(lowered.at(widths)) == executed
    assert {kernel.precision for kernel in executed if kernel.op == "ConvTranspose"} == {"fp32"}
    (tmp_path / "timed.onnx").write_bytes(lowered.network_engine(widths))
    timed = Counter(lowered.backend.parse_engine(tmp_path / "timed.onnx"))
    # The runtime looks at the graph once more: what a skip connection brings to a float concatenation is transposed after
    # it is quantized again, and not before.
    assert {kernel.op for kernel in (timed - executed) + (executed - timed)} <= {"Transpose", "QuantizeLinear"}
    assert Counter(kernel.op for kernel in timed.elements()) == Counter(kernel.op for kernel in executed.elements())


def test_a_network_of_nothing_else_is_refused(tmp_path):
    net = nn.Sequential(nn.ConvTranspose2d(2, 3, 2, 2), nn.ReLU()).eval()
    backend = OnnxRuntime(precision="int8").calibrated([(np.zeros((1, 2, 4, 4), np.float32),)] * 4, needed_db=5)
    with pytest.raises(
        CompileError, match="hold weights, found only ConvTranspose, which the runtime computes in float"
    ):
        backend.export(net, (torch.zeros(1, 2, 4, 4),), tmp_path / "int8.onnx")
