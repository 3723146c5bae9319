"""What profiling looks at of a model without some of its tiles, on the real lowering of a transformer layer."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from edgeprune.backends import registry
from edgeprune.boards.board import Board
from edgeprune.errors import ConfigError, UnsupportedKernelError
from edgeprune.graph.tracing import trace
from edgeprune.latency.table import LatencyTable
from edgeprune.latency.table_rows import kernel_row, network_row
from edgeprune.lowering.kernel_graph import KernelGraph, lower
from edgeprune.profiling import tiled_draws
from edgeprune.profiling.selecting import Selection, preview_of, select
from edgeprune.profiling.subjects import Subject, lowered_subjects
from edgeprune.profiling.tiled_draws import TiledDraw
from edgeprune.spec import Fingerprint, Measurement

TILE = (8, 16)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm1, self.norm2 = nn.Linear(8, 32), nn.LayerNorm(32), nn.LayerNorm(32)
        self.qkv, self.proj = nn.Linear(32, 96), nn.Linear(32, 32)
        self.fc1, self.fc2, self.head = nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.head((x + self.fc2(F.gelu(self.fc1(self.norm2(x))))).mean(1))


@pytest.fixture(scope="module")
def lowered(tmp_path_factory: pytest.TempPathFactory) -> KernelGraph:
    torch.manual_seed(0)
    model = Layer().eval()
    return lower(trace(model, torch.zeros(1, 16, 8)), model=model, workdir=tmp_path_factory.mktemp("lowered"))


@pytest.fixture(scope="module")
def subject(lowered: KernelGraph) -> Subject:
    return Subject("layer", "", lowered, (TILE,))


@pytest.mark.parametrize("draw", [TiledDraw(TILE, 0.5, 0), TiledDraw((16, 32), 0.4, 3)])
def test_the_engine_that_is_timed_runs_the_kernels_that_are_told(
    subject: Subject, draw: TiledDraw, tmp_path: Path
) -> None:
    engine = tmp_path / "tiled.onnx"
    engine.write_bytes(subject.engine(draw))
    executed = Counter(kernel.key for kernel in subject.kernel_graph.backend.parse_engine(engine))
    told = Counter(kernel.key for kernel in subject.kernels(draw))
    assert told == executed
    assert {"Concat", "MatMul"} <= {kernel.op for kernel in subject.kernels(draw)}
    assert subject.widths(draw) == subject.kernel_graph.graph.widths()


def test_draws_say_the_same_twice_and_go_through_all_shares(subject: Subject) -> None:
    found = tiled_draws.draws((TILE, (16, 16)), seed=1)
    assert [draw.share for draw in found] == [*tiled_draws.SHARES, *tiled_draws.SHARES]
    assert found != tiled_draws.draws((TILE, (16, 16)), seed=2)
    left = []
    for draw in found[: len(tiled_draws.SHARES)]:
        plan, again = subject.plans.of(draw), tiled_draws.TiledPlans(subject.kernel_graph).of(draw)
        assert plan.hash == again.hash
        assert all(tiles.array().any() for tiles in plan.kept_tiles.values())
        left.append(sum(tiles.array().mean() for tiles in plan.kept_tiles.values()) / max(1, len(plan.kept_tiles)))
    # What whole inputs and outputs that go leave is among them.
    shown = {kernel.op for draw in found[: len(left)] for kernel in subject.kernels(draw)}
    assert {"Slice", "Split", "Concat", "MatMul"} <= shown
    assert left[0] < 0.35
    assert left[-1] > left[0] + 0.1
    assert [draw.tile for draw in tiled_draws.networks(((8, 8), TILE, (16, 16)), seed=0)[:3]] == [
        (8, 8),
        TILE,
        (16, 16),
    ]


def test_kernels_of_tiles_and_a_few_whole_networks_are_measured(subject: Subject) -> None:
    plain = select([replace(subject, tiles=())], [0.1], 20.0, seed=0)
    assert "Concat" not in {kernel.op for kernel in plain.kernels}
    found = select([subject], [0.1], 20.0, seed=0)
    measured = {kernel.op for kernel in found.kernels}
    assert {"Split", "Concat"} & measured == {"Split", "Concat"}
    dense = {kernel.key for kernel in subject.dense()}
    products = {kernel for kernel in found.kernels if kernel.op == "MatMul" and kernel.key not in dense}
    assert any(kernel.inputs[0][-1] % TILE[1] == 0 and kernel.output[-1] % TILE[0] == 0 for kernel in products)
    assert Selection.from_record(found.record()) == found
    whole = found.candidates([subject])
    assert [name for name in whole if name.startswith("tiles-")] == ["tiles-00", "tiles-01", "tiles-02"]
    assert next(iter(whole)) == "dense"
    seen = preview_of(found, [subject], None)
    assert seen.networks == len(whole)
    assert seen.wanted == seen.to_measure


def test_what_a_table_holds_of_tiles_is_not_measured_again(subject: Subject) -> None:
    from edgeprune.latency.fitting import fit

    first = select([subject], [0.1], 20.0, seed=0)
    held = first.kernels[::8]

    def timed(ms: float) -> Measurement:
        return Measurement(ms, ms, ms, 0.01, (ms, ms * 1.01), 6)

    header = {
        "identity": {"architecture": subject.kernel_graph.architecture, "isa": list(subject.kernel_graph.isa)},
        "runtime": "onnxruntime",
        "threads": 1,
        "precision": "fp32",
    }
    networks = [
        network_row(name, subject.kernels(candidate), timed(0.1), subject.widths(candidate))
        for name, (_, candidate) in first.candidates([subject]).items()
        if name == "dense" or name.startswith("tiles-")
    ]
    table = LatencyTable.from_rows(header, [*(kernel_row(one, timed(0.01)) for one in held), *networks])
    again = select([subject], [0.1], 20.0, seed=0, predictor=fit(table))
    assert again.tiled == ((),)
    assert not set(again.kernels) & set(held)


def test_what_has_no_tiles_is_told_before_anything_is_measured(
    board: Board, lowered: KernelGraph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4)).eval()
    narrow = lower(trace(small, torch.zeros(2, 8)), model=small, workdir=tmp_path / "narrow")
    probed = Fingerprint(lowered.architecture, "a CPU", lowered.isa, 1, {}, 1, "", "", "", "", {}, None, None, 1, 0.0)
    given: tuple[Any, ...] = (small, torch.zeros(2, 8), "onnxruntime", board, probed, tmp_path)
    with pytest.raises(ConfigError, match=r"must be smaller than a linear layer of the model .* larger than 256x256"):
        lowered_subjects(*given, kernel_graph=narrow, tiles=((256, 256),))
    monkeypatch.setattr(lowered, "backend", registry.BACKENDS.make("tvm"))
    with pytest.raises(UnsupportedKernelError, match="those of tvm are not"):
        lowered_subjects(*given, kernel_graph=lowered, tiles=(TILE,))
