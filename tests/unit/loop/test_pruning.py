import copy
import dataclasses
import json
import re

import numpy as np
import pytest
import torch
from torch import nn

from edgeprune.allocation.cost import CostModel
from edgeprune.allocation.memory import Memory
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
from edgeprune.latency.fitting import fit
from edgeprune.latency.table import LatencyTable
from edgeprune.latency.table_rows import network_key
from edgeprune.loop.dense import dense_latency
from edgeprune.loop.pareto import pareto
from edgeprune.loop.planning import Planner
from edgeprune.loop.pruning import prune
from edgeprune.loop.realizing import realize
from edgeprune.loop.verification import require_same_device
from edgeprune.lowering.kernel_graph import lower
from edgeprune.recovery.evaluation import evaluate
from edgeprune.recovery.fine_tuning import FineTuning
from edgeprune.spec import Constraints
from edgeprune.surgery.plan import PruningPlan
from edgeprune.tasks.task import Task


def pruned(case, budget, **changes):
    return prune(
        case.model,
        case.example,
        budget,
        predictor=case.predictor,
        kernel_graph=case.kernel_graph,
        **changes,
    )


def test_a_task_and_a_board_give_a_tuned_and_measured_model(case, tmp_path):
    state = {name: value.clone() for name, value in case.model.state_dict().items()}
    path = tmp_path / "plans" / "plan.json"
    steps, seen = [], []

    def progress(step, done, total):
        if not steps or steps[-1] != step:
            steps.append(step)
            seen.append((step, path.exists()))

    result = pruned(
        case,
        Budget(latency_ratio=0.6),
        board=case.board,
        task=case.task,
        fine_tuning=FineTuning(epochs=2, lr=3e-3),
        plan_path=path,
        most_rounds=1,
        measuring_rounds=8,
        progress=progress,
    )
    # A share is one of the dense latency as it was measured while profiling.
    dense_ms = case.predictor.table.header["reference"]["median_ms"]
    assert result.dense_measured
    assert result.dense_ms == dense_ms
    assert result.budget_ms == pytest.approx(0.6 * dense_ms)
    assert result.predicted_ms <= 0.98 * result.budget_ms
    aim_ms = 0.98 * result.budget_ms * min(1.0, result.dense_predicted_ms / dense_ms)
    assert result.rounds[0].aim_ms == pytest.approx(aim_ms)
    assert result.rounds[0].predicted_low_ms <= result.predicted_ms <= result.rounds[0].predicted_high_ms
    assert result.rounds[0].widths == result.plan.widths()
    # The plan was on disk, with its prediction, before anything was cut, compiled or timed.
    assert steps == [
        "scoring", "allocating", "cutting", "measuring on the board", "checking", "re-estimating batch norm", "fine-tuning",
        "measuring on the board",
    ]  # fmt: skip
    assert [step for step, written in seen if not written] == ["scoring", "allocating"]
    written = PruningPlan.load(path)
    assert written.hash == result.plan.hash
    assert written.predicted["latency_ms"] == pytest.approx(result.predicted_ms)
    assert written.predicted["low_ms"] <= written.predicted["latency_ms"] <= written.predicted["high_ms"]
    assert written.predicted["table"] == case.predictor.table_hash
    # Cut exactly, recovered, and the model that was given is as it was.
    assert result.check_max_abs < 1e-6
    assert sum(p.numel() for p in result.module.parameters()) < sum(p.numel() for p in case.model.parameters())
    assert result.metrics_before == evaluate(case.model, case.task)
    assert result.metrics_after == evaluate(result.module, case.task)
    # How deep 60 % of the latency cuts is the machine's to say; tuning must bring back most of what the cut took.
    cut = result.recovery[0].before["accuracy"]
    assert result.metrics_after["accuracy"] > max(0.5, (cut + result.metrics_before["accuracy"]) / 2)
    assert [record.step for record in result.recovery] == ["batch_norm", "fine_tuning"]
    assert all(torch.equal(value, state[name]) for name, value in case.model.state_dict().items())
    # The board has the last word, on the tuned model.
    measured = result.measured
    assert measured != result.rounds[0].measured
    assert measured.ratio == pytest.approx(result.rounds[0].measured.ratio, rel=0.2)
    assert measured.board == case.board.name
    assert measured.pruned_ms > 0
    assert result.measured_ms == measured.ratio * result.dense_ms, "on the scale of the budget, not of the day"
    assert measured.ratio_low <= measured.ratio <= measured.ratio_high
    assert measured.ratio < 0.9
    assert result.budget_met == (measured.ratio <= 0.6)
    assert ("is not met as measured" in " ".join(result.notes)) == (not result.budget_met)


def without_networks(case, *dense_ms):
    """The predictor as it would be had the dense network not been profiled, or had it taken another time."""
    changed = []
    for row in case.predictor.table.rows:
        if row["kind"] == "network" and json.loads(row["widths"]) == case.graph.widths():
            changed += [{**row, "median_ms": value} for value in dense_ms]
        else:
            changed.append(row)
    predictor = copy.copy(case.predictor)
    predictor.table = LatencyTable(dict(case.predictor.table.header), changed)
    return predictor


def test_the_dense_latency_is_predicted_where_the_table_holds_another_model_only(case):
    found = dense_latency(without_networks(case), case.kernel_graph)
    assert not found.measured
    assert found.ms == found.predicted_ms == CostModel(case.kernel_graph, case.predictor).dense_ms
    result = prune(case.model, case.example, "60%", predictor=without_networks(case), kernel_graph=case.kernel_graph)
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


