"""`prune` and what it is made of, by a table that is no machine's: the same in every run, and nothing is timed."""

import copy
import dataclasses
import json
import re

import numpy as np
import pytest
import torch
from torch import nn

from edgeprune.allocation.cost import CostModel
from edgeprune.budget import Budget
from edgeprune.criteria.calibration import DamageCalibration
from edgeprune.criteria.l2 import L2
from edgeprune.errors import (
    BudgetInfeasibleError,
    ConfigError,
    ConstraintError,
    EmptyPlanError,
    TableMismatchError,
    TableMissingError,
    TaskError,
)
from edgeprune.graph.tracing import trace
from edgeprune.latency.table import LatencyTable
from edgeprune.loop.dense import dense_latency
from edgeprune.loop.pareto import pareto
from edgeprune.loop.planning import Planner
from edgeprune.loop.pruning import prune
from edgeprune.loop.realizing import realize
from edgeprune.lowering.kernel_graph import lower
from edgeprune.recovery.fine_tuning import FineTuning
from edgeprune.spec import Constraints
from edgeprune.tasks.task import Task


@pytest.fixture(scope="module")
def case(modelled):
    return modelled


def pruned(case, budget, **changes):
    return prune(
        case.model,
        case.example,
        budget,
        predictor=case.predictor,
        kernel_graph=case.kernel_graph,
        **changes,
    )


def test_the_dense_latency_is_predicted_where_the_table_holds_another_model_only(case, predictor_with):
    found = dense_latency(predictor_with(), case.kernel_graph)
    assert not found.measured
    assert found.ms == found.predicted_ms == CostModel(case.kernel_graph, case.predictor).dense_ms
    result = prune(case.model, case.example, "60%", predictor=predictor_with(), kernel_graph=case.kernel_graph)
    assert not result.dense_measured
    assert result.budget_ms == pytest.approx(0.6 * result.dense_predicted_ms)


def test_an_input_that_was_not_profiled_is_said_to_be_extrapolated(case):
    larger = torch.zeros(1, 1, 12, 12)
    result = prune(case.model, larger, "60%", predictor=case.predictor)
    (note,) = [note for note in result.notes if "latency table" in note]
    unknown, kernels, share = map(int, re.match(r"(\d+) of (\d+) kernels of the dense model \((\d+)% ", note).groups())
    assert 0 < unknown <= kernels
    assert 0 < share <= 100
    assert "profile this model with this input" in note
    profiled = prune(case.model, case.example, "60%", predictor=case.predictor, kernel_graph=case.kernel_graph)
    assert not [note for note in profiled.notes if "latency table" in note]


def test_a_model_measured_slower_than_predicted_is_pruned_for_a_budget_between_the_two(case, predictor_with):
    predicted_ms = CostModel(case.kernel_graph, case.predictor).dense_ms
    slower = predictor_with(1.5 * predicted_ms)
    result = prune(
        case.model,
        case.example,
        Budget(latency_ms=1.2 * predicted_ms),
        predictor=slower,
        kernel_graph=case.kernel_graph,
    )
    assert not result.unchanged
    assert result.predicted_ms <= 0.8 * predicted_ms


def test_without_task_and_board_the_result_says_what_is_not_known(case):
    result = pruned(case, "60%")
    assert result.measured_ms is None
    assert result.budget_met is None
    assert result.metrics_after == {}
    assert result.recovery == ()
    notes = " ".join(result.notes)
    assert "unverified: it is predicted, no board was given to measure it on" in notes
    assert "Accuracy was not measured: there is no task, the criterion l2 used no data" in notes
    assert "not proven optimal" not in notes
    assert result.certificate.method == "exact"
    assert result.certificate.gap is not None
    assert 0 <= result.certificate.gap <= 0.01
    assert result.plan.predicted["criterion"] == "l2"
    with torch.no_grad():
        assert result.module(torch.zeros(3, 1, 8, 8)).shape == (3, 10)


def test_a_search_that_proves_nothing_says_so(case):
    result = pruned(case, "60%", allocator="greedy")
    assert result.certificate.bound is None
    assert result.certificate.gap is None
    assert any("not proven optimal" in note for note in result.notes)


def test_predicted_latency_is_that_of_the_plan_looked_up_afresh(case):
    result = pruned(case, Budget(latency_ratio=0.5))
    afresh = CostModel(case.kernel_graph, case.predictor).ms(result.plan.widths())
    assert result.predicted_ms == pytest.approx(afresh)
    assert result.certificate.predicted_ms == pytest.approx(afresh)


