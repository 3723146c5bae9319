"""Imported kernels are those that lowering makes, kind by kind: then what a table of others says of one is found for it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import edgeprune
from edgeprune.latency.csv_kernels import KINDS
from edgeprune.latency.table import LatencyTable
from edgeprune.spec import Kernel

IMAGE = {"channels": 12, "height": 24}
ROWS: dict[str, dict[str, Any]] = {
    "conv2d": {"in_channels": 21, "out_channels": 21, "height": 12, "kernel_size": 3},
    "depthwise_conv2d": {"channels": 21, "height": 12, "kernel_size": 3},
    "conv_transpose2d": {"in_channels": 21, "out_channels": 12, "height": 12, "kernel_size": 2, "stride": 2},
    "instance_norm": IMAGE,
    "batch_norm": IMAGE,
    "relu": IMAGE,
    "sigmoid": IMAGE,
    "tanh": IMAGE,
    "silu": IMAGE,
    "hard_sigmoid": IMAGE,
    "add": IMAGE,
    "mul": IMAGE,
    "concat": {"channels": "12+12", "height": 24},
    "split": {"channels": 24, "height": 24, "parts": 2},
    "max_pool2d": {**IMAGE, "kernel_size": 2},
    "average_pool2d": {**IMAGE, "kernel_size": 3, "stride": 1, "padding": 1},
    "global_average_pool2d": IMAGE,
    "transpose": {"rows": 12, "columns": 144},
    "gather": {"entries": 50, "tokens": 6, "channels": 12},
    "layer_norm": {"tokens": 144, "channels": 12},
    "softmax": {"heads": 3, "rows": 144, "columns": 144},
    "matmul": {"heads": 3, "rows": 144, "inner": 144, "columns": 4},
    "linear": {"in_features": 12, "out_features": 5},
}


class Kinds(nn.Module):
    """An image through what has a kernel of its own, its pixels as tokens, and words beside them."""

    def __init__(self) -> None:
        super().__init__()
        # No channels of the first ones come in whole blocks: they are plain convolutions on every processor.
        self.stem, self.plain = nn.Conv2d(3, 21, 3, padding=1), nn.Conv2d(21, 21, 3, padding=1)
        self.depthwise, self.up = nn.Conv2d(21, 21, 3, padding=1, groups=21), nn.ConvTranspose2d(21, 12, 2, 2)
        self.norm, self.batch, self.before = nn.InstanceNorm2d(12, affine=True), nn.BatchNorm2d(12), nn.LayerNorm(12)
        self.words, self.head = nn.Embedding(50, 12), nn.Linear(12, 5)

    def forward(self, image: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        x = self.norm(self.up(self.depthwise(self.plain(self.stem(image)))))
        x = F.silu(F.hardsigmoid(x).tanh())
        x = self.batch(F.avg_pool2d(x.sigmoid() * (x + x), 3, 1, 1)).relu()
        first, second = torch.cat([x, x], 1).chunk(2, 1)
        out = self.head(F.adaptive_avg_pool2d(first, 1).flatten(1))
        tokens = self.before(F.max_pool2d(second, 2).flatten(2).transpose(1, 2))
        heads = tokens.unflatten(2, (3, 4)).transpose(1, 2)
        seen = (heads @ heads.transpose(-2, -1) * 0.5).softmax(-1) @ heads
        return out, seen.mean((1, 2)).sum(1, keepdim=True) + self.words(words).sum((1, 2))


@pytest.fixture(scope="module")
def lowered(tmp_path_factory: pytest.TempPathFactory) -> set[Kernel]:
    torch.manual_seed(0)
    inputs = torch.randn(1, 3, 12, 12), torch.randint(0, 50, (1, 6))
    model = Kinds().eval()
    graph = edgeprune.lower(edgeprune.trace(model, inputs), workdir=tmp_path_factory.mktemp("lowered"))
    return set(graph.at(graph.graph.widths()))


def test_every_kind_is_looked_at() -> None:
    assert set(ROWS) == set(KINDS)


@pytest.mark.parametrize("kind", ROWS)
def test_an_imported_kernel_is_the_one_that_lowering_makes(kind: str, lowered: set[Kernel], tmp_path: Path) -> None:
    fields = ROWS[kind]
    text = ",".join([*fields, "ms"]) + "\n" + ",".join([*map(str, fields.values()), "0.5"]) + "\n"
    table = LatencyTable.from_csv(
        io.StringIO(text), kernel=kind, columns={name: name for name in fields}, latency_ms="ms", device="x"
    )
    (kernel,) = table.kernels
    alike = [one.key for one in lowered if one.op == kernel.op]
    assert kernel.key in alike
