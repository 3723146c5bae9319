"""The cost model on a real trace, a real lowering, and a predictor fitted to real measurements."""

import copy
import itertools
import random
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from edgeprune.allocation.cost import CostModel
from edgeprune.allocation.exact import Exact
from edgeprune.allocation.greedy import Greedy
from edgeprune.criteria.damage import damage_curves
from edgeprune.errors import BudgetInfeasibleError, ConfigError
from edgeprune.graph.tracing import trace
from edgeprune.latency.calibration import Calibration
from edgeprune.latency.fitting import fit
from edgeprune.latency.likeness import skeleton
from edgeprune.latency.table import LatencyTable
from edgeprune.lowering.kernel_graph import lower
from edgeprune.surgery.constraints import WidthRule

TABLE = Path(__file__).parents[2] / "data" / "onnxruntime_avx512_kernels.parquet"


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 3, padding=1)
        self.first = nn.Conv2d(64, 64, 3, padding=1)
        self.second = nn.Conv2d(64, 64, 3, padding=1)
        self.third = nn.Conv2d(64, 96, 3, stride=2, padding=1)
        self.head = nn.Linear(96, 10)

    def forward(self, images):
        hidden = self.stem(images).relu()
        hidden = (hidden + self.second(self.first(hidden).relu())).relu()
        return self.head(self.third(hidden).relu().mean((2, 3)))


@pytest.fixture(scope="module")
def lowered(tmp_path_factory):
    torch.set_num_threads(1)
    model = Net()
    predictor = fit(LatencyTable.load(TABLE))
    graph = trace(model, torch.zeros(1, 3, 28, 28))
    kernel_graph = lower(
        graph,
        model=model,
        device=predictor.table.header["identity"],
        workdir=tmp_path_factory.mktemp("engine"),
    )
    return kernel_graph, predictor


@pytest.fixture(scope="module")
def names(lowered):
    return [group.name for group in lowered[0].graph.groups]


def test_latency_is_the_predictors_for_the_lowered_kernels(lowered, names):
    kernel_graph, predictor = lowered
    widths = {names[0]: 48, names[1]: 17}
    expected = predictor.network(kernel_graph.at(widths))
    cost = CostModel(kernel_graph, predictor, about_ms=expected[0])
    assert cost.interval(widths) == pytest.approx(expected, rel=2e-3)
    cost = CostModel(kernel_graph, predictor)
    assert cost.interval(widths) == pytest.approx(cost.predictor.network(kernel_graph.at(widths)))
    assert cost.ms(widths) == cost.interval(widths)[0]
    assert cost.dense_ms == pytest.approx(predictor.network(kernel_graph.at(kernel_graph.graph.widths()))[0])
    many = [{}, widths, {names[2]: 3}]
    np.testing.assert_allclose(cost.many_ms(many), [cost.ms(one) for one in many])


def test_candidates_are_the_edges_of_the_staircase(lowered, names):
    kernel_graph, predictor = lowered
    cost = CostModel(kernel_graph, predictor)
    for name in names:
        edges = cost.candidates(name)
        size = kernel_graph.graph.group(name).size
        assert edges[0] == size
        assert list(edges) == sorted(set(edges), reverse=True)
        latencies = [cost.ms({name: width}) for width in edges]
        assert all(after < before for before, after in pairwise(latencies))
        # No width that was left out is both wider and faster than an edge.
        for width in range(1, size + 1):
            narrower = [edge for edge in edges if edge < width]
            if width not in edges and narrower:
                assert cost.ms({name: width}) > cost.ms({name: narrower[0]})
        # A vector of this machine holds 16 floats: far fewer edges than widths.
        assert 3 <= len(edges) <= size / 4


def test_candidates_respect_rules(lowered, names):
    kernel_graph, predictor = lowered
    rules = {
        names[0]: WidthRule(min_width=24, multiple_of=8),
        names[1]: WidthRule(frozen=True),
    }
    cost = CostModel(kernel_graph, predictor, rules=rules)
    assert all(width % 8 == 0 and width >= 24 for width in cost.candidates(names[0]))
    assert cost.candidates(names[1]) == (64,)


def test_tied_groups_have_the_edges_of_both_together(lowered, names):
    kernel_graph, predictor = lowered
    cost = CostModel(kernel_graph, predictor, rules={names[1]: WidthRule(tied_to=names[0])})
    edges = cost.candidates(names[0])
    assert edges == cost.candidates(names[1])
    latencies = [cost.ms({names[0]: width, names[1]: width}) for width in edges]
    assert all(after < before for before, after in pairwise(latencies))


def test_few_probes_still_hold_both_ends(lowered, names):
    kernel_graph, predictor = lowered
    cost = CostModel(kernel_graph, predictor, max_probes=10, noise=0.0)
    edges = cost.candidates(names[2])
    assert edges[0] == 96
    assert set(edges) <= {*range(16, 97, 16), 12}


def test_thousands_of_candidates_take_seconds(lowered, names):
    kernel_graph, predictor = lowered
    cost = CostModel(kernel_graph, predictor)
    draw = random.Random(0)
    sizes = kernel_graph.graph.widths()
    many = [{name: draw.randint(1, size) for name, size in sizes.items()} for _ in range(2000)]
    begun = time.process_time()
    first = cost.many_ms(many)
    assert time.process_time() - begun < 15
    begun = time.process_time()
    assert np.array_equal(cost.many_ms(many), first)
    assert time.process_time() - begun < 1


def test_greedy_meets_budgets_on_it(lowered, names):
    kernel_graph, predictor = lowered
    cost = CostModel(kernel_graph, predictor)
    scores = {group.name: np.random.default_rng(0).random(group.size) for group in kernel_graph.graph.groups}
    damage = damage_curves(scores, "log_share")
    for share in (0.8, 0.5, 0.3):
        found = Greedy().allocate(kernel_graph.graph.groups, damage, cost, share * cost.dense_ms)
        assert cost.ms(found.widths) <= share * cost.dense_ms


