import numpy as np
import pytest
import torch
from torch import nn

import edgeprune
from edgeprune.allocation.exact import Exact
from edgeprune.allocation.resources import MultiplyAccumulates, Parameters
from edgeprune.allocation.terms import Limit
from edgeprune.criteria.damage import damage_curves
from edgeprune.surgery.magnitude import l2_norms
from edgeprune.surgery.plan import make_plan
from edgeprune.testing.additive import LayeredCost


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3)
        self.norm = nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, groups=16)
        self.second = nn.Conv2d(16, 24, 1)
        self.head = nn.Linear(40, 10)

    def forward(self, x):
        wide = self.depthwise(self.norm(self.first(x)).relu())
        return self.head(torch.cat([wide, self.second(wide)], 1).mean((2, 3)))


@pytest.fixture(scope="module")
def graph():
    return edgeprune.trace(Net().eval(), torch.zeros(1, 3, 12, 12))


def cut_uniformly(graph, ratio):
    cut = edgeprune.apply(graph.model, edgeprune.uniform_plan(graph, ratio=ratio))
    widths = {}
    for group in graph.groups:
        member = next(member for member in group.members if member.role == "output")
        kept = dict(cut.named_parameters())[member.parameter].shape[member.axis]
        widths[group.name] = kept * group.size // graph.shapes({})[member.parameter][member.axis]
    assert widths != graph.widths()
    return cut, widths


def counted_by_running(model, inputs):
    total = 0

    def count(module, args, output):
        nonlocal total
        if isinstance(module, nn.Conv2d):
            total += (
                output.numel() * module.in_channels // module.groups * module.kernel_size[0] * module.kernel_size[1]
            )
        elif isinstance(module, nn.Linear):
            total += output.numel() * module.in_features

    handles = [module.register_forward_hook(count) for module in model.modules()]
    model(inputs)
    for handle in handles:
        handle.remove()
    return total


@pytest.mark.parametrize("ratio", [0.25, 0.5])
def test_parameters_are_those_of_the_cut_model(graph, ratio):
    cut, widths = cut_uniformly(graph, ratio)
    counted = Parameters(graph)
    assert counted.value(widths) == sum(parameter.numel() for parameter in cut.parameters())
    assert counted.value({}) == sum(parameter.numel() for parameter in graph.model.parameters())


def test_multiply_accumulates_are_those_of_the_cut_model(graph, tmp_path):
    lowered = edgeprune.lower(graph, workdir=tmp_path)
    counted = MultiplyAccumulates(lowered)
    inputs = torch.zeros(1, 3, 12, 12)
    assert counted.value({}) == counted_by_running(graph.model, inputs)
    cut, widths = cut_uniformly(graph, 0.5)
    assert counted.value(widths) == counted_by_running(cut, inputs)


def test_a_budget_of_parameters_is_met_where_it_binds(graph):
    counted = Parameters(graph)
    sizes = graph.widths()
    cost = LayeredCost(sizes, {name: tuple(range(size, size // 4, -2)) for name, size in sizes.items()}, (), 1.0)
    damage = damage_curves(l2_norms(graph), "log_share")
    most = 0.6 * counted.value({})
    found = Exact(gap=0.0).allocate(graph.groups, damage, cost, 2.0, limits=[Limit("parameters", counted, most)])
    assert 0.5 * most < counted.value(found.widths) <= most
    assert found.certificate.gap == pytest.approx(0, abs=1e-6)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3)
        self.first, self.norm = nn.Conv2d(16, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.second, self.last = nn.Conv2d(12, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        x = self.stem(x).relu()
        return self.head((x + self.last(self.second(self.norm(self.first(x)).relu()))).relu().mean((2, 3)))


def test_a_removed_block_counts_nothing(tmp_path):
    """Nor what has none of its widths: the biases and norms of its last layer."""
    graph = edgeprune.trace(Residual().eval(), torch.zeros(1, 3, 12, 12))
    stem = next(group.name for group in graph.groups if group.name != "first")
    for width in (16, 10):
        plan = make_plan(graph, {"first": (), stem: range(width)})
        cut = edgeprune.apply(graph.model, plan)
        widths = plan.widths()
        assert Parameters(graph).value(widths) == sum(parameter.numel() for parameter in cut.parameters())
        assert sum(
            float(term.at(*(np.array(form.at(widths)) for form in term.forms))) for term in Parameters(graph).terms()
        ) == Parameters(graph).value(widths)
    kernels = edgeprune.lower(graph, workdir=tmp_path)
    dense, without = (MultiplyAccumulates(kernels).value(widths) for widths in ({}, {"first": 0}))
    assert dense - without == 2 * 100 * 16 * 12 * 9
