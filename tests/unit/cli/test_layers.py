"""`edgeprune layers`: kernels of an artifact by ONNX Runtime's own trace, on this machine as the board."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgeprune.testing.command_line import CommandLine

NET = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 61, 3, padding=1)
        self.head = nn.Linear(61, 5)

    def forward(self, x):
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))).mean((2, 3)))


def build():
    torch.manual_seed(0)
    return Net().eval()
"""


@pytest.fixture
def command(tmp_path: Path) -> CommandLine:
    (tmp_path / "net.py").write_text(NET)
    found = CommandLine(tmp_path, tmp_path / "board")
    found.succeed("compile", "net.py:build", "--input", "x=1x3x24x24", "--out", "artifact")
    return found


def test_kernels_are_told_in_order_with_the_layers_that_they_compute(command: CommandLine) -> None:
    told = json.loads(command.succeed("layers", "artifact", "--json"))
    kernels = told["kernels"]
    convolutions = [one for one in kernels if "Conv" in one["op"]]
    assert [one["module"] for one in convolutions] == ["first", "second"]
    # Ten times the products of the first, and both with the activation behind them.
    assert convolutions[1]["us"] > convolutions[0]["us"] > 0
    assert any(one["module"] == "head" for one in kernels)
    assert not any(one["op"] == "Relu" for one in kernels)
    assert sum(one["share"] for one in kernels) == pytest.approx(1)
    assert told["sum_ms"] == pytest.approx(sum(one["us"] for one in kernels) / 1e3)
    assert told["whole_ms"] > 0
    assert told["next"] == "edgeprune deploy artifact --board local --dry-run"
