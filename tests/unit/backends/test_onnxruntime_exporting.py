"""Exports one after another: what torch finds out about its operators is kept between them, and the files are the same."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.onnx._internal.exporter._registration import ONNXRegistry

from edgeprune.backends.onnxruntime import exporting


def test_operators_are_looked_for_once_and_others_keep_their_own(tmp_path: Path) -> None:
    its_own = vars(ONNXRegistry)["from_torchlib"]
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8, 4)).eval()
    exporting._operators.cache_clear()
    for name in ("first", "second"):
        exporting.export(net, (torch.ones(1, 3, 4, 4),), tmp_path / name)
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()
    found = exporting._operators.cache_info()
    assert (found.misses, found.hits) == (1, 1)
    assert vars(ONNXRegistry)["from_torchlib"] is its_own, "whoever exports elsewhere may add operators"
