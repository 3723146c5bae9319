"""Training under masks that change: the schedule, units that come back, and what is left in the end."""

import copy
import math

import numpy as np
import pytest
import torch

from edgeprune.budget import Budget
from edgeprune.errors import ConfigError, TaskError
from edgeprune.loop.masked_training import loss_changes
from edgeprune.loop.planning import Planner
from edgeprune.loop.pruning import prune
from edgeprune.loop.soft_masking import SoftMasking
from edgeprune.recovery.distillation.logits import Logits
from edgeprune.recovery.evaluation import evaluate
from edgeprune.recovery.fine_tuning import FineTuning
from edgeprune.surgery.checking import check
from edgeprune.surgery.cutting import apply
from edgeprune.tasks.task import Task

EXAMPLE = torch.zeros(1, 1, 8, 8)


@pytest.fixture
def planner(tabled):
    return tabled


@pytest.fixture
def task(tabled):
    return tabled.task


def search(planner):
    proposal = planner.propose(0.5 * planner.dense_ms)
    return SoftMasking(epochs=2, every=3).search(planner, proposal, fine_tuning=FineTuning(epochs=3, lr=3e-3))


@pytest.fixture(scope="module")
def searched(tabled):
    return search(tabled)


@pytest.mark.parametrize(("steepness", "ramp"), [(2.75, 0.75), (1.0, 1.0), (0.0, 0.5)])
def test_the_schedule_is_the_formula(steepness, ramp):
    settings = SoftMasking(ramp=ramp, steepness=steepness)
    for step in range(0, 201, 10):
        share = min(1.0, step / (ramp * 200))
        expected = share if steepness == 0 else (1 - math.exp(-steepness * share)) / (1 - math.exp(-steepness))
        assert settings.reduction(step, 200) == pytest.approx(expected)
    # Of the paper's code: 30 % of the cost to remove, at epoch 20 of a ramp of 55.
    assert SoftMasking(ramp=1.0).reduction(20, 55) * 0.3 == pytest.approx(
        0.3 * (1 - math.exp(-0.05 * 20)) / (1 - math.exp(-0.05 * 55))
    )


def test_a_unit_is_worth_what_the_loss_gains_by_it_to_second_order():
    # One sample's loss is a parabola in each gate: 1/2 h (gate - best)^2; active gates are at 1, masked ones at 0.
    curvature, best = np.array([2.0, 2.0, 4.0, 4.0]), np.array([0.9, 0.9, 0.2, 0.2])
    active = np.array([True, False, True, False])
    gradient = curvature * (np.where(active, 1.0, 0.0) - best)
    found = loss_changes(gradient, curvature / 64, 64, active)
    without, with_it = 0.5 * curvature * best**2, 0.5 * curvature * (1 - best) ** 2
    assert found == pytest.approx(np.maximum(0.0, without - with_it))
    assert found[0] == pytest.approx(found[1]), "whether it is masked now does not matter"


def test_units_come_back_and_the_plan_keeps_the_predicted_budget(planner, searched):
    details = searched.record.details
    assert details["steps"] == 30
    steps = [item["step"] for item in details["reallocations"]]
    assert steps == list(range(3, 31, 3))
    for item in details["reallocations"]:
        share = SoftMasking().reduction(item["step"], 30)
        aim_ms = searched.proposal.aim_ms
        assert item["budget_ms"] == pytest.approx(planner.dense_ms - share * (planner.dense_ms - aim_ms))
        assert item["predicted_ms"] <= item["budget_ms"] + 1e-9
    assert details["returned"] > 0
    assert sum(item["returned"] for item in details["reallocations"]) == details["returned"]
    assert details["masked_before_and_kept"] > 0
    assert searched.proposal.predicted_ms <= 0.5 * planner.dense_ms
    assert searched.proposal.predicted_ms == pytest.approx(planner.cost.ms(searched.proposal.plan.widths()))
    assert f"{details['returned']} times a masked unit came back" in searched.notes[0]
    assert SoftMasking(epochs=2).left(FineTuning(epochs=3), planner.task).epochs == 1
    assert planner.model is not searched.planner.model


def test_the_masked_model_is_the_cut_one(searched, task):
    model, plan = searched.planner.model, searched.proposal.plan
    assert searched.record.details["masked_against_cut"] < 1e-4
    assert len(searched.notes) == 1
    assert check(model, plan, EXAMPLE, tolerance=1e-6) < 1e-6
    assert evaluate(apply(model, plan), task)["accuracy"] == pytest.approx(searched.record.after["accuracy"], abs=0.006)


def test_the_same_seed_gives_the_same_plan_and_weights(planner, searched):
    again = search(planner)
    assert again.proposal.plan.hash == searched.proposal.plan.hash
    state = again.planner.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in searched.planner.model.state_dict().items())


