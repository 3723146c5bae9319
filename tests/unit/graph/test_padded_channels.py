"""Channels of zeros that forward pads in: they go with what is added to them, and stay where only a scale touches them."""

import torch
import torch.nn.functional as F
from torch import nn

import edgeprune


class _Padded(nn.Module):
    """Six channels and two of zeros, normalized by hand."""

    def __init__(self, shortcut):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.wide = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(3, 8, 1) if shortcut else None
        self.gamma, self.head = nn.Parameter(torch.rand(8) + 0.5), nn.Linear(8, 3)

    def forward(self, x):
        y = F.pad(self.conv(x), (0, 0, 0, 0, 0, 2))
        if self.wide is not None:
            y = y + self.wide(x)
        y = y.flatten(2).transpose(1, 2)
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.head(y * self.gamma).mean(1)


X = torch.randn(2, 3, 4, 4)


def test_zeros_that_only_a_scale_touches_stay():
    graph = edgeprune.trace(_Padded(shortcut=False), X)
    assert [group.size for group in graph.groups] == [6]
    plan = edgeprune.uniform_plan(graph, ratio=0.5)
    assert edgeprune.check(graph.model, plan, X) < 1e-9


def test_zeros_to_which_a_layer_is_added_go_with_it():
    graph = edgeprune.trace(_Padded(shortcut=True), X)
    assert sorted(group.size for group in graph.groups) in ([8], [2, 6])
    plan = edgeprune.uniform_plan(graph, ratio=0.5)
    assert plan.kept["head.weight"][1] != tuple(range(8))
    assert edgeprune.check(graph.model, plan, X) < 1e-9
