"""Kernels around a convolution that slides over channels: those of the cut model."""

from __future__ import annotations

from collections import Counter

import torch
from torch import nn

import edgeprune
from edgeprune.lowering.trained_form import in_trained_form
from edgeprune.surgery.plan import make_plan


class Scaled(nn.Module):
    """Channel attention by a convolution along the channels; the sigmoid can be fused into it, the sum cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 48, 1), nn.Linear(48, 4)
        self.over = nn.Conv1d(1, 1, 5, padding=2, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        scales = self.over(x.mean((2, 3)).unsqueeze(1)).sigmoid()
        return self.head((x * scales.reshape(x.shape[0], -1, 1, 1)).amax((2, 3)))


def test_kernels_around_a_sliding_convolution_are_those_of_the_cut_model(tmp_path):
    torch.manual_seed(0)
    net = Scaled().eval()
    graph = edgeprune.trace(net, torch.zeros(1, 3, 8, 8))
    lowered = edgeprune.lower(graph, workdir=tmp_path)
    assert [operator.op for operator in lowered.operators.operators].count("FusedConv") == 1
    plan = make_plan(graph, {"stem": range(0, 48, 2)})
    engine = tmp_path / "cut.onnx"
    lowered.backend.export(in_trained_form(edgeprune.apply(net, plan)), graph.example_inputs, engine)
    told = lowered.at({"stem": 24})
    assert Counter(k.key for k in told) == Counter(k.key for k in lowered.backend.parse_engine(engine))
    assert all(kernel.origin for kernel in told)
    assert [kernel.op for kernel in lowered.at({})].count("Gather") == 0
    engine.write_bytes(lowered.network_engine({"stem": 24}))
    assert Counter(k.key for k in told) == Counter(k.key for k in lowered.backend.parse_engine(engine))
