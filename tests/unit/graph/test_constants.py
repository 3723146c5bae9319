"""Constants that removed units leave behind, against the model itself."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edgeprune.errors import PlanError
from edgeprune.graph.tracing import trace
from edgeprune.surgery.masking import randomize
from edgeprune.surgery.plan import make_plan

X = torch.randn(1, 3, 8, 8)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 6, 1)
        self.skip, self.head = nn.Conv2d(3, 6, 1), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.b(F.silu(self.norm(self.a(x))))
        return self.head((y + self.skip(x)).mean((2, 3)))


def _net() -> Net:
    torch.manual_seed(0)
    net = Net().eval()
    randomize(net)
    return net


def test_a_removed_channel_leaves_its_activated_shift() -> None:
    net = _net()
    graph = trace(net, X)
    plan = make_plan(graph, {"a": [0, 1, 2, 4, 6, 7]})
    found = {constant.index: constant.value for constant in graph.constants(plan)}
    assert found.keys() == {3, 5}
    norm = net.norm
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    expected = F.silu((net.a.bias - norm.running_mean) * scale + norm.bias)
    for index, value in found.items():
        assert value == pytest.approx(float(expected[index]), abs=1e-5)


def test_adding_the_constants_to_the_bias_is_what_zero_weights_compute() -> None:
    net = _net()
    graph = trace(net, X)
    plan = make_plan(graph, {"a": [1, 2, 5]})
    x = torch.randn(4, 3, 8, 8)
    zeroed, folded = _net(), _net()
    with torch.no_grad():
        for index in (0, 3, 4, 6, 7):
            zeroed.a.weight[index] = 0
        for constant in graph.constants(plan):
            assert (constant.group, constant.parameter) == ("a", "b.weight")
            folded.b.bias += folded.b.weight[:, constant.index, 0, 0] * constant.value
            folded.b.weight[:, constant.index] = 0
        assert torch.allclose(zeroed(x), folded(x), atol=1e-5)


def test_channels_that_two_layers_make_are_constants_of_both() -> None:
    net = _net()
    graph = trace(net, X)
    group = next(group for group in graph.groups if "b.weight" in {member.parameter for member in group.members[:2]})
    plan = make_plan(graph, {group.name: [0, 1, 2]})
    found = [constant for constant in graph.constants(plan) if constant.parameter == "head.weight"]
    assert [constant.index for constant in found] == [3, 4, 5]
    expected = net.b.bias + net.skip.bias
    assert [constant.value for constant in found] == pytest.approx(expected[3:].tolist(), abs=1e-5)


class Mixed(nn.Module):
    """The channels are multiplied by a gate, so what a zero weight leaves depends on the input."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.gate, self.b = nn.Conv2d(3, 8, 1), nn.Linear(3, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x) * self.gate(x.mean((2, 3)))[:, :, None, None]).mean((2, 3))


def test_what_depends_on_the_input_is_no_constant() -> None:
    graph = trace(Mixed().eval(), X)
    assert graph.constants(make_plan(graph, {"a": [0, 1]})) == ()


def test_a_plan_of_another_model_has_no_constants() -> None:
    graph, other = trace(_net(), X), trace(Mixed().eval(), X)
    with pytest.raises(PlanError, match="must belong to the traced model"):
        graph.constants(make_plan(other, {"a": [0, 1]}))
