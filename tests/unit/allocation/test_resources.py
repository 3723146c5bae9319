import pytest
import torch
from torch import nn

import edgeprune
from edgeprune.allocation.exact import Exact
from edgeprune.allocation.resources import Parameters
from edgeprune.allocation.terms import Limit
from edgeprune.criteria.damage import damage_curves
from edgeprune.surgery.magnitude import l2_norms
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


@pytest.mark.parametrize("ratio", [0.25, 0.5])
def test_parameters_are_those_of_the_cut_model(graph, ratio):
    plan = edgeprune.uniform_plan(graph, ratio=ratio)
    cut = edgeprune.apply(graph.model, plan)
    names = {id(parameter): name for name, parameter in cut.named_parameters()}
    assert names
    widths = {}
    for group in graph.groups:
        member = next(member for member in group.members if member.role == "output")
        kept = dict(cut.named_parameters())[member.parameter].shape[member.axis]
        widths[group.name] = kept * group.size // graph.shapes({})[member.parameter][member.axis]
    assert widths != graph.widths()
    counted = Parameters(graph)
    assert counted.value(widths) == sum(parameter.numel() for parameter in cut.parameters())
    assert counted.value({}) == sum(parameter.numel() for parameter in graph.model.parameters())


def test_a_budget_of_parameters_is_met_where_it_binds(graph):
    counted = Parameters(graph)
    sizes = graph.widths()
    cost = LayeredCost(sizes, {name: tuple(range(size, size // 4, -2)) for name, size in sizes.items()}, (), 1.0)
    damage = damage_curves(l2_norms(graph), "log_share")
    most = 0.6 * counted.value({})
    found = Exact(gap=0.0).allocate(graph.groups, damage, cost, 2.0, limits=[Limit("parameters", counted, most)])
    assert 0.5 * most < counted.value(found.widths) <= most
    assert found.certificate.gap == pytest.approx(0, abs=1e-6)
