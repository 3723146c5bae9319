"""The law of lowering for convolutional networks as people build them: pyramids, dense blocks, hard swish, channels last."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import edgeprune
from edgeprune.lowering.trained_form import in_trained_form
from edgeprune.surgery.plan import make_plan


class Pyramid(nn.Module):
    """Upsampling by a factor and to a size, to the nearest and linearly."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 64, 3, 2, 1)
        self.fine, self.coarse = nn.Conv2d(32, 48, 1), nn.Conv2d(64, 48, 1)
        self.smooth, self.head = nn.Conv2d(48, 16, 3, padding=1), nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        y = F.interpolate(self.coarse(F.relu(self.down(x))), scale_factor=2.0, mode="nearest")
        y = self.smooth(self.fine(x) + y)
        return self.head(F.interpolate(y, size=(32, 32), mode="bilinear", align_corners=False))


class ChannelsLast(nn.Module):
    """A block of ConvNeXt: a depthwise convolution, then norm and linear layers over the last axis."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(width, width, 7, padding=3, groups=width), nn.LayerNorm(width)
        self.widen, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + (self.narrow(F.gelu(self.widen(y))) * self.gamma).permute(0, 3, 1, 2)


class Next(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            *(nn.Conv2d(3, 32, 4, 4), ChannelsLast(32), ChannelsLast(32), nn.Conv2d(32, 64, 2, 2), ChannelsLast(64)),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 5)),
        )


class Dense(nn.Module):
    """Norms behind concatenations, which no convolution takes in."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)
        self.layers = nn.ModuleList(self.layer(width) for width in (32, 48, 64))
        self.transition = nn.Sequential(nn.BatchNorm2d(80), nn.ReLU(), nn.Conv2d(80, 32, 1), nn.AvgPool2d(2))
        self.head = nn.Linear(32, 5)

    @staticmethod
    def layer(width: int) -> nn.Module:
        return nn.Sequential(
            *(nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 32, 1, bias=False)),
            *(nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 16, 3, padding=1, bias=False)),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return self.head(self.transition(x).mean((2, 3)))


class Mobile(nn.Module):
    """Hard swish, a gate, ReLU6 and swish."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.widen = self.layer(3, 16, 3, 2), self.layer(16, 64, 1)
        self.depthwise = self.layer(64, 64, 3, groups=64)
        self.gate = nn.Sequential(
            *(nn.AdaptiveAvgPool2d(1), nn.Conv2d(64, 16, 1), nn.ReLU(), nn.Conv2d(16, 64, 1), nn.Hardsigmoid())
        )
        self.narrow, self.again = nn.Conv2d(64, 16, 1), self.layer(16, 64, 1, activation=nn.ReLU6)
        self.strided, self.last = self.layer(64, 64, 5, 2, 64, nn.SiLU), nn.Conv2d(64, 32, 1)
        self.head = nn.Linear(32, 5)

    @staticmethod
    def layer(
        inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, activation: type = nn.Hardswish
    ) -> nn.Module:
        conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(outputs), activation())

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.depthwise(self.widen(x))
        x = x + self.narrow(y * self.gate(y))
        return self.head(self.last(self.strided(self.again(x))).mean((2, 3)))


class Transposed(nn.Module):
    """Upsampling by a transposed convolution, a concatenation, activations that stay by themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 32, 3, 2, 1), nn.Conv2d(32, 64, 3, 2, 1)
        self.up, self.join = nn.ConvTranspose2d(64, 32, 2, 2), nn.Conv2d(64, 32, 3, padding=1)
        self.slope, self.head = nn.PReLU(32), nn.Conv2d(32, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        one = F.leaky_relu(self.one(x), 0.1)
        two = self.up(F.elu(self.two(one)))
        return self.head(self.slope(self.join(torch.cat([two, one], 1))))


@pytest.fixture(scope="module", params=[Pyramid, Next, Dense, Mobile, Transposed])
def lowered(request, tmp_path_factory):
    torch.manual_seed(0)
    model = request.param().eval()
    graph = edgeprune.trace(model, torch.randn(1, 3, 32, 32))
    return model, edgeprune.lower(graph, workdir=tmp_path_factory.mktemp(request.param.__name__))


def random_widths(graph, seed, step):
    """At least two units: a vector of one element is written into the operator, and is no input any more."""
    generator = torch.Generator().manual_seed(seed)
    return {
        group.name: min(
            group.size,
            max(2, step * int(torch.randint(1, max(2, group.size // step + 1), (), generator=generator))),
        )
        for group in graph.groups
    }


@pytest.mark.parametrize(("seed", "step"), [(0, 1), (1, 2), (2, 4), (3, 16)])
def test_kernels_of_a_candidate_are_those_of_the_cut_model(lowered, tmp_path, seed, step):
    model, kernels = lowered
    widths = random_widths(kernels.graph, seed, step)
    plan = make_plan(kernels.graph, {name: range(width) for name, width in widths.items()})
    engine = tmp_path / "cut.onnx"
    kernels.backend.export(in_trained_form(edgeprune.apply(model, plan)), kernels.graph.example_inputs, engine)
    real = Counter(kernel.key for kernel in kernels.backend.parse_engine(engine))
    assert Counter(kernel.key for kernel in kernels.at(widths)) == real


def test_every_kernel_runs_alone_and_gives_its_shape(lowered):
    _, kernels = lowered
    for kernel in dict.fromkeys(kernels.at(random_widths(kernels.graph, 5, 2))):
        session = onnxruntime.InferenceSession(kernels.backend.kernel_engine(kernel))
        (output,) = session.run(None, {value.name: np.zeros(value.shape, np.float32) for value in session.get_inputs()})
        assert output.shape == kernel.output
