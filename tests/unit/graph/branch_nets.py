"""Networks with residual branches of several kinds, and what each computes without some of them, written by hand."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Basic(nn.Module):
    """Two convolutions; a wider block skips pixels and pads channels, or projects."""

    def __init__(self, inputs: int, outputs: int, *, project: bool = False, inplace: bool = False) -> None:
        super().__init__()
        self.wider, self.inplace = outputs - inputs, inplace
        self.present = True
        stride = 2 if self.wider else 1
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs + 4, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs + 4)
        self.conv2, self.bn2 = nn.Conv2d(outputs + 4, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.project = nn.Conv2d(inputs, outputs, 1, stride) if project else None

    def forward(self, x: Tensor) -> Tensor:
        left = x
        if self.project is not None:
            left = self.project(x)
        elif self.wider:
            left = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.wider // 2, self.wider - self.wider // 2))
        if not self.present:
            return F.relu(left)
        inner = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)), self.inplace)))
        if self.inplace:
            inner += left
            return F.relu(inner, True)
        return F.relu(left + inner)


class Bottleneck(nn.Module):
    """Three convolutions: two groups inside."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.present = True
        self.down, self.mid, self.up = (
            nn.Conv2d(width, inner, 1),
            nn.Conv2d(inner, inner, 3, 1, 1),
            nn.Conv2d(inner, width, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(F.relu(self.mid(F.relu(self.down(x))))) if self.present else x


class Network(nn.Module):
    """Blocks one after the other."""

    def __init__(self, *blocks: nn.Module, width: int, stem: int = 8) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, stem, 3, padding=1, bias=False), nn.BatchNorm2d(stem)
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(F.relu(self.bn(self.stem(x)))).mean((2, 3)))


class Mlp(nn.Module):
    """Tokens: a branch of two linear layers behind a norm, scaled by a parameter."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.present = True
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 32), nn.Linear(32, width)
        self.scale = nn.Parameter(torch.full((width,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x)))) * self.scale if self.present else x


def residual(*, inplace: bool = False) -> Network:
    """A plain block, one that skips and pads, one that projects, a plain one."""
    return Network(
        *(Basic(8, 8, inplace=inplace), Basic(8, 16, inplace=inplace)),
        *(Basic(16, 24, project=True, inplace=inplace), Basic(24, 24, inplace=inplace)),
        width=24,
    )


def bottleneck() -> Network:
    """Two bottlenecks."""
    return Network(Bottleneck(8, 12), Bottleneck(8, 16), width=8)