def test_a_model_measured_slower_than_predicted_is_pruned_for_a_budget_between_the_two(case):
    predicted_ms = CostModel(case.kernel_graph, case.predictor).dense_ms
    slower = without_networks(case, 1.5 * predicted_ms)
    result = prune(
        case.model,
        case.example,
        Budget(latency_ms=1.2 * predicted_ms),
        predictor=slower,
        kernel_graph=case.kernel_graph,
    )
    assert not result.unchanged
    assert result.predicted_ms <= 0.8 * predicted_ms


@pytest.mark.slow
def test_met_is_the_ratio_on_the_board_times_the_dense_latency(case):
    """Not the milliseconds of another day: the same ratio meets a budget in ms exactly when it meets the share."""
    predicted_ms = CostModel(case.kernel_graph, case.predictor).dense_ms
    doubled = without_networks(case, 2 * predicted_ms)
    result = prune(
        case.model,
        case.example,
        Budget(latency_ms=1.2 * predicted_ms),
        board=case.board,
        predictor=doubled,
        kernel_graph=case.kernel_graph,
        measuring_rounds=4,
    )
    ratio = result.measured.ratio
    assert result.budget_met == (ratio <= 0.6)
    assert abs(ratio - 1) > 0.05


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


def test_an_unchanged_model_is_measured_too(case):
    result = pruned(case, Budget(latency_ratio=1.0), board=case.board, measuring_rounds=2)
    assert result.unchanged
    assert result.measured_ms is not None
    assert result.budget_met
    assert not any("unverified" in note for note in result.notes)


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


def test_a_table_of_another_device_is_refused(case):
    header = dict(case.predictor.table.header)
    header["identity"] = {**header["identity"], "cpu_model": "Cortex-A76"}
    foreign = LatencyTable(header, list(case.predictor.table.rows))
    with pytest.raises(TableMismatchError, match=r"cpu_model .* instead of 'Cortex-A76'") as caught:
        require_same_device(foreign, case.board)
    assert caught.value.hint == f"edgeprune profile --board {case.board.name}"


def test_a_model_without_channel_groups_is_refused(case, tmp_path):
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    example = torch.zeros(1, 1, 2, 2)
    kernel_graph = lower(trace(model, example), model=model, workdir=tmp_path)
    with pytest.raises(EmptyPlanError, match="at least one channel group to be pruned, found none"):
        prune(model, example, "50%", predictor=case.predictor, kernel_graph=kernel_graph)


def test_a_board_that_is_lost_at_the_end_does_not_take_the_model_along(case, lost_board):
    result = pruned(case, Budget(latency_ratio=0.6), board=lost_board, measuring_rounds=2)
    assert result.measured_ms is None
    assert result.budget_met is None
    assert any("unverified" in note and "could not measure it: the board must answer" in note for note in result.notes)
    assert result.plan.widths() != case.graph.widths()


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
    kernel_graph = lower(trace(model, case.example), model=model, workdir=tmp_path)
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
    measured = pruned(case, Budget(macs_ratio=0.6), board=case.board, measuring_rounds=2)
    assert measured.spent[0].value <= measured.spent[0].at_most
    assert measured.measured is not None
    assert len(measured.rounds) == 1
    assert measured.budget_met is None, "no latency was asked for"
    assert not any("of the budget" in note for note in measured.notes)
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


def with_energies(case, mw=1500.0):
    """The predictor of a board with a counter: energies are emulated as one power times the latencies that were measured."""
    table, records = case.predictor.table, {}
    for row in table.rows:
        if row["kind"] == "network":
            mj = mw * row["median_ms"] / 1000
            records[network_key(row["kernels"])] = {"energy_mj": mj, "error_mj": 0.01 * mj, "covers": "emulated"}
    return fit(LatencyTable({**table.header, "energy": records}, table.rows))


def test_energy_and_memory_are_bounded_at_once(case):
    predictor = with_energies(case)
    budget = Budget(energy_ratio=0.6, memory_ratio=0.7)
    result = prune(case.model, case.example, budget, predictor=predictor, kernel_graph=case.kernel_graph)
    spent = {one.name: one for one in result.spent}
    assert {name: one.unit for name, one in spent.items()} == {"energy": "mJ", "memory": "bytes"}
    assert all(one.value <= one.at_most for one in spent.values())
    assert max(one.value / one.at_most for one in spent.values()) > 0.8, "one of them is what stops it"
    kernels = case.kernel_graph.at(result.plan.widths())
    assert spent["energy"].value == pytest.approx(predictor.network_energy(kernels)[0])
    # What was counted is what the cut model itself comes to.
    own = lower(trace(result.module, case.example), model=result.module)
    assert Memory(own).value({}) == spent["memory"].value


def test_an_energy_out_of_reach_says_what_holds_it_up_and_one_that_nobody_measured_is_refused(case):
    predictor = with_energies(case)
    graph = case.kernel_graph
    with pytest.raises(
        BudgetInfeasibleError, match=r"energy must be <= 1e-06 mJ, .*\(the board's .* mW above idle over .* hold"
    ):
        prune(case.model, case.example, Budget(energy_mj=1e-6), predictor=predictor, kernel_graph=graph)
    with pytest.raises(TableMismatchError, match="must hold the energy per inference of networks to predict energy"):
        pruned(case, Budget(energy_mj=1.0))


def test_engines_of_another_precision_than_the_latency_that_is_meant_are_refused(case):
    table = LatencyTable({**case.predictor.table.header, "latency": {"precision": "int8"}}, case.predictor.table.rows)
    predictor = copy.copy(case.predictor)
    predictor.table = table
    with pytest.raises(TableMismatchError, match="in fp32, found int8"):
        prune(case.model, case.example, "50%", predictor=predictor, kernel_graph=case.kernel_graph)
