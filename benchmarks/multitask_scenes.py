"""Rendered scenes of spheres and boxes on a slanted floor, with what a network should tell of each pixel.

Deterministic, and made on the fly. An image shows up to four shapes by a z-buffer, lit by one lamp, in random colors with noise.
Its targets are, per pixel, the class (floor, sphere, box), the depth in [0, 1], and the normal of the surface. Who wants shapes
instead of pixels is told where each is, and which pixels show it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

CLASSES = 3
SHAPES = 4
_LAMP = torch.nn.functional.normalize(torch.tensor([-0.4, -0.6, 0.7]), dim=0)


@dataclass(frozen=True)
class Shape:
    """One of the shapes of every scene.

    Attributes:
        row: Of its center, in edges, shape (count,).
        column: The same.
        radius: Half of its extent.
        sphere: Whether it is a sphere; otherwise a box.
        away: How far it is.
        pixels: How many pixels show it.
    """

    row: Tensor
    column: Tensor
    radius: Tensor
    sphere: Tensor
    away: Tensor
    pixels: Tensor


def scenes(count: int, size: int, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Images and what is in them.

    Args:
        count: How many.
        size: Pixels of an edge.
        seed: Of the scenes; equal ones give equal scenes.

    Returns:
        Images (count, 3, size, size), and by name ``"seg"`` (count, size, size) classes, ``"depth"`` (count, size, size) in
        [0, 1], ``"normals"`` (count, 3, size, size) of unit length.
    """
    images, targets, _ = rendered(count, size, seed)
    return images, targets


def rendered(count: int, size: int, seed: int) -> tuple[Tensor, dict[str, Tensor], list[Shape]]:
    """As `scenes`, and the shapes."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    grid = (torch.arange(size) + 0.5) / size
    y, x = (axis.expand(count, size, size) for axis in torch.meshgrid(grid, grid, indexing="ij"))
    depth = 1.0 - 0.35 * y
    floor = torch.nn.functional.normalize(torch.tensor([0.0, -0.35, 1.0]), dim=0)
    normals = floor[None, :, None, None].expand(count, 3, size, size).clone()
    seg = torch.zeros(count, size, size, dtype=torch.long)
    colors = 0.3 + 0.4 * uniform(count, 3, 1, 1).expand(count, 3, size, size)
    owner = torch.full((count, size, size), -1)
    found = []
    for number in range(SHAPES):
        row, column, away, there = (uniform(count, 1, 1) for _ in range(4))
        radius = 0.08 + 0.14 * uniform(count, 1, 1)
        sphere = uniform(count, 1, 1) < 0.5
        color = 0.2 + 0.8 * uniform(count, 3, 1, 1)
        right, down = (x - column) / radius, (y - row) / radius
        height = (1 - right.square() - down.square()).clamp(min=0).sqrt()
        inside = torch.where(sphere, height > 0, torch.maximum(right.abs(), down.abs()) < 0.9)
        near = (0.15 + 0.6 * away - radius * torch.where(sphere, height, 0.0)).clamp(0.0, 1.0)
        seen = inside & (there < 0.85) & (near < depth)
        depth = torch.where(seen, near, depth)
        seg = torch.where(seen, torch.where(sphere, 1, 2), seg)
        round_ = torch.stack([right, down, height], 1)
        flat = torch.zeros_like(round_)
        flat[:, 2] = 1.0
        normals = torch.where(seen[:, None], torch.where(sphere[:, None], round_, flat), normals)
        colors = torch.where(seen[:, None], color, colors)
        owner = torch.where(seen, number, owner)
        found.append((row, column, radius, sphere, away))
    normals = torch.nn.functional.normalize(normals, dim=1)
    light = 0.35 + 0.65 * torch.einsum("nchw,c->nhw", normals, _LAMP).clamp(min=0)
    images = colors * light[:, None] + 0.05 * torch.randn(count, 3, size, size, generator=generator)
    targets = {"seg": seg, "depth": depth, "normals": normals}
    shapes = [
        Shape(*(one.flatten() for one in several), (owner == number).sum((1, 2)))
        for number, several in enumerate(found)
    ]
    return (images - 0.45) / 0.25, targets, shapes


class Block(nn.Module):
    """Two convolutions beside an identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.first_norm, self.second_norm = nn.BatchNorm2d(width), nn.BatchNorm2d(width)

    def forward(self, inputs: Tensor) -> Tensor:
        inner = self.first_norm(self.first(inputs)).relu()
        return (inputs + self.second_norm(self.second(inner))).relu()


class Down(nn.Module):
    """A convolution that halves the edges."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(inputs, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden: Tensor = self.norm(self.conv(inputs))
        return hidden.relu()


class Head(nn.Module):
    """Back to the size of the image, for one task."""

    def __init__(self, inputs: int, width: int, outputs: int) -> None:
        super().__init__()
        self.inner, self.norm = nn.Conv2d(inputs, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.up = nn.Upsample(scale_factor=2, mode="nearest")
        self.wide = nn.Conv2d(width, width, 3, padding=1)
        self.out = nn.Conv2d(width, outputs, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        inner = self.up(self.norm(self.inner(hidden)).relu())
        outputs: Tensor = self.out(self.up(self.wide(inner).relu()))
        return outputs


class SceneNet(nn.Module):
    """A residual trunk at a quarter of the edge, and a head each for classes, depth and normals.

    Args:
        width: Channels of the trunk; heads have half.
    """

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.stem, self.down = Down(3, width), Down(width, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(3)))
        self.seg = Head(width, width // 2, CLASSES)
        self.depth = Head(width, width // 2, 1)
        self.normals = Head(width, width // 2, 3)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        hidden = self.blocks(self.down(self.stem(images)))
        return {
            "seg": self.seg(hidden),
            "depth": self.depth(hidden)[:, 0],
            "normals": nn.functional.normalize(self.normals(hidden), dim=1),
        }
