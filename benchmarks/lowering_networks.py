"""Networks that cut channels up, for `lowering.py`: plain definitions with random weights."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn


def _conv(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1, act: bool = True) -> nn.Module:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU() if act else nn.Identity())


def _shuffled(x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    return x.view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(batch, channels, height, width)


class _Shuffle(nn.Module):
    """Ma et al., "ShuffleNet V2", 2018, figure 3: half of the channels stay; with a stride both sides are computed."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        half, self.down = outputs // 2, stride > 1
        source = inputs if self.down else half
        self.branch = nn.Sequential(
            _conv(source, half), _conv(half, half, 3, stride, half, act=False), _conv(half, half)
        )
        if self.down:
            self.side = nn.Sequential(_conv(inputs, inputs, 3, stride, inputs, act=False), _conv(inputs, half))

    def forward(self, x: Tensor) -> Tensor:
        if self.down:
            return _shuffled(torch.cat((self.side(x), self.branch(x)), 1))
        left, right = x.chunk(2, 1)
        return _shuffled(torch.cat((left, self.branch(right)), 1))


def _shufflenet() -> tuple[nn.Module, Tensor]:
    """Ma et al., 2018, table 5, 1x."""
    features: list[nn.Module] = [_conv(3, 24, 3, 2), nn.MaxPool2d(3, 2, 1)]
    channels = 24
    for outputs, count in ((116, 4), (232, 8), (464, 4)):
        for index in range(count):
            features.append(_Shuffle(channels, outputs, 1 if index else 2))
            channels = outputs
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1024, 100))
    return nn.Sequential(*features, _conv(channels, 1024), *head), torch.randn(1, 3, 96, 96)


class _Gated(nn.Module):
    """Dauphin et al., "Language Modeling with Gated Convolutional Networks", 2017, section 3, on images."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.both = nn.Conv2d(inputs, 2 * outputs, 3, stride, 1)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.both(x).chunk(2, 1)
        return value * torch.sigmoid(gate)


def _gated() -> tuple[nn.Module, Tensor]:
    widths = (3, 32, 64, 64, 128, 128)
    pairs = pairwise(widths)
    features = [_Gated(inputs, outputs, 1 if inputs == outputs else 2) for inputs, outputs in pairs]
    return nn.Sequential(*features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 100)), torch.randn(
        1, 3, 96, 96
    )


class _Attention(nn.Module):
    """Vaswani et al., 2017, with one projection for keys and values, or one of unequal parts for all three."""

    def __init__(self, width: int, heads: int, fused: bool) -> None:
        super().__init__()
        self.heads, self.fused, self.sizes = heads, fused, (width // 2, width // 2, width)
        self.query = nn.Identity() if fused else nn.Linear(width, width)
        self.rest = nn.Linear(width, sum(self.sizes) if fused else 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        if self.fused:
            parts = self.rest(x).split(self.sizes, -1)
        else:
            parts = (self.query(x), *self.rest(x).chunk(2, -1))
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).flatten(2))


class _Layer(nn.Module):
    """A transformer's layer with a gated MLP (Shazeer, "GLU Variants Improve Transformer", 2020, section 2)."""

    def __init__(self, width: int, heads: int, fused: bool) -> None:
        super().__init__()
        self.norm1, self.attention, self.norm2 = (
            nn.LayerNorm(width),
            _Attention(width, heads, fused),
            nn.LayerNorm(width),
        )
        self.wide, self.back = nn.Linear(width, 4 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        value, gate = self.wide(self.norm2(x)).chunk(2, -1)
        return x + self.back(value * nn.functional.gelu(gate))


class _Tokens(nn.Module):
    def __init__(self, width: int, heads: int, depth: int) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 16, 16)
        self.layers = nn.Sequential(*(_Layer(width, heads, bool(index % 2)) for index in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 100)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.layers(self.patch(x).flatten(2).transpose(1, 2))).mean(1))


CUT_UP: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "shufflenet": _shufflenet,
    "gated": _gated,
    "fused-projections": lambda: (_Tokens(96, 4, 4), torch.randn(1, 3, 96, 96)),
}
"""Name to a network and its example input at batch 1."""


def build(name: str) -> tuple[nn.Module, Tensor]:
    """A network in eval form and its example input."""
    torch.manual_seed(0)
    model, x = CUT_UP[name]()
    return model.eval(), x
