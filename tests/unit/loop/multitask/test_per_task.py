"""The exact allocation with a damage curve per objective: what it minimizes, what holds, and what is said where nothing can."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from edgeprune.budget import Budget
from edgeprune.criteria.calibration import DamageCalibration
from edgeprune.errors import BudgetInfeasibleError, ConfigError, TaskError
from edgeprune.loop.multitask.calibration_data import CalibrationData
from edgeprune.loop.multitask.looking import Looking
from edgeprune.loop.multitask.pagcp import Pagcp
from edgeprune.loop.multitask.per_task import PerTask
from edgeprune.loop.pruning import prune
from edgeprune.recovery.fine_tuning import FineTuning
from edgeprune.spec import Constraints
from edgeprune.tasks.task import Task

QUICK = PerTask(
    batches=2, metric_batches=2, calibration=DamageCalibration(kept=(0.5,), batches=1, batch_statistics=True)
)


def looked(planner, options, widths, search):
    """Metrics of some widths on the data of the check, cut anew by the units that the search keeps."""
    data = CalibrationData(planner.task, torch.device("cpu"), options.batches, options.metric_batches, 0)
    look = Looking(planner.model, planner.graph, data, batch_statistics=True)
    dense = {name: tuple(range(size)) for name, size in planner.graph.widths().items()}
    plan = search.planner.proposal(replace(search.proposal.allocation, widths=dict(widths)), math.inf).plan
    kept = dense | {name: tuple(group["kept"]) for name, group in plan.groups.items()}
    return look.metrics(dense), look.metrics(kept)


def used(planner, dense, metrics):
    """Of what its limit allows, by objective."""
    return {
        one.name: max(0.0, (metrics[one.name] - dense[one.name]) / (one.worst(dense[one.name]) - dense[one.name]))
        for one in planner.task.objectives
    }


def test_the_plan_keeps_the_latency_and_says_what_it_uses_of_each_limit(case):
    planner = case.planner(seg="20%", depth="60%")
    first = planner.propose(0.6 * planner.dense_ms)
    found = QUICK.search(planner, first)
    assert found.proposal.predicted_ms <= first.aim_ms
    details = found.record.details
    said = used(planner, *looked(planner, QUICK, found.proposal.allocation.widths, found))
    assert details["used"] == pytest.approx(said)
    worst = [max(plan["used"].values()) for plan in details["plans"]]
    assert max(said.values()) == pytest.approx(min(worst))
    # The plan by the damage of all objectives together is no better for the one that suffers most.
    summed = used(planner, *looked(planner, QUICK, first.allocation.widths, found))
    assert max(said.values()) <= max(summed.values()) + 1e-9
    # Its certificate is one of what is minimized, and a further plan comes from the same program.
    certificate = found.proposal.allocation.certificate
    assert certificate.bound == pytest.approx(certificate.damage, rel=0.01)
    further = found.planner.propose(0.8 * planner.dense_ms)
    assert further.plan.predicted["allocator"] == "exact per objective"
    assert further.allocation.certificate.damage < certificate.damage


def test_limits_hold_before_tuning_where_that_is_asked_for(case):
    planner = case.planner(seg="15%", depth="60%")
    options = replace(QUICK, hold=True)
    found = options.search(planner, planner.propose(0.75 * planner.dense_ms))
    assert max(used(planner, *looked(planner, options, found.proposal.allocation.widths, found)).values()) <= 1
    summed = replace(options, mean_share=1.0).search(planner, planner.propose(0.75 * planner.dense_ms))
    assert max(used(planner, *looked(planner, options, summed.proposal.allocation.widths, summed)).values()) <= 1


def test_limits_that_exclude_the_latency_say_what_would_do(case):
    """Segmentation may lose next to nothing: what can go is the head of depth."""
    planner = case.planner(seg="0.5%", depth="500%")
    options = replace(QUICK, hold=True)
    first = planner.propose(0.4 * planner.dense_ms)
    with pytest.raises(
        BudgetInfeasibleError, match=r"keeps the limits \(seg=0.5%, depth=500%\) before tuning"
    ) as caught:
        options.search(planner, first)
    assert "; seg holds it up." in caught.value.message
    assert "--limit seg=" in caught.value.hint
    assert "--limit depth=" not in caught.value.hint
    assert caught.value.best_ms == planner.cost.ms(caught.value.widths)
    assert first.aim_ms < caught.value.best_ms <= planner.dense_ms
    loose = replace(options, hold=False).search(planner, first)
    assert max(used(planner, *looked(planner, options, caught.value.widths, loose)).values()) <= 1
    # The limit that would do does.
    percent = caught.value.hint.split("--limit seg=")[1].split("%")[0]
    again = options.search(case.planner(seg=f"{percent}%", depth="500%"), first)
    assert again.proposal.predicted_ms <= first.aim_ms


def test_an_objective_without_a_limit_counts_by_the_mean(case):
    planner = case.planner(seg="10%", depth=None)
    found = QUICK.search(planner, planner.propose(0.6 * planner.dense_ms))
    assert set(found.record.details["used"]) == {"seg"}
    assert found.record.details["damage"]["depth"] > 0


def test_damage_is_measured_per_objective(case):
    """The head of one objective costs the other nothing; its own curve goes through what was measured."""
    planner = case.planner()
    task, calibration = planner.task, DamageCalibration(kept=(0.5, 0.25), batches=2)
    curves = {one.name: planner.damage for one in task.objectives}
    found = calibration.calibrate_each(curves, planner.scores, planner.graph, planner.model, task)
    for one, other in (("seg", "depth"), ("depth", "seg")):
        assert all(loss == pytest.approx(0, abs=1e-6) for _, loss in found[one].measured[f"{other}_inner"])
        alone = calibration.calibrate(
            planner.damage,
            planner.scores,
            planner.graph,
            planner.model,
            Task((replace(task.objective(one), weight=1.0),)),
        )
        assert found[one].dense_loss == pytest.approx(alone.dense_loss)
        for name, curve in alone.curves.items():
            np.testing.assert_allclose(found[one].curves[name], curve, atol=1e-6)


def test_prune_judges_in_the_end(case):
    result = prune(
        case.model,
        case.example,
        Budget(latency_ratio=0.7),
        planner=case.planner(seg="30%", depth="100%"),
        fine_tuning=FineTuning(epochs=1, lr=3e-3),
        per_task=QUICK,
    )
    assert [record.step for record in result.recovery] == ["per_task", "batch_norm", "fine_tuning"]
    assert [verdict.objective for verdict in result.verdicts] == ["seg", "depth"]
    assert any(note.startswith("A damage curve per objective: of what the limits allow") for note in result.notes)


def test_what_cannot_be_done_is_refused(case):
    planner = case.planner(seg=None, depth=None)
    first = planner.propose(0.8 * planner.dense_ms)
    with pytest.raises(ConfigError, match="needs a limit for one of them at least, found none"):
        PerTask().search(planner, first)
    with pytest.raises(ConfigError, match="needs the exact allocator, found uniform"):
        PerTask().search(case.planner(allocator="uniform"), first)
    with pytest.raises(ConfigError, match="criterion that reads losses, or measured ones, found l2 without"):
        PerTask(calibration=None).search(case.planner(criterion="l2"), first)
    without = case.planner()
    without.task = None
    with pytest.raises(ConfigError, match="damage per objective needs a task, found none"):
        PerTask().search(without, first)
    fixed = case.planner(constraints=Constraints(keep=("stem", "trunk", "seg_inner")))
    with pytest.raises(TaskError, match="loss of objective 'seg' must depend on a channel group that can be pruned"):
        PerTask().search(fixed, fixed.propose(0.95 * fixed.dense_ms))
    with pytest.raises(ConfigError, match="pagcp and damage per objective each choose the widths"):
        prune(
            case.model,
            case.example,
            Budget(latency_ratio=0.8),
            planner=case.planner(),
            pagcp=Pagcp(),
            per_task=PerTask(),
        )
    for wrong in ({"batches": 0}, {"corrections": -1}, {"mean_share": 1.5}):
        with pytest.raises(ConfigError, match="must be at least 1, corrections at least 0"):
            PerTask(**wrong)
