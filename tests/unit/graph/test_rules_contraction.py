"""Convolutions and linear layers: which inputs and outputs go together, against a perturbation of inputs and weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from edgeprune.graph.tracing import trace

C, H = 8, 6


class Between(nn.Module):
    """A convolution, the layer, and a sum over everything (which pins nothing)."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.a, self.layer = nn.Conv2d(3, C, 1), layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(self.a(x)).double().sum()


CONTRACTIONS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    # layer on 8 channels, units among its inputs, units among its outputs
    "conv2d": (lambda: nn.Conv2d(C, 6, 3), C, 6),
    "conv2d same": (lambda: nn.Conv2d(C, 6, 3, padding="same"), C, 6),
    "depthwise": (lambda: nn.Conv2d(C, C, 3, groups=C), C, C),
    "depthwise with a multiplier": (lambda: nn.Conv2d(C, 2 * C, 3, groups=C), C, C),
    "grouped": (lambda: nn.Conv2d(C, 12, 3, groups=2), C // 2, 6),
    "transposed": (lambda: nn.ConvTranspose2d(C, 6, 2, 2), C, 6),
    "transposed depthwise": (lambda: nn.ConvTranspose2d(C, C, 2, 2, groups=C), C, C),
    "transposed grouped": (lambda: nn.ConvTranspose2d(C, 12, 2, 2, groups=2), C // 2, 6),
}


@pytest.mark.parametrize("name", CONTRACTIONS)
def test_a_contraction_reads_by_its_weight_and_makes_by_its_weight(name: str) -> None:
    make, inputs, outputs = CONTRACTIONS[name]
    layer = make()
    graph = trace(Between(layer), torch.randn(2, 3, H, H))
    (into,) = graph.unit_of["conv2d"][1]
    node = next(n for n in reversed(graph.program.graph.nodes) if "conv" in str(n.target))
    (out,) = graph.unit_of[node.name][1]
    assert len(set(into.tolist()) - {-1}) == inputs
    assert len(set(out.tolist()) - {-1}) == outputs
    reads = _dependence(layer)
    for unit in set(into.tolist()) & set(out.tolist()) - {-1}:
        assert set((into == unit).nonzero()[0].tolist()) == {
            i for i in range(C) for o in (out == unit).nonzero()[0].tolist() if reads[o, i]
        }
    for member in (m for g in graph.groups for m in g.members if m.parameter == "layer.weight"):
        for indices in member.indices:
            _compare_with_weight(layer, member.role, member.axis, indices, into, out)


def _dependence(layer: nn.Module) -> torch.Tensor:
    """Which outputs change when one input channel changes."""
    x = torch.randn(1, C, H, H)
    rows = []
    for channel in range(C):
        moved = x.clone()
        moved[:, channel] += 1 + torch.rand(H, H)
        with torch.no_grad():
            rows.append((layer(x) != layer(moved)).any(dim=3).any(dim=2)[0])
    return torch.stack(rows, dim=1)


def _compare_with_weight(layer: Any, role: str, axis: int, indices: tuple[int, ...], into: Any, out: Any) -> None:
    """Perturbing these weight slices moves exactly the outputs of one unit, or only matters with its inputs."""
    x = torch.randn(1, C, H, H)
    with torch.no_grad():
        before = layer(x)
        saved = layer.weight.clone()
        layer.weight.index_add_(
            axis, torch.tensor(indices), torch.ones_like(saved.index_select(axis, torch.tensor(indices)))
        )
        if role == "input":
            codes = {int(c) for c in into.tolist()}
            for code in codes:
                silent = x * torch.from_numpy(into != code).reshape(1, C, 1, 1)
                layer_out = layer(silent)
                layer.weight.copy_(saved)
                same = torch.allclose(layer_out, layer(silent), atol=1e-6)
                layer.weight.index_add_(
                    axis, torch.tensor(indices), torch.ones_like(saved.index_select(axis, torch.tensor(indices)))
                )
                if same:
                    break
            else:
                pytest.fail("no unit of the inputs owns these weights")
        else:
            moved = (layer(x) != before).any(dim=3).any(dim=2)[0].nonzero().flatten().tolist()
            assert len({int(out[i]) for i in moved}) == 1
            assert moved == (out == out[moved[0]]).nonzero()[0].tolist()
        layer.weight.copy_(saved)


def test_linear_reads_the_last_axis() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.Linear(5, 2))
    graph = trace(model, torch.randn(2, 7, 4))
    assert graph.widths() == {"0": 6, "2": 5}
    assert {(m.parameter, m.axis) for m in graph.group("0").members} == {
        ("0.weight", 0),
        ("0.bias", 0),
        ("2.weight", 1),
    }
