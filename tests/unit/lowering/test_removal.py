"""Kernels of a model without some of its residual branches are those that the runtime runs for the cut model."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import edgeprune
from edgeprune.errors import PlanError, UnsupportedKernelError
from edgeprune.lowering.removal import without_branches
from edgeprune.lowering.trained_form import in_trained_form
from edgeprune.surgery.plan import make_plan


class Basic(nn.Module):
    """Two convolutions; a wider block skips pixels and pads channels."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.wider = outputs - inputs
        self.conv1 = nn.Conv2d(inputs, outputs, 3, 2 if self.wider else 1, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.wider:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.wider // 2, self.wider // 2))
        return F.relu(inner + x)


class Inverted(nn.Module):
    """Of MobileNetV2: widened, depthwise, narrowed, no activation behind the sum."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = 2 * width
        self.layers = nn.Sequential(
            *(nn.Conv2d(width, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.ReLU6()),
            *(nn.Conv2d(inner, inner, 3, 1, 1, groups=inner, bias=False), nn.BatchNorm2d(inner), nn.ReLU6()),
            *(nn.Conv2d(inner, width, 1, bias=False), nn.BatchNorm2d(width)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)
        self.basic = nn.Sequential(Basic(32, 32), Basic(32, 64), Basic(64, 64))
        self.mobile = nn.Sequential(Inverted(64), Inverted(64))
        self.head = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mobile(self.basic(F.relu(self.bn(self.stem(x))))).mean((2, 3)))


@pytest.fixture(scope="module")
def lowered(tmp_path_factory):
    torch.manual_seed(0)
    model = Network().eval()
    graph = edgeprune.trace(model, torch.randn(1, 3, 32, 32))
    return model, edgeprune.lower(graph, workdir=tmp_path_factory.mktemp("network"))


def real_kernels(model, kernels, widths, folder):
    plan = make_plan(kernels.graph, {name: range(width) for name, width in widths.items()})
    engine = folder / "cut.onnx"
    kernels.backend.export(in_trained_form(edgeprune.apply(model, plan)), kernels.graph.example_inputs, engine)
    return Counter(kernel.key for kernel in kernels.backend.parse_engine(engine))


def test_every_branch_can_be_removed(lowered):
    _, kernels = lowered
    assert [branch.name for branch in kernels.removable] == [
        *("basic.0", "basic.1", "basic.2", "mobile.0.layers", "mobile.1.layers")
    ]


@pytest.mark.parametrize("places", [(0,), (1,), (2,), (3,), (4,), (0, 2), (1, 2, 4), (0, 1, 2, 3, 4)])
def test_kernels_without_branches_are_those_of_the_cut_model(lowered, tmp_path, places):
    model, kernels = lowered
    widths = {kernels.removable[place].groups[0]: 0 for place in places}
    expected = real_kernels(model, kernels, widths, tmp_path)
    assert Counter(kernel.key for kernel in kernels.at(widths)) == expected
    assert sum(expected.values()) < len(kernels.at({}))


@pytest.mark.parametrize("seed", range(4))
def test_so_they_are_where_what_is_left_is_narrower(lowered, tmp_path, seed):
    model, kernels = lowered
    dice = random.Random(seed)
    inside = [branch.groups[0] for branch in kernels.removable]
    sizes = kernels.graph.widths()
    # The others stay: on which side a shortcut is padded is told by the units that are left, not by how many.
    widths = {name: 16 * dice.randint(1, sizes[name] // 16) for name in inside} | dict.fromkeys(
        dice.sample(inside, 2), 0
    )
    assert Counter(kernel.key for kernel in kernels.at(widths)) == real_kernels(model, kernels, widths, tmp_path)


def test_a_network_engine_without_branches_runs_as_fast_as_it_says(lowered, tmp_path):
    """The engine for timing holds the same kernels as the candidate."""
    _, kernels = lowered
    widths = {kernels.removable[place].groups[0]: 0 for place in (0, 3)}
    engine = tmp_path / "network.onnx"
    engine.write_bytes(kernels.network_engine(widths))
    real = Counter(kernel.key for kernel in kernels.backend.parse_engine(engine))
    assert Counter(kernel.key for kernel in kernels.at(widths)) == real


def test_kernels_of_removed_branches_add_up(lowered):
    """What one branch costs does not hang on whether others are there: allocation sums them."""
    _, kernels = lowered
    names = [branch.groups[0] for branch in kernels.removable]
    dense = Counter(kernel.key for kernel in kernels.at({}))
    gone = {name: dense - Counter(kernel.key for kernel in kernels.at({name: 0})) for name in names}
    for one, two in itertools.combinations([names[0], names[2], names[4]], 2):
        both = dense - Counter(kernel.key for kernel in kernels.at({one: 0, two: 0}))
        assert sum(both.values()) == sum(gone[one].values()) + sum(gone[two].values())


def test_a_group_in_no_branch_is_refused(lowered):
    _, kernels = lowered
    outer = next(group.name for group in kernels.graph.groups if "stem" in group.name)
    with pytest.raises(PlanError, match="emptied group"):
        kernels.at({outer: 0})


def test_a_sum_that_the_runtime_fused_is_told(lowered):
    _, kernels = lowered
    branch = kernels.removable[0]
    operators = kernels.operators
    left = [one for one in operators.operators if operators.sources.get(one.outputs[0], "") != branch.addition]
    with pytest.raises(UnsupportedKernelError, match="must be an operation of its own"):
        without_branches(replace(operators, operators=tuple(left)), [branch])
