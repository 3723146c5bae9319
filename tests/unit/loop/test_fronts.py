"""A front where what weights cost depends on how long the network takes: each point is priced at its own length."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from edgeprune.graph.tracing import trace
from edgeprune.latency.calibration import Calibration
from edgeprune.latency.features import weight_bytes
from edgeprune.latency.fitting import fit
from edgeprune.latency.table import LatencyTable
from edgeprune.loop.fronts import WIDTH
from edgeprune.loop.pareto import pareto
from edgeprune.loop.planning import Planner
from edgeprune.loop.pruning import prune
from edgeprune.lowering.kernel_graph import lower
from edgeprune.spec import Constraints

TABLE = Path(__file__).parents[2] / "data" / "onnxruntime_avx512_kernels.parquet"
EXAMPLE = torch.zeros(1, 3, 14, 14)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 64, 3, padding=1), nn.Conv2d(64, 96, 3, padding=1)
        self.third, self.head = nn.Conv2d(96, 128, 3, padding=1), nn.Linear(128, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = self.second(self.first(images).relu()).relu()
        return self.head(self.third(hidden).relu().mean((2, 3)))


class Case:
    """A network, and predictors whose caches forget: weights cost half as much again as all else, or next to nothing."""

    def __init__(self, folder: Path) -> None:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        self.model = Net()
        fitted = fit(LatencyTable.load(TABLE))
        graph = trace(self.model, EXAMPLE)
        device = fitted.table.header["identity"]
        self.kernel_graph = lower(graph, model=self.model, device=device, workdir=folder)
        kernels = self.kernel_graph.at(graph.widths())
        sum_ms = float(fitted.kernel_ms(kernels).sum())
        read = sum(weight_bytes(kernel) for kernel in kernels)
        prices = {kernel.op: 0.5 * sum_ms / read for kernel in kernels if weight_bytes(kernel)}
        self.calibration = Calibration(1.0, 0.0, 0.1 * sum_ms, prices, networks=9, kept_ms=sum_ms)
        self.predictor = copy.copy(fitted)
        self.predictor.calibrate(self.calibration, (), ())
        self.flat = copy.copy(fitted)
        self.flat.calibrate(replace(self.calibration, kept_ms=0.0), (), ())
        self.constraints = Constraints(multiple_of={"*": 8})

    def planner(self, predictor) -> Planner:
        return Planner(self.model, self.kernel_graph, predictor, constraints=self.constraints)

    def own_ms(self, predictor, widths) -> float:
        return predictor.network_ms(self.kernel_graph.at({**self.kernel_graph.graph.widths(), **widths}))


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> Case:
    return Case(tmp_path_factory.mktemp("lowered"))


@pytest.fixture(scope="module")
def every(case):
    """Own latency and damage of all that could be chosen, by ascending latency."""
    planner = case.planner(case.predictor)
    names = [group.name for group in case.kernel_graph.graph.groups if group.name in planner.damage]
    candidates = [planner.cost.candidates(name) for name in names]
    found = []
    for widths in itertools.product(*candidates):
        damage = sum(planner.damage[name][width] for name, width in zip(names, widths, strict=True))
        found.append((case.own_ms(case.predictor, dict(zip(names, widths, strict=True))), damage))
    assert len(found) > 100
    return sorted(found)


@pytest.fixture(scope="module")
def front(case):
    return pareto(
        case.model,
        EXAMPLE,
        case.predictor,
        constraints=case.constraints,
        kernel_graph=case.kernel_graph,
        points=9,
    )


def test_each_point_is_predicted_as_the_network_that_it_is(case, front):
    assert len(front) >= 5
    for proposal in front:
        own_ms = case.own_ms(case.predictor, proposal.plan.widths())
        assert proposal.predicted_ms == pytest.approx(own_ms, rel=1e-9)
        assert proposal.allocation.certificate.predicted_ms == pytest.approx(own_ms, rel=1e-9)
        assert proposal.predicted_ms <= proposal.aim_ms
        assert proposal.plan.predicted["latency_ms"] == pytest.approx(own_ms, rel=1e-9)
    # At the length of the dense model quick ones would be much too slow.
    dense_priced = case.planner(case.predictor).cost
    assert max(dense_priced.ms(one.plan.widths()) / one.predicted_ms for one in front) > 1.1


def test_the_front_is_monotonic_and_goes_from_the_fastest_plan_to_the_dense_one(case, front, every):
    latencies = [proposal.predicted_ms for proposal in front]
    damages = [proposal.allocation.certificate.damage for proposal in front]
    assert latencies == sorted(latencies)
    assert damages == sorted(damages, reverse=True)
    assert len(set(latencies)) == len(set(damages)) == len(front)
    assert front[-1].plan.widths() == case.kernel_graph.graph.widths()
    assert latencies[0] == pytest.approx(every[0][0])


def test_points_are_as_good_as_all_that_could_be_tried_and_bounds_hold(front, every):
    certified = 0
    for proposal in front:
        certificate = proposal.allocation.certificate
        best = min(damage for ms, damage in every if ms <= proposal.aim_ms * (1 + 1e-9))
        # Prices of a band are those of its slowest networks: too high by its width, and tables may miss them.
        slack = 1 - 1.5 * WIDTH - certificate.table_error
        near = min((damage for ms, damage in every if ms <= slack * proposal.aim_ms), default=float("inf"))
        assert best * (1 - 1e-9) <= certificate.damage <= near * (1 + 2e-3)
        if certificate.bound is not None:
            certified += 1
            assert certificate.bound <= certificate.damage
            assert certificate.bound <= near
            assert certificate.gap <= 0.5
    assert certified >= len(front) - 2
    assert any("The prices of its band have the plan at" in one.allocation.certificate.note for one in front)


def test_where_the_length_does_not_matter_one_set_of_prices_serves_all(case):
    planner = case.planner(case.flat)
    prepared = []
    once = planner.allocator.prepare

    def prepare(*arguments):
        prepared.append(arguments)
        return once(*arguments)

    planner.allocator.prepare = prepare
    found = planner.front(5)
    assert len(prepared) == 1
    for proposal in found:
        assert proposal.predicted_ms == pytest.approx(case.own_ms(case.flat, proposal.plan.widths()))
        assert proposal.allocation.certificate.predicted_ms == pytest.approx(proposal.predicted_ms)
        assert "prices" not in proposal.allocation.certificate.note


def test_a_planner_serves_budgets_at_the_prices_of_their_own_lengths(case):
    planner = case.planner(case.predictor)
    assert planner.about(planner.dense_ms * 0.5).about(planner.dense_ms * 0.5).scores is planner.scores
    flat = case.planner(case.flat)
    assert flat.about(0.5 * flat.dense_ms) is flat, "prices are those of the dense model at any length"
    more = []
    for share in ("60%", "40%"):
        served = prune(case.model, EXAMPLE, share, planner=planner)
        alone = prune(
            case.model,
            EXAMPLE,
            share,
            predictor=case.predictor,
            kernel_graph=case.kernel_graph,
            constraints=case.constraints,
        )
        assert served.plan.kept == alone.plan.kept
        assert served.predicted_ms == pytest.approx(alone.predicted_ms, rel=1e-9)
        # At the length of the dense model it would pass for slower, and more would be cut.
        assert planner.cost.ms(served.plan.widths()) > 1.02 * served.predicted_ms
        more.append(planner.propose(0.98 * served.budget_ms).allocation.certificate.damage - served.certificate.damage)
    assert min(more) >= 0 < max(more)


@pytest.mark.parametrize("allocator", ["uniform", "greedy"])
def test_searches_that_prove_nothing_have_such_a_front_too(case, allocator):
    planner = Planner(case.model, case.kernel_graph, case.predictor, constraints=case.constraints, allocator=allocator)
    found = planner.front(4)
    latencies = [proposal.predicted_ms for proposal in found]
    assert latencies == sorted(latencies)
    for proposal in found:
        assert proposal.predicted_ms == pytest.approx(case.own_ms(case.predictor, proposal.plan.widths()))
    assert found[-1].plan.widths() == case.kernel_graph.graph.widths()
    assert all(proposal.allocation.certificate.bound in (None, 0.0) for proposal in found)
