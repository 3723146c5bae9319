"""Steps on images for random networks.

A step is made by a function of the width so far; what else there is to choose, dice decide.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

Tensor = torch.Tensor
Dice = random.Random


class Step(nn.Module):
    """A function of a tensor and of layers with names."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


class Scale(nn.Module):
    """One factor per channel, a parameter that no layer owns."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(*shape) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


def conv(dice: Dice, inputs: int, outputs: int, groups: int = 1) -> nn.Conv2d:
    size = dice.choice([1, 3])
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, groups=groups, bias=dice.random() < 0.7)


def activation(dice: Dice, width: int) -> nn.Module:
    return dice.choice([nn.ReLU(), nn.GELU(), nn.SiLU(), nn.Hardswish(), nn.PReLU(width), nn.ELU()])


def _divisor(dice: Dice, width: int) -> int:
    return dice.choice([size for size in (1, 2, 3, 4) if width % size == 0])


# Steps on images


def _conv(dice: Dice, w: int) -> tuple[Step, int]:
    outputs = dice.choice([4, 6, 8, 12])
    return Step(lambda s, x: s.b(s.a(x)), a=conv(dice, w, outputs), b=activation(dice, outputs)), outputs


def _residual(dice: Dice, w: int) -> tuple[Step, int]:
    return Step(lambda s, x: x + s.c(s.b(s.a(x))), a=conv(dice, w, 6), b=activation(dice, 6), c=conv(dice, 6, w)), w


def _concat(dice: Dice, w: int) -> tuple[Step, int]:
    behind = dice.random() < 0.5
    return Step(lambda s, x: torch.cat([x, s.a(x)] if behind else [s.a(x), x], 1), a=conv(dice, w, 4)), w + 4


def _depthwise(dice: Dice, w: int) -> tuple[Step, int]:
    outputs = dice.choice([w, w, 2 * w])
    return Step(lambda s, x: s.a(x), a=conv(dice, w, outputs, w)), outputs


def _grouped(dice: Dice, w: int) -> tuple[Step, int]:
    groups = _divisor(dice, w)
    outputs = groups * dice.choice([1, 2, 3])
    return Step(lambda s, x: s.a(x).relu(), a=conv(dice, w, outputs, groups)), outputs


def _transposed(dice: Dice, w: int) -> tuple[Step, int]:
    groups = _divisor(dice, w)
    outputs = groups * dice.choice([1, 2, 3])
    return Step(lambda s, x: F.max_pool2d(s.a(x), 2), a=nn.ConvTranspose2d(w, outputs, 2, 2, groups=groups)), outputs


def _norm(dice: Dice, w: int) -> tuple[Step, int]:
    norms = [nn.BatchNorm2d(w), nn.GroupNorm(_divisor(dice, w), w), nn.InstanceNorm2d(w, affine=True)]
    return Step(lambda s, x: s.a(x), a=dice.choice(norms)), w


def _channel_norm(dice: Dice, w: int) -> tuple[Step, int]:
    return Step(lambda s, x: s.a(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), a=nn.LayerNorm(w)), w


def _gate(dice: Dice, w: int) -> tuple[Step, int]:
    def halves(s: Any, x: Tensor) -> Tensor:
        a, b = s.a(x).chunk(2, 1)
        return a * torch.sigmoid(b)

    return Step(dice.choice([halves, lambda s, x: F.glu(s.a(x), 1)]), a=conv(dice, w, 2 * w)), w


def _squeeze(dice: Dice, w: int) -> tuple[Step, int]:
    pooled = dice.choice([lambda x: F.adaptive_avg_pool2d(x, 1), lambda x: x.mean((2, 3), keepdim=True)])
    return Step(lambda s, x: x * s.b(s.a(pooled(x)).relu()).sigmoid(), a=conv(dice, w, 4), b=conv(dice, 4, w)), w


def _spatial_gate(dice: Dice, w: int) -> tuple[Step, int]:
    def gated(s: Any, x: Tensor) -> Tensor:
        return x * s.a(torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)).sigmoid()

    return Step(gated, a=conv(dice, 2, 1)), w


def _selective(dice: Dice, w: int) -> tuple[Step, int]:
    """Two branches, weighted per channel by a softmax over the branches."""

    def selected(s: Any, x: Tensor) -> Tensor:
        both = torch.stack([s.a(x), s.b(x)], 1)
        weights = s.d(s.c(both.sum(1).mean((2, 3))).relu()).view(-1, 2, w).softmax(1)
        return (both * weights[..., None, None]).sum(1)

    layers = {"a": conv(dice, w, w), "b": conv(dice, w, w), "c": nn.Linear(w, 5), "d": nn.Linear(5, 2 * w)}
    return Step(selected, **layers), w


def _split(dice: Dice, w: int) -> tuple[Step, int]:
    at = dice.randrange(1, max(w, 2))
    if at == w:
        return _conv(dice, w)

    def pieces(s: Any, x: Tensor) -> Tensor:
        a, b = x.split([at, w - at], 1)
        return torch.cat([b, s.a(a)], 1)

    def sliced(s: Any, x: Tensor) -> Tensor:
        return torch.cat([s.a(x[:, :at]), x[:, at:]], 1)

    return Step(dice.choice([pieces, sliced]), a=conv(dice, at, 4)), 4 + w - at


def _hierarchy(dice: Dice, w: int) -> tuple[Step, int]:
    """Parts of the channels, each with what became of the one before, as in Res2Net."""
    parts = _divisor(dice, w)

    def forward(s: Any, x: Tensor) -> Tensor:
        found = [x.chunk(parts, 1)[0]]
        for part in x.chunk(parts, 1)[1:]:
            found.append(s.a(part + found[-1]).relu())
        return torch.cat(found, 1)

    return Step(forward, a=conv(dice, w // parts, w // parts)), w


def _shuffle(dice: Dice, w: int) -> tuple[Step, int]:
    groups = _divisor(dice, w)

    def viewed(s: Any, x: Tensor) -> Tensor:
        n, c, height, width = x.shape
        return x.view(n, groups, c // groups, height, width).transpose(1, 2).contiguous().view(n, c, height, width)

    return Step(dice.choice([viewed, lambda s, x: F.channel_shuffle(x, groups)])), w


def _interleave(dice: Dice, w: int) -> tuple[Step, int]:
    axis = dice.choice([1, 2])
    return Step(lambda s, x: torch.stack([x, s.a(x)], axis).flatten(1, 2), a=conv(dice, w, w)), 2 * w


def _rotate(dice: Dice, w: int) -> tuple[Step, int]:
    at = dice.randrange(w)
    rolled = lambda s, x: torch.roll(x, at, 1)  # noqa: E731
    return Step(dice.choice([lambda s, x: torch.cat([x[:, at:], x[:, :at]], 1), rolled, lambda s, x: x.flip(1)])), w


def _pad(dice: Dice, w: int) -> tuple[Step, int]:
    before, after = dice.choice([(1, 1), (0, 2), (2, 0)])
    return Step(lambda s, x: F.pad(x, (0, 0, 0, 0, before, after))), w + 2


def _copies(dice: Dice, w: int) -> tuple[Step, int]:
    return Step(dice.choice([lambda s, x: x.repeat(1, 2, 1, 1), lambda s, x: x.repeat_interleave(2, 1)])), 2 * w


def _pool(dice: Dice, w: int) -> tuple[Step, int]:
    pool = dice.choice([F.max_pool2d, F.avg_pool2d])
    mode = dice.choice(["nearest", "bilinear"])
    return Step(lambda s, x: F.interpolate(pool(x, 2), scale_factor=2.0, mode=mode)), w


def _pixel_shuffle(dice: Dice, w: int) -> tuple[Step, int]:
    return Step(lambda s, x: F.avg_pool2d(F.pixel_shuffle(s.a(x), 2), 2), a=conv(dice, w, 24)), 6


def _pixel_unshuffle(dice: Dice, w: int) -> tuple[Step, int]:
    return Step(lambda s, x: F.interpolate(s.a(F.pixel_unshuffle(x, 2)), scale_factor=2.0), a=conv(dice, 4 * w, 6)), 6


def _shared(dice: Dice, w: int) -> tuple[Step, int]:
    """One convolution between two norms of their own."""
    return Step(
        lambda s, x: s.c(s.a(s.b(s.a(x)).relu())), a=conv(dice, w, w), b=nn.BatchNorm2d(w), c=nn.BatchNorm2d(w)
    ), w


def _act(dice: Dice, w: int) -> tuple[Step, int]:
    return Step(
        lambda s, x: s.a(x), a=dice.choice([activation(dice, w), nn.PReLU(w), Scale(w, 1, 1), nn.Dropout(0.2)])
    ), w


IMAGE: dict[str, Callable[[Dice, int], tuple[Step, int]]] = {
    function.__name__.strip("_"): function
    for function in (
        _conv, _residual, _concat, _depthwise, _grouped, _transposed, _norm, _channel_norm, _gate, _squeeze,
        _spatial_gate, _selective, _split, _hierarchy, _shuffle, _interleave, _rotate, _pad, _copies, _pool,
        _pixel_shuffle, _pixel_unshuffle, _shared, _act,
    )
}  # fmt: skip
