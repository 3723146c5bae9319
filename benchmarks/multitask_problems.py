"""The networks and data of `multitask.py`: tasks per pixel on rendered scenes, and a detector of the shapes in them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import multitask_detector as detector
import torch
from multitask_scenes import SceneNet, scenes
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from edgeprune.tasks.task import Objective, Task

Named = dict[str, Tensor]


@dataclass(frozen=True)
class Problem:
    """A network, and what it is to tell.

    Attributes:
        network: By width.
        data: Images and targets by name, from count, size and seed.
        loss: Of a task by its name.
        metric: The same.
        tasks: Name to whether its metric is better the higher.
        pooled: Tasks whose metric needs all samples at once.
        outputs: Layers whose outputs are those of the network.
        epochs: Of dense training.
    """

    network: Callable[[int], nn.Module]
    data: Callable[[int, int, int], tuple[Tensor, Named]]
    loss: Callable[[str, Named, Named], Tensor]
    metric: Callable[[str, Named, Named], float]
    tasks: dict[str, bool]
    pooled: tuple[str, ...]
    outputs: tuple[str, ...]
    epochs: int

    def task(self, train: Any, validation: Any, limit: str | None) -> Task:
        """All of its objectives, on one loader each split."""
        return Task(
            tuple(
                Objective(
                    name,
                    train,
                    validation,
                    partial(self.loss, name),
                    partial(self.metric, name),
                    better,
                    limit=limit,
                    pooled=name in self.pooled,
                )
                for name, better in self.tasks.items()
            )
        )


class Samples(Dataset[tuple[Tensor, Named]]):
    """Images with their targets by name."""

    def __init__(self, problem: Problem, count: int, size: int, seed: int) -> None:
        images, targets = problem.data(count, size, seed)
        self._names, self._data = tuple(targets), TensorDataset(images, *targets.values())

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> tuple[Tensor, Named]:
        image, *targets = self._data[index]
        return image, dict(zip(self._names, targets, strict=True))


def _scene_loss(name: str, outputs: Named, targets: Named) -> Tensor:
    """Cross-entropy, mean absolute depth error, or one minus the cosine."""
    found, wanted = outputs[name], targets[name]
    if name == "seg":
        return F.cross_entropy(found, wanted)
    if name == "depth":
        return 5.0 * F.l1_loss(found, wanted)
    # Rounding may put a cosine above 1.
    return (1 - (found * wanted).sum(1)).mean().clamp(min=0)


def _scene_metric(name: str, outputs: Named, targets: Named) -> float:
    """Share of the pixels of the right class, mean absolute depth error, mean cosine with the normal."""
    found, wanted = outputs[name], targets[name]
    each = {
        "seg": lambda: (found.argmax(1) == wanted).float(),
        "depth": lambda: (found - wanted).abs(),
        "normals": lambda: (found * wanted).sum(1),
    }
    return float(each[name]().mean())


PROBLEMS = {
    "scenes": Problem(
        SceneNet,
        scenes,
        _scene_loss,
        _scene_metric,
        {"seg": True, "depth": False, "normals": True},
        (),
        ("seg.out", "depth.out", "normals.out"),
        6,
    ),
    "detector": Problem(
        detector.Detector,
        detector.shapes,
        detector.loss,
        detector.metric,
        {"box": True, "objectness": True, "class": True},
        ("box", "objectness", "class"),
        ("box.out", "objectness.out", "kind.out"),
        12,
    ),
}


def count(module: nn.Module) -> int:
    """Parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def multiply_accumulates(module: nn.Module, size: int) -> float:
    """Of one image, in convolutions and matrix products."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(example(size))
    return counter.get_total_flops() / 2


def worst(problem: Problem, dense: dict[str, float], pruned: dict[str, float]) -> float:
    """The largest relative loss of a metric."""
    signs = {name: 1 if better else -1 for name, better in problem.tasks.items()}
    return max(sign * (dense[name] - pruned[name]) / abs(dense[name]) for name, sign in signs.items())


def example(size: int) -> Tensor:
    """What the networks are traced with."""
    return torch.zeros(1, 3, size, size)
