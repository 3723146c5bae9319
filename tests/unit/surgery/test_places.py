"""Channels that a convolution slides over: those that stay keep their places, zeros stand for those that are gone."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

import edgeprune
from edgeprune.errors import SurgeryError
from edgeprune.surgery.plan import PruningPlan, make_plan
from edgeprune.surgery.program_module import ProgramModule

C = 40
KEPT = (0, 1, 4, 5, 6, 10, *range(13, 40, 2))


class EfficientChannelAttention(nn.Module):
    """Wang et al., CVPR 2020, as timm writes it: a convolution over the means of the channels scales them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, C, 3, padding=1), nn.BatchNorm2d(C)
        self.over = nn.Conv1d(1, 1, 5, padding=2, bias=True)
        self.head = nn.Linear(C, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        means = x.mean((2, 3)).view(x.shape[0], 1, -1)
        scales = self.over(means).view(x.shape[0], -1, 1, 1).sigmoid()
        return self.head((x * scales).mean((2, 3)))


class Padded(EfficientChannelAttention):
    """The ends see each other, so zeros would not do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        means = nn.functional.pad(x.mean((2, 3)).unsqueeze(1), (2, 2), mode="circular")
        scales = nn.functional.conv1d(means, self.over.weight).squeeze(1)[:, :, None, None]
        return self.head((x * scales).mean((2, 3)))


@pytest.fixture
def net() -> EfficientChannelAttention:
    torch.manual_seed(0)
    return EfficientChannelAttention().eval()


@pytest.fixture
def plan(net: EfficientChannelAttention) -> PruningPlan:
    graph = edgeprune.trace(net, torch.randn(2, 3, 8, 8))
    assert [(group.name, group.size) for group in graph.groups] == [("stem", C)]
    return make_plan(graph, {"stem": KEPT})


def by_hand(net: EfficientChannelAttention, x: torch.Tensor) -> torch.Tensor:
    """The kernel at the original distances of the channels that stay, term by term."""
    x = torch.relu(net.norm(net.stem(x)))
    means = x.mean((2, 3))
    total = torch.zeros(len(x), 4) + net.head.bias
    for at in KEPT:
        near = sum(net.over.weight[0, 0, 2 + other - at] * means[:, other] for other in KEPT if abs(other - at) <= 2)
        total = total + net.head.weight[:, at] * (means[:, at] * (net.over.bias + near).sigmoid())[:, None]
    return total


def test_the_cut_model_sees_the_channels_that_stay_at_their_original_distances(
    net: EfficientChannelAttention, plan: PruningPlan
) -> None:
    cut = edgeprune.apply(net, plan)
    assert isinstance(cut, ProgramModule)
    for batch in (1, 3):
        x = torch.randn(batch, 3, 8, 8)
        assert torch.allclose(cut(x), by_hand(net, x), atol=1e-6)
    assert edgeprune.check(net, plan, torch.randn(2, 3, 8, 8)) < 1e-12


def test_the_cut_model_trains_copies_and_reloads(
    net: EfficientChannelAttention, plan: PruningPlan, tmp_path: Path
) -> None:
    cut = edgeprune.apply(net, plan)
    x = torch.randn(4, 3, 8, 8)
    plan.save(tmp_path / "plan.json")
    again = edgeprune.apply(net, PruningPlan.load(tmp_path / "plan.json"))
    edgeprune.save(cut, tmp_path / "saved", plan=plan)
    for other in (copy.deepcopy(cut), again, edgeprune.load(tmp_path / "saved")):
        assert torch.equal(other(x), cut(x))
    assert set(cut.state_dict()) == set(net.state_dict())
    optimizer = torch.optim.SGD(cut.train().parameters(), lr=0.1)
    losses = []
    for _ in range(5):
        loss = cut(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert cut.over.weight.grad.any()


def test_operations_of_two_plans_are_equal_where_their_places_are(
    net: EfficientChannelAttention, plan: PruningPlan
) -> None:
    graph = edgeprune.trace(net, torch.randn(2, 3, 8, 8))
    found = []
    for kept in (KEPT, (*KEPT[:-1], 38)):
        nodes = make_plan(graph, {"stem": kept}).program["nodes"]
        found.append([str(node["args"]) for node in nodes if node["op"].startswith("aten.index_select")])
    assert found[0] == [str(n["args"]) for n in plan.program["nodes"] if n["op"].startswith("aten.index_select")]
    assert not set(found[0]) & set(found[1])


def test_without_a_program_the_cut_is_refused(net: EfficientChannelAttention, plan: PruningPlan) -> None:
    with pytest.raises(SurgeryError, match=r"aten\.conv1d\.default at .*test_places\.py:\d+"):
        edgeprune.apply(net, dataclasses.replace(plan, program=None, note="it was lost"))


def test_channels_whose_ends_see_each_other_stay() -> None:
    graph = edgeprune.trace(Padded().eval(), torch.randn(2, 3, 8, 8))
    assert not graph.groups
    assert any("padded with copies" in axis.reason for axis in graph.frozen)
