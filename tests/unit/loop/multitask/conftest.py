"""A small trunk with two heads that is trained on drawn scenes, and a planner of it whose latencies come from a stored table."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from edgeprune.graph.tracing import trace
from edgeprune.loop.planning import Planner
from edgeprune.lowering.kernel_graph import lower
from edgeprune.recovery.fine_tuning import fine_tune
from edgeprune.spec import Constraints
from edgeprune.tasks.task import Objective, Task

SIZE = 12


class Scenes(nn.Module):
    """Trunk, a head that segments, and one that tells the depth."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.stem_bn = nn.BatchNorm2d(16)
        self.trunk = nn.Conv2d(16, 24, 3, padding=1)
        self.trunk_bn = nn.BatchNorm2d(24)
        self.seg_inner = nn.Conv2d(24, 16, 3, padding=1)
        self.seg_out = nn.Conv2d(16, 3, 1)
        self.depth_inner = nn.Conv2d(24, 24, 3, padding=1)
        self.depth_out = nn.Conv2d(24, 1, 1)

    def forward(self, images):
        hidden = self.stem_bn(self.stem(images)).relu()
        hidden = self.trunk_bn(self.trunk(hidden)).relu()
        seg = self.seg_out(self.seg_inner(hidden).relu())
        depth = self.depth_out(self.depth_inner(hidden).relu())
        return {"seg": seg, "depth": depth[:, 0]}


def scenes(count, seed):
    """Discs and squares before a background: images (n, 3, S, S), classes (n, S, S), depths (n, S, S) in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    grid = torch.arange(SIZE, dtype=torch.float32)
    y, x = torch.meshgrid(grid, grid, indexing="ij")
    images, classes, depths = [], [], []
    for _ in range(count):
        kind = torch.zeros(SIZE, SIZE, dtype=torch.long)
        depth = 0.8 + 0.2 * y / SIZE
        for which in (1, 2):
            row, column, near = (float(value) for value in torch.rand(3, generator=generator))
            away = torch.stack([(y - row * SIZE).abs(), (x - column * SIZE).abs()])
            inside = away.square().sum(0).sqrt() < 3 if which == 1 else away.amax(0) < 2.5
            inside &= depth > 0.6 * near
            kind[inside], depth[inside] = which, 0.6 * near
        shade = 1.0 - depth
        image = torch.stack([shade * (kind != 2), shade * (kind != 1), shade])
        images.append(image + 0.1 * torch.randn(image.shape, generator=generator))
        classes.append(kind)
        depths.append(depth)
    return torch.stack(images), {"seg": torch.stack(classes), "depth": torch.stack(depths)}


def batched(count, seed, size=16):
    images, targets = scenes(count, seed)
    return [
        (images[start : start + size], {name: value[start : start + size] for name, value in targets.items()})
        for start in range(0, count, size)
    ]


def scenes_task(train, validation, seg="10%", depth="20%"):
    """Segmentation by pixel accuracy, depth by its mean absolute error, on one loader."""
    return Task(
        (
            Objective(
                "seg",
                train,
                validation,
                lambda outputs, targets: nn.functional.cross_entropy(outputs["seg"], targets["seg"]),
                lambda outputs, targets: float((outputs["seg"].argmax(1) == targets["seg"]).float().mean()),
                limit=seg,
            ),
            Objective(
                "depth",
                train,
                validation,
                lambda outputs, targets: nn.functional.mse_loss(outputs["depth"], targets["depth"]),
                lambda outputs, targets: float((outputs["depth"] - targets["depth"]).abs().mean()),
                higher_is_better=False,
                limit=depth,
                weight=3.0,
            ),
        )
    )


@dataclass(frozen=True)
class Case:
    """What a planner needs; `planner` makes one with other limits."""

    model: nn.Module
    kernel_graph: object
    predictor: object
    train: list
    validation: list
    example: torch.Tensor

    def task(self, seg="10%", depth="20%"):
        return scenes_task(self.train, self.validation, seg, depth)

    def planner(self, seg="10%", depth="20%", **options):
        task = options.pop("task", None) or self.task(seg, depth)
        options.setdefault("constraints", Constraints(min_width={"*": 1}))
        return Planner(self.model, self.kernel_graph, self.predictor, task=task, **options)


@pytest.fixture(scope="session")
def case(tabled, tmp_path_factory):
    """Trained for some seconds: good enough to have something to lose."""
    torch.manual_seed(0)
    model = Scenes()
    train, validation = batched(96, 1), batched(32, 2)
    fine_tune(model, scenes_task(train, validation), epochs=6, lr=1e-2)
    model.eval()
    example = torch.zeros(1, 3, SIZE, SIZE)
    device = tabled.predictor.table.header["identity"]
    kernels = lower(trace(model, example), model=model, device=device, workdir=tmp_path_factory.mktemp("scenes"))
    return Case(model, kernels, tabled.predictor, train, validation, example)
