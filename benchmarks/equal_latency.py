"""What benchmarks of accuracy at equal measured latency share: the dense model on the machine at hand, its images, and cells.

A cell is one method at one target; its figures are in a JSON file of their own, so that a run goes on where it ended.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from damage_curves import accuracy, images
from torch import nn
from torch.nn import functional as F

import edgeprune
from edgeprune.boards.board import Board
from edgeprune.loop.verification import measure_ratio
from edgeprune.surgery.plan import PruningPlan
from edgeprune.tasks.task import Task

SCORING_IMAGES, BATCH = 2_000, 100
OVER = 1.01
"""A target is met up to this factor."""


@dataclass(frozen=True)
class Candidate:
    """A cut model that was measured.

    Attributes:
        module: It.
        ratio: Measured share of the dense latency.
        details: What is written down of it.
        plan: By which it was cut; None where there is none to go on with.
    """

    module: nn.Module
    ratio: float
    details: dict[str, Any]
    plan: PruningPlan | None = None


def aimed(target: float, aim: float, attempt: Callable[[float], Candidate | None], turns: int) -> Candidate | None:
    """The slowest candidate that meets a target; each aim is moved by what was measured of the attempt before.

    Args:
        target: Share of the dense latency.
        aim: To begin with, milliseconds as predicted.
        attempt: What an aim comes to; None ends it.
        turns: Most attempts.
    """
    best: Candidate | None = None
    for _ in range(turns):
        found = attempt(aim)
        if found is None:
            break
        if found.ratio <= OVER * target and (best is None or found.ratio > best.ratio):
            best = found
        if abs(found.ratio / target - 1) <= OVER - 1:
            break
        aim *= target / found.ratio
    return best


class Flipped:
    """All training images in random order, flipped and moved by up to four pixels."""

    def __init__(self, inputs: torch.Tensor, labels: torch.Tensor, batch: int = 128) -> None:
        self.inputs, self.labels, self.batch = inputs, labels, batch

    def __len__(self) -> int:
        return -(-len(self.labels) // self.batch)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for chosen in torch.split(torch.randperm(len(self.labels)), self.batch):
            x = F.pad(self.inputs[chosen], (4, 4, 4, 4))
            top, left = torch.randint(0, 9, (2,)).tolist()
            x = x[:, :, top : top + 32, left : left + 32]
            yield (x.flip(3) if torch.rand(()) < 0.5 else x), self.labels[chosen]


class DenseModel:
    """A CIFAR-10 model on the machine at hand, traced, lowered and profiled.

    Args:
        model: It.
        data: Folder with ``train.parquet`` and ``test.parquet``.
        table: Its latency table; measured and written where it is not there.
        minutes: Of profiling.
        board: This machine.
        folder: For engines.
        every: Training images of `every_image`.
        test_images: Images that accuracy is measured on.
        tiles: Sizes of tiles whose kernels the table is to hold.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Path,
        table: Path,
        minutes: float,
        board: Board,
        folder: Path,
        *,
        every: int = 50_000,
        test_images: int = 10_000,
        tiles: Sequence[tuple[int, int]] = (),
    ) -> None:
        self.model, self.data, self.board, self._counts = model, data, board, (every, test_images)
        self.example = torch.zeros(1, 3, 32, 32)
        self.graph = edgeprune.trace(model, self.example)
        self.kernels = edgeprune.lower(self.graph, model=model, device=board.probe(), workdir=folder)
        if table.exists():
            self.table = edgeprune.LatencyTable.load(table)
        else:
            self.table = edgeprune.profile(
                model,
                self.example,
                board,
                minutes=minutes,
                out=table,
                graph=self.graph,
                kernel_graph=self.kernels,
                tiles=tiles,
            )
        self.predictor = edgeprune.fit(self.table)

    @cached_property
    def task(self) -> Task:
        """Scores on a few training images, accuracy on the test images."""
        return _task(self._split("train", SCORING_IMAGES), self._split("test", self._counts[1]))

    @cached_property
    def every_image(self) -> Task:
        """The same with the training images that models are tuned on."""
        train = Flipped(*images(self.data / "train.parquet", self._counts[0]))
        return _task(train, self.task.objectives[0].validation)

    def ratio(self, module: nn.Module, rounds: int = 12, precision: float = 0.01) -> float:
        """Measured share of the dense latency."""
        return measure_ratio(self.board, self.kernels, module, threads=1, rounds=rounds, precision=precision).ratio

    def _split(self, split: str, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        parts = (torch.split(part, BATCH) for part in images(self.data / f"{split}.parquet", count))
        return list(zip(*parts, strict=True))


def _task(train: Any, validation: Any) -> Task:
    return Task.single(train=train, validation=validation, loss=F.cross_entropy, metric=accuracy, name="accuracy")


def read(path: Path) -> dict[str, Any]:
    """A cell, as far as it is done."""
    return json.loads(path.read_text()) if path.exists() else {}


def write(path: Path, values: Any) -> None:
    """In one step."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(values, indent=1, allow_nan=False) + "\n")
    partial.replace(path)


def missing_seeds(found: dict[str, Any], seeds: Sequence[int], key: str) -> list[int]:
    """Those that a cell was not tuned with yet; `key` and the seed name the figure."""
    return [] if found.get("reachable") is False else [seed for seed in seeds if f"{key}{seed}" not in found]


def row(*cells: object) -> None:
    """Print one row of a table in Markdown."""
    print(f"|{''.join(f' {cell} |' if cell != '' else ' |' for cell in cells)}", flush=True)


def heading(*names: str) -> None:
    """Print the first rows of a table in Markdown."""
    row(*names)
    print(f"|{'---|' * len(names)}")