def test_a_budget_above_the_dense_latency_changes_nothing(case, tmp_path):
    dense_ms = CostModel(case.kernel_graph, case.predictor).dense_ms
    result = pruned(case, Budget(latency_ms=2 * dense_ms), plan_path=tmp_path / "plan.json", task=case.task)
    assert result.unchanged
    assert result.plan.widths() == case.graph.widths()
    assert result.predicted_ms == pytest.approx(dense_ms)
    assert result.certificate.gap == 0
    assert result.notes[0].startswith("The dense model was measured to take")
    assert "nothing was pruned" in result.notes[0]
    assert result.module is not case.model
    assert result.metrics_after == result.metrics_before
    assert json.loads((tmp_path / "plan.json").read_text())


def test_an_infeasible_budget_says_what_can_be_reached_and_that_can_be_reached(case):
    with pytest.raises(BudgetInfeasibleError) as caught:
        pruned(case, Budget(latency_ms=1e-4))
    assert caught.value.message.startswith("latency must be <= 0.0001 ms, the smallest plan found reaches ")
    assert "kernels that no width changes hold" in caught.value.message
    assert "0 of 3 groups are frozen" in caught.value.message
    hint = caught.value.hint
    assert hint.startswith("--latency ")
    reached = pruned(case, hint.removeprefix("--latency "))
    assert reached.predicted_ms <= reached.budget_ms
    assert reached.predicted_ms == pytest.approx(caught.value.best_ms)
    assert CostModel(case.kernel_graph, case.predictor).ms(caught.value.widths) == pytest.approx(caught.value.best_ms)


def test_an_infeasible_budget_is_named_where_the_aim_was_below_it(case):
    with pytest.raises(BudgetInfeasibleError, match=r"^latency must be <= 0.0002 ms, .*groups are frozen"):
        pruned(case, Budget(latency_ms=2e-4), margin=0.5)


def test_constraints_are_respected_and_named(case):
    free = pruned(case, Budget(latency_ratio=0.6)).plan.widths()
    result = pruned(
        case, Budget(latency_ratio=0.6), constraints=Constraints(keep=("block.first",), multiple_of={"down": 16})
    )
    widths = result.plan.widths()
    assert widths["block.first"] == 32
    assert widths["down"] % 16 == 0
    assert set(widths) == set(free)
    with pytest.raises(ConstraintError, match=r"keep must match at least one group, 'nothing\.\*' matches none"):
        pruned(case, Budget(latency_ratio=0.6), constraints=Constraints(keep=("nothing.*",)))
    with pytest.raises(BudgetInfeasibleError, match="3 of 3 groups are frozen"):
        pruned(case, Budget(latency_ratio=0.6), constraints=Constraints(keep=("*",)))


def test_criterion_and_allocator_can_be_chosen(case):
    result = pruned(case, Budget(latency_ratio=0.6), criterion="bn_scale", allocator="uniform")
    assert result.certificate.method == "uniform"
    assert result.plan.predicted["criterion"] == "bn_scale"
    shares = [width / case.graph.widths()[name] for name, width in result.plan.widths().items()]
    assert max(shares) - min(shares) < 0.05
    with pytest.raises(TaskError, match="taylor criterion must have a task"):
        pruned(case, Budget(latency_ratio=0.6), criterion="taylor")
    with pytest.raises(ConfigError, match="criterion must be one of"):
        pruned(case, Budget(latency_ratio=0.6), criterion="l9")
    with pytest.raises(ConfigError, match="allocator must be one of"):
        pruned(case, Budget(latency_ratio=0.6), allocator="milp9")


def test_a_limit_of_the_task_that_is_not_kept_is_told(case):
    def limited(limit, share):
        task = Task((dataclasses.replace(case.task.objectives[0], limit=limit),))
        tuning = FineTuning(epochs=0)
        return pruned(case, Budget(latency_ratio=share), task=task, fine_tuning=tuning, calibration_batches=2)

    result = limited("0.1%", 0.5)
    (verdict,) = result.verdicts
    assert verdict.kept is False
    assert any("beyond its limit" in note for note in result.notes)
    with pytest.raises(TaskError, match="must be one that the dense model keeps"):
        limited(1.01, 0.8)


def test_without_a_predictor_the_next_step_is_told(case):
    with pytest.raises(TableMissingError, match="needs a predictor of the board, found none") as caught:
        prune(case.model, case.example, "50%")
    assert "edgeprune profile" in caught.value.hint
    with pytest.raises(ConfigError, match="must be one that was fitted to a latency table, found str"):
        prune(case.model, case.example, "50%", predictor="table.parquet")


@pytest.mark.parametrize("budget", ["fast", "12", "-3ms", "0%"])
def test_budgets_that_are_none_are_refused(case, budget):
    with pytest.raises(ConfigError, match="budget must"):
        pruned(case, budget)


