"""A small one-stage detector of the shapes in rendered scenes: box, objectness and class are three tasks on one trunk.

Every cell of a grid, an eighth of the image's edge, tells whether the center of a shape lies in it, of which class it is, and its
box.
"""

from __future__ import annotations

import torch
from multitask_scenes import Block, Down, rendered
from torch import Tensor, nn
from torch.nn import functional as F

STRIDE = 8
CLASSES = 2
_LEAST_SHARE = 1 / 256
"""Of the pixels of an image: what a shape must show of itself to count."""


def shapes(count: int, size: int, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Images and the shapes that can be seen.

    Args:
        count: How many images.
        size: Pixels of an edge.
        seed: Of the scenes; equal ones give equal scenes.

    Returns:
        Images (count, 3, size, size), and by name for cells of the grid ``"objectness"`` (count, cells, cells), 1 where the
        center of a shape lies, of several the nearest; there ``"class"`` (count, cells, cells), and ``"box"`` (count, 4, cells,
        cells): center as row and column in the cell, in [0, 1), height and width in cells.
    """
    images, _, found = rendered(count, size, seed)
    cells = size // STRIDE
    there = torch.zeros(count, cells, cells)
    kind = torch.zeros(count, cells, cells, dtype=torch.long)
    box = torch.zeros(count, 4, cells, cells)
    nearest = torch.full((count, cells, cells), 2.0)
    for shape in found:
        row, column = shape.row * cells, shape.column * cells
        extent = 2 * cells * shape.radius * torch.where(shape.sphere, 1.0, 0.9)
        for image in torch.nonzero(shape.pixels >= _LEAST_SHARE * size * size).flatten().tolist():
            place = image, int(row[image]), int(column[image])
            if shape.away[image] < nearest[place]:
                nearest[place], there[place], kind[place] = shape.away[image], 1.0, int(shape.sphere[image])
                values = row[image] % 1, column[image] % 1, extent[image], extent[image]
                box[image, :, place[1], place[2]] = torch.stack(values)
    return images, {"objectness": there, "class": kind, "box": box}


class Detector(nn.Module):
    """A residual trunk at an eighth of the edge, and a head each for box, objectness and class.

    Args:
        width: Channels of the trunk; heads have half.
    """

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.down = nn.Sequential(Down(3, width // 2), Down(width // 2, width), Block(width), Down(width, width))
        self.blocks = nn.Sequential(*(Block(width) for _ in range(2)))
        self.box, self.objectness, self.kind = (CellHead(width, width // 2, out) for out in (4, 1, CLASSES))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        hidden = self.blocks(self.down(images))
        box = self.box(hidden)
        return {
            "box": torch.cat([box[:, :2].sigmoid(), box[:, 2:].exp()], 1),
            "objectness": self.objectness(hidden)[:, 0],
            "class": self.kind(hidden),
        }


class CellHead(nn.Module):
    """Two convolutions per cell, for one task."""

    def __init__(self, inputs: int, width: int, outputs: int) -> None:
        super().__init__()
        self.inner, self.norm = nn.Conv2d(inputs, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.out = nn.Conv2d(width, outputs, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        outputs: Tensor = self.out(self.norm(self.inner(hidden)).relu())
        return outputs


def loss(name: str, outputs: dict[str, Tensor], targets: dict[str, Tensor]) -> Tensor:
    """Of objectness the cross-entropy of all cells; of box and class the mean over the cells that have a shape."""
    there = targets["objectness"]
    if name == "objectness":
        return F.binary_cross_entropy_with_logits(outputs["objectness"], there)
    if name == "class":
        each = F.cross_entropy(outputs["class"], targets["class"], reduction="none")
    else:
        each = F.smooth_l1_loss(outputs["box"], targets["box"], reduction="none").mean(1)
    return (each * there).sum() / there.sum().clamp(min=1)


def metric(name: str, outputs: dict[str, Tensor], targets: dict[str, Tensor]) -> float:
    """Average precision of objectness; of cells with a shape the mean overlap of boxes, or the share of right classes."""
    there = targets["objectness"] > 0
    if name == "objectness":
        return average_precision(outputs["objectness"].flatten(), there.flatten())
    if name == "class":
        return float((outputs["class"].argmax(1) == targets["class"])[there].float().mean())
    return float(overlap(outputs["box"].movedim(1, -1)[there], targets["box"].movedim(1, -1)[there]).mean())


def average_precision(scores: Tensor, there: Tensor) -> float:
    """Mean of the precisions at every one that is there, in the order of falling scores."""
    hits = there[scores.argsort(descending=True, stable=True)].double()
    precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1)
    return float((precision * hits).sum() / hits.sum())


def overlap(one: Tensor, other: Tensor) -> Tensor:
    """Intersection over union of boxes (n, 4): center, height and width."""
    low = torch.maximum(one[:, :2] - one[:, 2:] / 2, other[:, :2] - other[:, 2:] / 2)
    high = torch.minimum(one[:, :2] + one[:, 2:] / 2, other[:, :2] + other[:, 2:] / 2)
    both = (high - low).clamp(min=0).prod(1)
    return both / (one[:, 2:].prod(1) + other[:, 2:].prod(1) - both)