def test_an_infeasible_budget_is_explained(lowered, names):
    kernel_graph, predictor = lowered
    rules = dict.fromkeys(names[:2], WidthRule(frozen=True))
    cost = CostModel(kernel_graph, predictor, rules=rules)
    damage = {names[2]: np.arange(96, -1, -1.0)}
    with pytest.raises(
        BudgetInfeasibleError, match=r"kernels that no width changes hold \d+%.*2 of 3 groups are frozen"
    ):
        Greedy().allocate(kernel_graph.graph.groups, damage, cost, 0.2 * cost.dense_ms, rules)


def test_names_and_settings_are_checked(lowered):
    with pytest.raises(ConfigError, match="widths must name groups of the model, found nowhere"):
        CostModel(*lowered).ms({"nowhere": 3})
    with pytest.raises(ConfigError, match=r"noise must be a share in \[0, 1\), found 1.0"):
        CostModel(*lowered, noise=1.0)
    with pytest.raises(ConfigError, match="max_probes must be at least 2, found 1"):
        CostModel(*lowered, max_probes=1)


def test_what_the_parts_take_adds_up_to_the_latency(lowered, names):
    cost = CostModel(*lowered)
    many = [{}, {names[0]: 48, names[1]: 17}, {names[0]: 61, names[1]: 61, names[2]: 61}]
    for widths, parts in zip(many, cost.parts_ms(many), strict=True):
        assert sum(parts.values()) == pytest.approx(cost.ms(widths))
    nodes = {node for group in lowered[0].graph.groups for node in group.nodes}
    assert nodes & set(parts)


def test_they_add_up_where_the_model_has_a_calibration_of_its_own(lowered):
    """A table of several models: what is shared out is this model's calibration, not that of all."""
    kernel_graph, fitted = lowered
    predictor = copy.copy(fitted)
    own = Calibration(scale=1.3, per_kernel_ms=0.002, fixed_ms=0.05)
    predictor.calibrate(fitted.calibration, (), (), [(skeleton(kernel_graph.at(kernel_graph.graph.widths())), own)])
    cost = CostModel(kernel_graph, predictor)
    (parts,) = cost.parts_ms([{}])
    assert parts[""] == own.fixed_ms
    assert sum(parts.values()) == pytest.approx(cost.ms({}))
    assert cost.ms({}) != pytest.approx(CostModel(kernel_graph, fitted).ms({}))


@pytest.mark.parametrize("share", [0.7, 0.4])
def test_exact_meets_budgets_on_it_with_a_bound_and_no_more_damage_than_greedy(lowered, names, share):
    kernel_graph, predictor = lowered
    cost = CostModel(kernel_graph, predictor)
    scores = {group.name: np.random.default_rng(1).random(group.size) for group in kernel_graph.graph.groups}
    damage = damage_curves(scores, "log_share")
    found = Exact(gap=0.0).allocate(kernel_graph.graph.groups, damage, cost, share * cost.dense_ms)
    assert cost.ms(found.widths) <= share * cost.dense_ms
    greedy = Greedy().allocate(kernel_graph.graph.groups, damage, cost, share * cost.dense_ms)
    assert found.certificate.damage <= greedy.certificate.damage * (1 + 1e-9)
    assert found.certificate.table_error <= 0.05
    every = [
        dict(zip(names, widths, strict=True))
        for widths in itertools.product(*(cost.candidates(name) for name in names))
    ]
    within = [
        sum(damage[name][width] for name, width in widths.items())
        for widths, ms in zip(every, cost.many_ms(every), strict=True)
        if ms <= share * cost.dense_ms
    ]
    assert found.certificate.damage == pytest.approx(min(within), rel=0.02)
    assert found.certificate.damage >= min(within) * (1 - 1e-9)


class Concats(nn.Module):
    """Every layer reads what all before it made; one of them reads a width of its own too."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.layers = nn.ModuleList(nn.Conv2d(32 + 32 * index, 32, 3, padding=1) for index in range(4))
        self.last = nn.Conv2d(160, 64, 1)
        self.head = nn.Linear(64, 10)

    def forward(self, images):
        hidden = self.stem(images).relu()
        for layer in self.layers:
            hidden = torch.cat([hidden, layer(hidden).relu()], 1)
        return self.head(self.last(hidden).relu().mean((2, 3)))


def test_sums_of_widths_are_taken_apart_and_the_difference_is_told(lowered, tmp_path):
    _, predictor = lowered
    model = Concats()
    graph = trace(model, torch.zeros(1, 3, 28, 28))
    kernel_graph = lower(graph, model=model, device=predictor.table.header["identity"], workdir=tmp_path)
    scores = {group.name: np.random.default_rng(2).random(group.size) for group in graph.groups}
    damage = damage_curves(scores, "log_share")
    # Multiples of 8 change what is stored in blocks behind a concat, multiples of 16 do not.
    for multiple, most in ((16, 0.1), (8, 2.0)):
        rules = {group.name: WidthRule(multiple_of=multiple) for group in graph.groups}
        cost = CostModel(kernel_graph, predictor, rules=rules)
        found = Exact().allocate(graph.groups, damage, cost, 0.5 * cost.dense_ms, rules)
        assert cost.ms(found.widths) <= 0.5 * cost.dense_ms
        assert 0 < found.certificate.table_error < most
        assert "differ from the cost model by" in found.certificate.note
        greedy = Greedy().allocate(graph.groups, damage, cost, 0.5 * cost.dense_ms, rules)
        assert found.certificate.damage <= greedy.certificate.damage * 1.02
