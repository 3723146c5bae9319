"""Every kind of kernel, from the runtime's own graph of a cut model to its time on the board: one network that has them all."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import edgeprune
from edgeprune.boards.board import Board
from edgeprune.lowering.trained_form import in_trained_form
from edgeprune.profiling.measuring import measure
from edgeprune.spec import Kernel
from edgeprune.surgery.plan import make_plan

QUICK: dict[str, Any] = {"rounds": 1, "samples": 1, "sample_ms": 0.3, "warmup_ms": 0.3, "max_repeats": 0}


class Kinds(nn.Module):
    """An image through all kinds of convolutions and pools, its pixels as tokens, and words beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32)
        self.grouped = nn.Conv2d(32, 64, 3, padding=1, groups=4)
        self.depthwise = nn.Conv2d(64, 64, 3, padding=1, groups=64)
        self.groups = nn.GroupNorm(4, 64)
        self.down, self.up = nn.Conv2d(64, 48, 3, 2, 1), nn.ConvTranspose2d(48, 32, 2, 2)
        self.join = nn.Conv2d(96, 40, 1)
        self.words, self.before = nn.Embedding(50, 40), nn.LayerNorm(40)
        self.q, self.kv, self.out = nn.Linear(40, 40), nn.Linear(40, 80), nn.Linear(40, 40)
        self.head = nn.Linear(40, 5)

    def forward(self, image: Tensor, words: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(image)))
        x = F.silu(self.groups(self.depthwise(self.grouped(x))))
        y = self.up(F.max_pool2d(self.down(x), 1, 1))
        x = F.avg_pool2d(self.join(torch.cat([x, y], 1)), 2)
        tokens = torch.cat([x.flatten(2).transpose(1, 2), self.words(words)], 1)
        tokens = self.before(tokens)
        keys, values = self.kv(tokens).chunk(2, -1)
        q, k, v = (part.unflatten(2, (4, -1)).transpose(1, 2) for part in (self.q(tokens), keys, values))
        seen = (q @ k.transpose(-2, -1) * 0.3).softmax(-1) @ v
        tokens = tokens + self.out(seen.transpose(1, 2).flatten(2))
        return self.head(tokens.mean(1))


def kinds(kernel: Kernel) -> set[str]:
    """The kinds that a kernel is of; a convolution is of several at once."""
    found = {kernel.family}
    if kernel.family == "conv":
        groups = int(str(kernel.attribute("groups", 1)))
        channels = kernel.inputs[0][1]
        found.add("depthwise" if groups == channels > 1 else "grouped" if groups > 1 else "regular")
    if kernel.op == "ConvTranspose":
        found.add("transposed")
    if kernel.family == "gemm":
        found.add("linear" if len(kernel.inputs) == 1 else "batched product")
    return found | {kernel.op.rpartition(".")[2]}


@pytest.mark.slow
def test_every_kind_is_that_of_the_cut_model_and_is_timed_on_the_board(board: Board, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Kinds().eval()
    inputs = torch.randn(1, 3, 16, 16), torch.randint(0, 50, (1, 7))
    lowered = edgeprune.lower(edgeprune.trace(model, inputs), workdir=tmp_path)
    widths = {group.name: max(2, group.size // 2) for group in lowered.graph.groups}
    plan = make_plan(lowered.graph, {name: range(width) for name, width in widths.items()})
    lowered.backend.export(
        in_trained_form(edgeprune.apply(model, plan)), lowered.graph.example_inputs, tmp_path / "cut.onnx"
    )
    kernels = lowered.at(widths)
    real = Counter(kernel.key for kernel in lowered.backend.parse_engine(tmp_path / "cut.onnx"))
    assert Counter(kernel.key for kernel in kernels) == real

    every = {*kernels, *lowered.at({})}
    names = set().union(*map(kinds, every))
    assert {"regular", "grouped", "depthwise", "transposed", "linear", "batched product", "Softmax"} <= names
    assert {"conv", "gemm", "norm", "pool", "elementwise", "softmax", "layout", "concat", "reduce"} <= names
    assert {"Concat", "Split", "Gather", "LayerNormalization"} <= names
    assert "other" not in names

    ids = {hashlib.sha256(kernel.key.encode()).hexdigest()[:16]: kernel for kernel in every}
    engines: dict[str, bytes | Path] = {"network": lowered.network_engine(widths)}
    engines |= {name: lowered.backend.kernel_engine(kernel) for name, kernel in ids.items()}
    run = measure(board, engines, sentinel="network", kernels=list(ids), every=200, **QUICK)
    assert run.unusable == {}
    assert set(run.measurements) == set(engines)
    assert all(found.median_ms > 0 for found in run.measurements.values())
