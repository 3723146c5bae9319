"""Stages that follow from what was measured, for real: doubt, then steps, interrupted in the middle of one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from edgeprune.boards.board import Board
from edgeprune.latency.fitting import fit
from edgeprune.latency.table import LatencyTable
from edgeprune.profiling import refining, selecting
from edgeprune.profiling.run import profile

INPUT = torch.zeros(1, 3, 16, 16)
KERNELS = 6


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 48, 3, padding=1), nn.ReLU(), nn.Conv2d(48, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 8, 1)
    ).eval()


@pytest.fixture
def three_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time for three short stages, however slow the machine is: how time is shared out is tested with no clock."""
    left = iter([KERNELS] * 5)
    monkeypatch.setattr(selecting, "LEAST_REFINE_S", 0.1)
    monkeypatch.setattr(refining, "affordable", lambda *times: next(left, 0))


@pytest.mark.usefixtures("three_stages")
@pytest.mark.slow
def test_stages_are_decided_once_and_an_interrupted_one_goes_on(board: Board, model: nn.Module, tmp_path: Path) -> None:
    out = tmp_path / "table.parquet"
    settings: dict[str, Any] = {"minutes": 0.04, "out": out}

    def interrupt(done: int, total: int, left_s: float, message: str) -> None:
        if message.startswith("the edges of steps: round") and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        profile(model, INPUT, board, progress=interrupt, **settings)
    assert not out.exists()
    lines = (tmp_path / "table.parquet.selection.jsonl").read_text().splitlines()
    selection, doubted, first_steps = (json.loads(line) for line in lines[1:])
    assert (doubted["why"], first_steps["why"]) == (refining.DOUBTED, refining.STEPS)
    assert 0 < len(first_steps["kernels"]) <= KERNELS
    assert first_steps["lines"]
    begun = (tmp_path / "table.parquet.journal-2.jsonl").read_text()
    assert begun.count('"kind":"sample"') >= 3

    seen: list[str] = []

    def watch(done: int, total: int, left_s: float, message: str) -> None:
        seen.append(message)
        assert (tmp_path / "table.parquet.journal-2.jsonl").read_text().startswith(begun)
        assert (tmp_path / "table.parquet.selection.jsonl").read_text().splitlines()[: len(lines)] == lines

    table = profile(model, INPUT, board, progress=watch, **settings)
    assert any(message.startswith("the edges of steps") for message in seen)
    assert LatencyTable.load(out).hash == table.hash
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["table.parquet"]
    measured = {kernel.key for kernel in table.kernels} | set(table.header["unsupported"])
    stages = [selection["kernels"], doubted["kernels"], first_steps["kernels"]]
    assert set().union(*stages) <= measured
    assert len(set().union(*stages)) == sum(map(len, stages)), "no kernel is chosen twice"
    for edge in table.header["edges"]:
        assert edge["at_ms"] > 0
        assert edge["width"] > 1
    assert len(fit(table).report().edges) == len(table.header["edges"])