def test_few_steps_still_end_at_the_target(planner):
    proposal = planner.propose(0.6 * planner.dense_ms)
    found = SoftMasking(every=1000).search(planner, proposal, fine_tuning=FineTuning(epochs=3, steps=5))
    (only,) = found.record.details["reallocations"]
    assert only["step"] == found.record.details["steps"] == 5
    assert found.proposal.predicted_ms <= 0.6 * planner.dense_ms
    assert SoftMasking(every=1000).left(FineTuning(epochs=3, steps=5), planner.task).steps == 0


def test_branches_that_go_are_masked_from_the_start(planner, task):
    with_blocks = Planner(planner.model, planner.kernel_graph, planner.predictor, task=task, blocks=True)
    # However it came about that a plan removes a block.
    with_blocks.damage["block.first"][0] = 0.0
    proposal = with_blocks.propose(0.6 * planner.dense_ms)
    assert proposal.plan.removed
    found = SoftMasking(every=5).search(with_blocks, proposal, fine_tuning=FineTuning(epochs=1, lr=3e-3))
    assert [one["name"] for one in found.proposal.plan.removed] == [one["name"] for one in proposal.plan.removed]
    assert found.record.details["masked_against_cut"] < 1e-4
    assert found.proposal.predicted_ms <= 0.6 * planner.dense_ms
    # However much room a board leaves for a further plan: what got no gradient does not come back.
    for share in (0.8, 1.0):
        again = found.planner.propose(share * planner.dense_ms)
        assert [one["name"] for one in again.plan.removed] == [one["name"] for one in proposal.plan.removed]
        assert again.allocation.widths["down"] == 64, "the room is for what is there"


class Counted(Logits):
    name = "counted"

    def __init__(self):
        super().__init__(temperature=2.0, weight=0.3)
        self.calls = 0

    def loss(self, student, teacher):
        self.calls += 1
        return super().loss(student, teacher)


def test_what_teaches_under_masks_is_what_was_given(planner):
    lesson = Counted()
    result = prune(
        planner.model,
        EXAMPLE,
        Budget(latency_ratio=0.5),
        planner=planner,
        fine_tuning=FineTuning(epochs=2, steps=6),
        soft_masking=SoftMasking(every=3),
        distill=[lesson, "features"],
    )
    assert result.recovery[0].details["steps"] == 6
    assert lesson.calls == 6


def test_prune_cuts_what_was_masked_and_tunes_the_rest(planner, task):
    before = {name: value.clone() for name, value in planner.model.state_dict().items()}
    result = prune(
        planner.model,
        EXAMPLE,
        Budget(latency_ratio=0.5),
        planner=planner,
        fine_tuning=FineTuning(epochs=2, lr=3e-3),
        soft_masking=SoftMasking(every=5),
    )
    assert [record.step for record in result.recovery] == ["soft_masking", "batch_norm", "fine_tuning"]
    assert len(result.recovery[-1].details["epochs"]) == 1
    assert result.predicted_ms <= 0.5 * planner.dense_ms
    assert result.check_max_abs < 1e-6
    assert result.metrics_after["accuracy"] > 0.7
    assert any(note.startswith("Soft masking: 3 allocations in 15 steps") for note in result.notes)
    assert all(torch.equal(value, before[name]) for name, value in planner.model.state_dict().items())


def test_what_cannot_be_trained_is_refused(planner, task):
    options = {"soft_masking": SoftMasking()}
    with pytest.raises(ConfigError, match="needs a task"):
        prune(planner.model, EXAMPLE, "50%", predictor=planner.predictor, kernel_graph=planner.kernel_graph, **options)
    blind = Task.single(
        train=task.objectives[0].train,
        validation=task.objectives[0].validation,
        loss=lambda outputs, targets: (outputs.argmax(1) != targets).float().mean(),
        metric=task.objectives[0].metric,
    )
    with pytest.raises(TaskError, match="must be differentiable"):
        prune(
            planner.model,
            EXAMPLE,
            "50%",
            predictor=planner.predictor,
            kernel_graph=planner.kernel_graph,
            task=blind,
            criterion="l2",
            **options,
        )
    with pytest.raises(ConfigError, match="takes 4 of the epochs of fine-tuning, found 3"):
        SoftMasking(epochs=4).split(FineTuning(epochs=3), task)
    with pytest.raises(ConfigError, match="refitted"):
        prune(planner.model, EXAMPLE, "50%", planner=planner, refit=True, **options)
    frozen = copy.deepcopy(planner.model)
    frozen.block.second.weight.requires_grad_(False)
    with pytest.raises(TaskError, match="must require"):
        SoftMasking().search(
            planner.rescored(frozen, planner.scores, criterion="taylor"), planner.propose(0.5 * planner.dense_ms)
        )


@pytest.mark.parametrize("wrong", [{"epochs": 0}, {"every": 1}, {"ramp": 0.0}, {"ramp": 1.5}, {"steepness": np.nan}])
def test_settings_that_mean_nothing(wrong):
    with pytest.raises(ConfigError):
        SoftMasking(**wrong)
