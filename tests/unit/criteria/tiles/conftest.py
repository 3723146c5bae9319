"""A small net of two linear layers in float64, cut into tiles that do not divide it."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from edgeprune.surgery.tiles import TileGrid
from edgeprune.tasks.task import Task

_GRIDS = {
    "0.weight": TileGrid("0.weight", (0, 3, 6, 7), (0, 2, 4, 5)),
    "2.weight": TileGrid("2.weight", (0, 2, 3), (0, 4, 7)),
}


@pytest.fixture
def grids():
    return dict(_GRIDS)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()


@pytest.fixture
def batches():
    draw = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(4, 5, dtype=torch.float64, generator=draw),
            torch.randint(0, 3, (4,), generator=draw),
        )
        for _ in range(6)
    ]


@pytest.fixture
def task(batches):
    return Task.single(train=batches, validation=batches, loss=cross_entropy, metric=lambda *_: 0.0, name="none")