def test_a_margin_that_is_no_share_is_refused(case):
    with pytest.raises(ConfigError, match=r"margin must be a share in \[0, 1\), found 1.5"):
        pruned(case, "50%", margin=1.5)


def test_a_task_that_cannot_be_used_is_refused_before_anything_else(case):
    broken = dataclasses.replace(case.task.objectives[0], metric=lambda outputs, targets: float("nan"))
    told = []
    with pytest.raises(TaskError, match="metric of objective 'accuracy' must be finite, found nan"):
        pruned(case, "50%", task=Task((broken,)), progress=lambda *step: told.append(step))
    assert told == []


def test_a_model_without_channel_groups_is_refused(case, tmp_path):
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    example = torch.zeros(1, 1, 2, 2)
    device = case.predictor.table.target()
    kernel_graph = lower(trace(model, example), model=model, device=device, workdir=tmp_path)
    with pytest.raises(EmptyPlanError, match="at least one channel group to be pruned, found none"):
        prune(model, example, "50%", predictor=case.predictor, kernel_graph=kernel_graph)


def test_one_planner_serves_many_budgets(case):
    planner = Planner(case.model, case.kernel_graph, case.predictor, task=case.task)
    assert planner.criterion.name == "taylor"
    latencies, damages = [], []
    for share in (0.9, 0.7, 0.5):
        proposal = planner.propose(share * planner.dense_ms)
        assert proposal.predicted_ms <= share * planner.dense_ms
        latencies.append(proposal.predicted_ms)
        damages.append(proposal.allocation.certificate.damage)
    assert latencies == sorted(latencies, reverse=True)
    assert damages == sorted(damages)


def test_damage_can_be_calibrated_by_measured_losses(case):
    steps = []
    calibration = DamageCalibration(kept=(0.5,), batches=1)
    (objective,) = case.task.objectives
    # Its own loader shuffles.
    task = Task((dataclasses.replace(objective, train=[next(iter(objective.train))]),))
    plain = Planner(case.model, case.kernel_graph, case.predictor, task=task, criterion="l2")
    planner = Planner(
        case.model,
        case.kernel_graph,
        case.predictor,
        task=task,
        criterion="l2",
        calibrate_damage=calibration,
        progress=lambda *step: steps.append(step),
    )
    expected = calibration.calibrate(plain.damage, plain.scores, case.graph, case.model, task)
    assert all(np.array_equal(curve, expected.curves[name]) for name, curve in planner.damage.items())
    assert any(not np.array_equal(curve, plain.damage[name]) for name, curve in planner.damage.items())
    assert steps[-1] == ("calibrating damage", len(plain.damage), len(plain.damage))
    proposal = planner.propose(0.6 * planner.dense_ms)
    assert proposal.predicted_ms <= 0.6 * planner.dense_ms
    with pytest.raises(TaskError, match="damage must have a task to be calibrated"):
        pruned(case, Budget(latency_ratio=0.6), calibrate_damage=calibration)


def test_prune_with_a_planner_takes_its_scores_and_equals_prune_without_one(case):
    scored = []

    class Counted(L2):
        def score(self, *args, **options):
            scored.append(1)
            return super().score(*args, **options)

    planner = Planner(case.model, case.kernel_graph, case.predictor, criterion=Counted())
    results = [prune(case.model, case.example, budget, planner=planner) for budget in ("70%", "50%")]
    assert scored == [1]
    assert results[1].plan.kept == pruned(case, "50%").plan.kept
    for options in (
        {"predictor": case.predictor},
        {"criterion": "l2"},
        {"allocator": "uniform"},
        {"calibrate_damage": DamageCalibration()},
    ):
        with pytest.raises(ConfigError, match="planner must be given with its own model and without predictor"):
            prune(case.model, case.example, "50%", planner=planner, **options)
    with pytest.raises(ConfigError, match="found another model"):
        prune(copy.deepcopy(case.model), case.example, "50%", planner=planner)


