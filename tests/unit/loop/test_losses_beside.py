"""Models that begin alike are computed from where they differ, and come to the same bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from edgeprune.criteria import common_prefix
from edgeprune.criteria.common_prefix import Prefix, common_operations
from edgeprune.criteria.l2 import L2
from edgeprune.graph.branches import emptied
from edgeprune.graph.tracing import trace
from edgeprune.loop.in_context import PlanLoss, changed
from edgeprune.surgery.cutting import cut_program
from edgeprune.tasks.task import Task


class Block(nn.Module):
    def __init__(self, reads_stem: bool) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.relu, self.reads_stem = nn.ReLU(inplace=True), reads_stem

    def forward(self, x, stem):
        inner = self.relu(self.bn1(self.conv1(x + stem if self.reads_stem else x)))
        return self.relu(self.bn2(self.conv2(inner)).add_(x))


class Net(nn.Module):
    """Blocks that work in place; the last one reads what nothing else does any more by then."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.blocks = nn.ModuleList(Block(reads_stem=at == 3) for at in range(4))
        self.head = nn.Linear(8, 5)

    def forward(self, images):
        stem = self.bn(self.stem(images))
        x = stem
        for block in self.blocks:
            x = block(x, stem)
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def task() -> Task:
    generator = torch.Generator().manual_seed(3)
    images, labels = torch.randn(12, 3, 9, 9, generator=generator), torch.arange(12) % 5
    batches = list(zip(images.split(4), labels.split(4), strict=True))
    return Task.single(
        train=batches, validation=batches, loss=nn.CrossEntropyLoss(), metric=lambda outputs, labels: 0.0
    )


@pytest.fixture(scope="module")
def case(task):
    torch.manual_seed(0)
    model = Net()
    graph = trace(model, torch.zeros(1, 3, 9, 9))
    scores = L2().score(graph, model, task)
    sizes = graph.widths()
    leads = [branch.lead for branch in graph.branches]
    assert len(leads) == 4
    # One block is gone already, another is narrow.
    widths = emptied(graph.branches, {**sizes, leads[1]: 0, leads[3]: 0, leads[2]: 4})
    others = [
        changed(graph, (name,), widths, width)
        for name, size in sizes.items()
        for width in (
            (0, size // 2, size) if name in leads and widths[name] else (size if name in leads else size // 2,)
        )
        if widths[name] != width
    ]
    return model, graph, scores, widths, others


@pytest.mark.parametrize("most_bytes", [2**30, 6_000, 0])
def test_losses_beside_a_plan_are_those_of_each_alone_to_the_bit_and_take_less(case, task, monkeypatch, most_bytes):
    model, graph, scores, widths, others = case
    monkeypatch.setattr(common_prefix, "MOST_BYTES", most_bytes)
    alone, beside = (PlanLoss(model, graph, scores, task) for _ in range(2))
    with FlopCounterMode(display=False) as one_by_one:
        wanted = [alone.at(other) for other in others]
    told = []
    with FlopCounterMode(display=False) as together:
        beside.measure_beside(widths, others, lambda done, total: told.append((done, total)))
    known = dict(beside._known)
    assert [beside.at(other) for other in others] == wanted
    assert len(set(wanted)) == len(wanted), "the changes must differ, or this shows nothing"
    assert beside._known == known, "nothing was left to be measured"
    assert told == [(at + 1, len(others)) for at in range(len(others))]
    share = together.get_total_flops() / one_by_one.get_total_flops()
    assert share < 0.8 if most_bytes > 6_000 else share < 1.2
    assert all(
        torch.equal(one, two) for (one, _), (two, _) in zip(task.objectives[0].train, beside._batches[0], strict=True)
    )


def test_what_was_measured_is_not_measured_again(case, task):
    model, graph, scores, widths, others = case
    loss = PlanLoss(model, graph, scores, task)
    loss.measure_beside(widths, others[:2])
    told = []
    loss.measure_beside(widths, others[:3], lambda done, total: told.append((done, total)))
    assert told == [(1, 1)]


def test_a_prefix_ends_where_programs_or_weights_differ(case, task):
    model, graph, scores, widths, _ = case
    loss = PlanLoss(model, graph, scores, task)
    own = loss._plan(widths)
    nodes = [node["name"] for node in own.program["nodes"]]
    assert common_operations(own, own) == len(nodes)
    other = loss._plan({**widths, "blocks.2.conv1": 3})
    place = common_operations(own, other)
    assert own.program["nodes"][place]["args"]["weight"]["node"].endswith("blocks_2_conv1_weight")
    module = cut_program(model, own).eval()
    prefix = Prefix(module, [torch.ones(2, 3, 9, 9)], 2**20)
    prefix.advance(place, {nodes[0]})
    with torch.no_grad():
        whole = module(torch.ones(2, 3, 9, 9))
    np.testing.assert_array_equal(prefix.outputs(module, 0), whole)
