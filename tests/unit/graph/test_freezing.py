"""What an operation touches that has no rule, or one that does not fit, is frozen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edgeprune.graph.rules import elementwise
from edgeprune.graph.rules._base import Rule
from edgeprune.graph.tracing import trace
from edgeprune.surgery.checking import check
from edgeprune.surgery.plan import uniform_plan

X = torch.randn(1, 3, 16, 16)


class Unruled(nn.Module):
    def __init__(self, op: Any) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)
        self.op = op

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.b(F.relu(self.a(x))))
        return self.c(self.op(x))


@pytest.mark.parametrize(
    ("op", "name"),
    [
        (lambda x: torch.cummax(x, 1)[0], "aten.cummax.default"),
        (lambda x: torch.fft.fft(x, dim=1).real, "aten.fft_fft.default"),
        (lambda x: torch.linalg.matrix_exp(x), "aten.linalg_matrix_exp.default"),
    ],
)
def test_an_operation_without_a_rule_freezes_only_what_it_touches(op: Any, name: str) -> None:
    graph = trace(Unruled(op), X)
    assert graph.widths() == {"a": 8}
    frozen = next(axis for axis in graph.frozen if axis.name == "b")
    assert frozen.size == 8
    assert frozen.op == name
    assert frozen.reason == f"{name} has no rule"
    assert frozen.source.rpartition(":")[0] == __file__
    assert f"b: 8 wide: {name} has no rule ({name} at {__file__}" in graph.explain()


def test_a_rule_that_does_not_fit_freezes_what_it_touches(monkeypatch: pytest.MonkeyPatch) -> None:
    def misfit(walk: Any, call: Any) -> Any:
        raise ValueError("nobody thought of this")

    monkeypatch.setitem(elementwise.TABLE, "aten.sigmoid.default", Rule(misfit))
    graph = trace(Unruled(torch.sigmoid), X)
    assert graph.widths() == {"a": 8}
    frozen = next(axis for axis in graph.frozen if axis.name == "b")
    assert frozen.reason == "aten.sigmoid.default is used in a way that its rule does not know"


class PerSample(nn.Module):
    """Every sample has its own convolution, as in dynamic convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.mix, self.c = nn.Conv2d(3, 8, 1), nn.Linear(8, 4), nn.Linear(6, 2)
        self.weights = nn.Parameter(torch.randn(4, 6, 8, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x)
        batch, channels, *sides = x.shape
        mixed = self.mix(x.mean((2, 3))).softmax(1) @ self.weights.view(4, -1)
        y = F.conv2d(x.reshape(1, batch * channels, *sides), mixed.view(batch * 6, 8, 1, 1), groups=batch)
        return self.c(y.view(batch, 6, *sides).mean((2, 3)))


def test_conv_groups_that_follow_the_batch_freeze_what_they_touch() -> None:
    graph = trace(PerSample(), X)
    assert graph.dynamic_batch
    reasons = {axis.name: axis.reason for axis in graph.frozen}
    assert reasons["a"] == "it has as many conv groups as there are samples"
    assert check(graph.model, uniform_plan(graph, 0.5), X) < 1e-9