def test_the_front_goes_from_the_fastest_plan_to_the_dense_one(case):
    # One price of weights for all lengths; where that depends on the length, tests of fronts alone look at it.
    predictor = copy.copy(case.predictor)
    predictor.calibration = dataclasses.replace(predictor.calibration, kept_ms=0.0)
    case = dataclasses.replace(case, predictor=predictor)
    front = pareto(case.model, case.example, case.predictor, kernel_graph=case.kernel_graph, points=8)
    latencies = [proposal.predicted_ms for proposal in front]
    damages = [proposal.allocation.certificate.damage for proposal in front]
    assert latencies == sorted(latencies)
    assert damages == sorted(damages, reverse=True)
    assert len(set(damages)) == len(front) > 3
    assert front[-1].plan.widths() == case.graph.widths()
    with pytest.raises(BudgetInfeasibleError) as caught:
        pruned(case, Budget(latency_ms=1e-4))
    assert latencies[0] == pytest.approx(caught.value.best_ms)
    # Each point is what a budget of its latency gives; every way of choosing has a front.
    planner = Planner(case.model, case.kernel_graph, case.predictor)
    again = planner.propose(front[2].predicted_ms)
    assert again.allocation.certificate.damage == pytest.approx(damages[2])
    uniform = pareto(
        case.model, case.example, case.predictor, kernel_graph=case.kernel_graph, points=4, allocator="uniform"
    )
    assert uniform[-1].plan.widths() == case.graph.widths()
    assert uniform[0].predicted_ms < 0.7 * uniform[-1].predicted_ms
    assert {proposal.allocation.certificate.method for proposal in uniform} == {"uniform"}
    with pytest.raises(ConfigError, match="at least 2 points, found 1"):
        pareto(case.model, case.example, case.predictor, kernel_graph=case.kernel_graph, points=1)


def test_realize_makes_of_a_proposal_what_prune_returns(case):
    planner = Planner(case.model, case.kernel_graph, case.predictor)
    result = prune(case.model, case.example, "60%", planner=planner)
    proposal = planner.propose(result.rounds[0].aim_ms)
    realized = realize(planner, proposal, case.example)
    assert proposal.plan.kept == result.plan.kept
    assert realized.check_max_abs < 1e-6
    assert realized.recovery == ()
    state = result.module.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in realized.module.state_dict().items())


class Insisting(nn.Module):
    """Takes float32 and nothing else."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, images):
        if images.dtype != torch.float32:
            raise TypeError("images must be float32")
        return self.net(images / 2)


def test_a_model_that_insists_on_float32_is_checked_in_it_and_says_so(case, tmp_path):
    model = Insisting(copy.deepcopy(case.model))
    device = case.predictor.table.target()
    kernel_graph = lower(trace(model, case.example), model=model, device=device, workdir=tmp_path)
    result = prune(model, case.example, "60%", predictor=case.predictor, kernel_graph=kernel_graph)
    assert result.module.net.stem.weight.shape[0] < 32
    assert 0 < result.check_max_abs < 1e-3
    assert [note for note in result.notes if "was compared with the masked one in float32" in note]


def test_several_budgets_hold_at_once_and_are_counted(case):
    dense = sum(parameter.numel() for parameter in case.model.parameters())
    free = pruned(case, "80%")
    both = pruned(case, Budget(latency_ratio=0.8, parameters_ratio=0.4, macs_ratio=0.7))
    parameters, macs = both.spent
    assert parameters.name == "parameters"
    assert parameters.dense == dense
    assert parameters.value == sum(parameter.numel() for parameter in both.module.parameters())
    assert parameters.value <= 0.4 * dense < sum(parameter.numel() for parameter in free.module.parameters())
    assert macs.value <= macs.at_most == 0.7 * macs.dense
    assert both.predicted_ms <= 0.8 * both.dense_ms
    assert both.certificate.damage > free.certificate.damage
    alone = pruned(case, Budget(parameters=0.4 * dense))
    assert alone.spent[0].value <= 0.4 * dense
    assert alone.certificate.damage <= both.certificate.damage
    with pytest.raises(ConfigError, match="refitting layers needs a task"):
        pruned(case, "80%", refit=True)
    with pytest.raises(
        BudgetInfeasibleError, match=r"^parameters must be <= 100, the smallest plan found has [\d,]+\."
    ):
        pruned(case, Budget(latency_ratio=0.9, parameters=100))
    with pytest.raises(ConfigError, match="must be exact to keep a budget of parameters, found uniform"):
        pruned(case, Budget(parameters_ratio=0.5), allocator="uniform")
    planner = Planner(case.model, case.kernel_graph, case.predictor)
    with pytest.raises(ConfigError, match="planner must be made with limits"):
        prune(case.model, case.example, Budget(parameters_ratio=0.5), planner=planner)


def test_engines_of_another_precision_than_the_latency_that_is_meant_are_refused(case):
    table = LatencyTable({**case.predictor.table.header, "latency": {"precision": "int8"}}, case.predictor.table.rows)
    predictor = copy.copy(case.predictor)
    predictor.table = table
    with pytest.raises(TableMismatchError, match="in fp32, found int8"):
        prune(case.model, case.example, "50%", predictor=predictor, kernel_graph=case.kernel_graph)
