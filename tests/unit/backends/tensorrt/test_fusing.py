"""Groups of operators against the layers of engines that were recorded: *replayed*, and no more than these were looked at."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxruntime")

from torch import nn  # noqa: E402 (after the skips)

from edgeprune.backends._base import Operator, OperatorGraph  # noqa: E402
from edgeprune.backends.tensorrt import exports, fusing  # noqa: E402
from edgeprune.backends.tensorrt.backend import TensorRt  # noqa: E402
from edgeprune.backends.tensorrt.layer_times import BuiltLayer, group_times  # noqa: E402
from edgeprune.spec import TensorSpec  # noqa: E402


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = (
            nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
            if stride > 1
            else None
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(out + (x if self.downsample is None else self.downsample(x)))


def resnet18() -> nn.Module:
    """As wide as the recorded one, on small images: widths do not matter, and wiring does."""
    widths = (64, 64, 128, 128, 256, 256, 512, 512)
    blocks, inputs = [], 64
    for number, width in enumerate(widths):
        blocks.append(Block(inputs, width, 2 if number in (2, 4, 6) else 1))
        inputs = width
    stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10)).eval()


def alexnet() -> nn.Module:
    def conv(inputs: int, outputs: int, size: int, stride: int = 1) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, size, stride, size // 2), nn.ReLU()]

    return nn.Sequential(
        *conv(3, 8, 11, 4),
        nn.MaxPool2d(3, 2),
        *conv(8, 16, 5),
        nn.MaxPool2d(3, 2),
        *(*conv(16, 24, 3), *conv(24, 16, 3), *conv(16, 16, 3)),
        nn.MaxPool2d(3, 2),
        nn.Flatten(),
        *(nn.Linear(144, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10)),
    ).eval()


class Inverted(nn.Module):
    """A block of MobileNetV2."""

    def __init__(self, inputs: int, outputs: int, stride: int, wider: int) -> None:
        super().__init__()
        inner = inputs * wider
        first = [nn.Conv2d(inputs, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.ReLU6()] if wider > 1 else []
        self.conv = nn.Sequential(
            *first,
            *(nn.Conv2d(inner, inner, 3, stride, 1, groups=inner, bias=False), nn.BatchNorm2d(inner), nn.ReLU6()),
            *(nn.Conv2d(inner, outputs, 1, bias=False), nn.BatchNorm2d(outputs)),
        )
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(x) if self.shortcut else self.conv(x)


def mobilenet_v2() -> nn.Module:
    """With the published numbers of blocks, their strides and where they grow, on a quarter of the channels."""
    stages = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
    blocks: list[nn.Module] = [nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6()]
    inputs = 8
    for wider, channels, count, stride in stages:
        for number in range(count):
            blocks.append(Inverted(inputs, channels // 4, stride if number == 0 else 1, wider))
            inputs = channels // 4
    blocks += [nn.Conv2d(inputs, 320, 1, bias=False), nn.BatchNorm2d(320), nn.ReLU6()]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(320, 10)).eval()


@pytest.fixture(scope="module")
def lowered(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Callable[[], nn.Module], int], OperatorGraph]:
    """Operators of a network for images of a size."""

    @cache
    def made(model: Callable[[], nn.Module], size: int) -> OperatorGraph:
        backend, path = TensorRt(), tmp_path_factory.mktemp("lowered") / "model.onnx"
        backend.export_source(model(), (torch.zeros(1, 3, size, size),), path)
        return backend.operators(path)

    return made


def kinds(nodes: list[str]) -> list[str]:
    """Operations of nodes as their recorded names end, but for what two exporters call otherwise."""
    return [node.rpartition("/")[2].partition("_")[0].replace("Global", "") for node in nodes]


@pytest.mark.parametrize(
    ("name", "model", "size", "count"),
    [
        ("resnet18", resnet18, 64, 23),
        ("alexnet", alexnet, 128, 11),
        pytest.param("mobilenet_v2", mobilenet_v2, 64, 54, marks=pytest.mark.slow),
    ],
)
def test_groups_are_the_layers_of_a_recorded_engine(recorded, lowered, name, model, size, count) -> None:
    graph = lowered(model, size)
    ops = {operator.name: operator.op for operator in graph.operators}
    found = [
        sorted(ops[one].replace("ReduceMean", "AveragePool").replace("Global", "") for one in group)
        for group in fusing.groups(graph)
    ]
    layers = exports.read_layers(recorded(f"{name}.layers.json"))
    wanted = [sorted(kinds(list(layer.nodes))) for layer in layers if layer.nodes]
    # TensorRT moves the view before a product in a layer of its own, for its tensor is in another layout: one group here.
    without_views = [[kind for kind in group if kind not in ("Flatten", "Reshape")] for group in wanted]
    ours = [[kind for kind in group if kind not in ("Flatten", "Reshape")] for group in found]
    assert Counter(map(tuple, ours)) == Counter(tuple(group) for group in without_views if group)
    assert len(ours) == count


def test_all_the_time_of_a_recorded_engine_goes_to_its_groups(recorded, lowered) -> None:
    graph = lowered(resnet18, 64)
    groups = fusing.groups(graph)
    layers = exports.read_layers(recorded("resnet18.layers.json"))
    profile = exports.read_profile(recorded("resnet18.profile.json"))
    # The nodes of the recorded network are those of ours, in the order of each operation.
    ours: dict[str, list[str]] = {}
    for operator in graph.operators:
        ours.setdefault(operator.op.replace("ReduceMean", "AveragePool").replace("Global", ""), []).append(
            operator.name
        )
    theirs: dict[str, list[str]] = {}
    for layer in layers:
        for node in layer.nodes:
            theirs.setdefault(kinds([node])[0], []).append(node)
    # Relu of a block's end stands with the block's last convolution in the recording, in both orders alike.
    renamed = {node: own for kind, nodes in theirs.items() for node, own in zip(nodes, ours[kind], strict=True)}
    built = [BuiltLayer(layer.name, tuple(renamed[node] for node in layer.nodes)) for layer in layers]
    timed = [(row.name, row.average_ms) for row in profile.rows]
    times = group_times(built, timed, groups)
    assert len(times) == len(groups) == 23
    # Only what generated code calls for shapes belongs to nothing: 2 us of 366.
    assert sum(times.values()) == pytest.approx(sum(ms for _, ms in timed), rel=0.01)
    # The copy of the input into another layout is there for the first convolution.
    assert times[0] == pytest.approx(0.0288488 + 0.00800422)


def wired(*operators: tuple[str, str, str]) -> OperatorGraph:
    """Operators as (operation, inputs, output) over tensors of one shape, the last of which leaves."""
    made = tuple(
        Operator(f"n{number}", op, tuple(inputs.split()), (output,), ())
        for number, (op, inputs, output) in enumerate(operators)
    )
    names = {name for one in made for name in (*one.inputs, *one.outputs)}
    return OperatorGraph(
        made,
        (TensorSpec("x", (1, 8, 4, 4), "float32"),),
        (made[-1].outputs[0],),
        dict.fromkeys(names, (1, 8, 4, 4)),
        {},
    )


@pytest.mark.parametrize(
    ("operators", "groups"),
    [
        # A gated activation is one value by the time it leaves.
        ([("Conv", "x", "a"), ("Sigmoid", "a", "b"), ("Mul", "a b", "c")], [("n0", "n1", "n2")]),
        # What is read elsewhere too ends the layer.
        (
            [("Conv", "x", "a"), ("Relu", "a", "b"), ("Conv", "b", "c"), ("Add", "b c", "d")],
            [("n0", "n1"), ("n2", "n3")],
        ),
        ([("MaxPool", "x", "a"), ("Relu", "a", "b"), ("Neg", "b", "c")], [("n0",), ("n1", "n2")]),
        # Of two branches the later convolution takes the sum.
        (
            [("Conv", "x", "a"), ("Conv", "x", "b"), ("Add", "a b", "c"), ("Relu", "c", "d")],
            [("n0",), ("n1", "n2", "n3")],
        ),
        # A view goes with what reads it, or with what it is of.
        (
            [("Relu", "x", "a"), ("Reshape", "a", "b"), ("Conv", "b", "c"), ("Flatten", "c", "d")],
            [("n0",), ("n2", "n1", "n3")],
        ),
    ],
)
def test_what_one_layer_computes(operators: list[tuple[str, str, str]], groups: list[tuple[str, ...]]) -> None:
    assert fusing.groups(wired(*operators)) == groups


def test_what_is_computed_together_has_no_time_of_its_own() -> None:
    built = [
        BuiltLayer("conv", ("a",)),
        BuiltLayer("{ForeignNode[b...c]}", ("b", "c")),
        BuiltLayer("more of c", ("c",)),
        BuiltLayer("Reformatting CopyNode for Output Tensor 0 to conv", ()),
        BuiltLayer("Reformatting CopyNode for Input Tensor 0 to nobody", ()),
    ]
    timed = [
        ("conv", 1.0),
        ("{ForeignNode[b...c]}", 2.0),
        ("more of c", 3.0),
        (built[3].name, 0.5),
        (built[4].name, 9.0),
    ]
    assert group_times(built, timed, [("a",), ("b",), ("c",), ("d",)]) == {0: 1.5}
    # A layer that comes twice under one name has two times.
    twice = [BuiltLayer("conv", ("a",)), BuiltLayer("conv", ("d",))]
    assert group_times(twice, [("conv", 1.0), ("conv", 4.0)], [("a",), ("d",)]) == {0: 1.0, 1: 4.0}


def test_a_kernel_is_what_it_computes_at_its_widths(tmp_path: Path) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 5)
    ).eval()
    backend = TensorRt().for_precision("fp16")
    backend.export_source(model, (torch.zeros(1, 3, 8, 8),), tmp_path / "model.onnx")
    graph = backend.operators(tmp_path / "model.onnx")
    convolution, product = backend.layout_rule(graph, graph.shapes, "aarch64", ())
    assert (convolution.op, convolution.family, convolution.precision) == ("Conv+Relu", "conv", "fp16")
    assert (convolution.inputs, convolution.output) == (((1, 3, 8, 8),), (1, 8, 8, 8))
    assert convolution.attribute("activation") == "Relu"
    assert convolution.attribute("residual") is False
    # The view before a product is no kernel of its own.
    assert (product.op, product.inputs, product.output) == ("Gemm", ((1, 512),), (1, 5))
