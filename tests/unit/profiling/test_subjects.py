"""The names that models get in a table."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from edgeprune.boards.board import Board
from edgeprune.latency.table import LatencyTable
from edgeprune.profiling.subjects import lowered_subjects

TABLE = Path(__file__).parents[2] / "data" / "onnxruntime_avx512_kernels.parquet"


def test_two_models_of_a_table_have_two_names(board: Board, tmp_path: Path) -> None:
    stored = LatencyTable.load(TABLE)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    known = {"name": "build", "signature": "another", "inputs": [[1, 3, 8, 8]], "dense": "dense", "networks": []}
    table = LatencyTable({**stored.header, "models": [known]}, stored.rows)
    (subject,) = lowered_subjects(
        {"build": net},
        {"build": torch.zeros(1, 3, 8, 8)},
        "onnxruntime",
        board,
        board.probe(),
        tmp_path / "engines",
        table=table,
    )
    assert (subject.name, subject.network(0)) == ("build-2", "build-2/dense")
