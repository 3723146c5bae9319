"""Which objectives need what, from the outputs that their losses read."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from edgeprune.errors import TaskError
from edgeprune.graph.tracing import trace
from edgeprune.loop.serving import outputs_read, serving
from edgeprune.tasks.task import Objective, Task


def test_groups_and_latency_are_told_by_whom_they_serve(case):
    planner = case.planner()
    found = serving(planner.task, case.model, planner.graph)
    both = frozenset({"seg", "depth"})
    assert {name: set(serves) for name, serves in found.groups.items()} == {
        "stem": both,
        "trunk": both,
        "seg_inner": {"seg"},
        "depth_inner": {"depth"},
    }
    latency_ms = found.latency_ms(planner.cost)
    assert sum(latency_ms.values()) == pytest.approx(planner.cost.dense_ms)
    assert set(latency_ms) == {both, frozenset({"seg"}), frozenset({"depth"})}
    # 24 channels beside 16 of the same input.
    assert latency_ms[frozenset({"depth"})] > latency_ms[frozenset({"seg"})] > 0
    said = list(found.sentences(planner.cost))
    share = latency_ms[frozenset({"depth"})] / planner.cost.dense_ms
    assert said[1] == f"{share:.0%} of the predicted latency, and 1 of 4 channel groups, serve only depth."
    assert len(said) == 2


def test_one_objective_leaves_a_head_without_a_purpose(case):
    planner = case.planner()
    found = serving(Task((planner.task.objective("seg"),)), case.model, planner.graph)
    assert found.groups["depth_inner"] == frozenset()
    assert [line.endswith("serve no objective.") for line in found.sentences(planner.cost)] == [True]


def test_a_loss_on_several_outputs_and_batches_without_labels(case):
    planner = case.planner()
    seg = planner.task.objective("seg")

    def everything(outputs, targets):
        # In place: the trainer's outputs are no leaves either.
        return sum(value.sigmoid_().square().mean() for value in outputs.values())

    # Outputs are flat in the order in which forward names them.
    assert outputs_read(seg, case.model, 2) == {0}
    assert outputs_read(replace(seg, loss=everything), case.model, 2) == {0, 1}
    assert outputs_read(seg, case.model, 3) is None
    blank = [(images, {**targets, "there": False}) for images, targets in case.train[:2]]
    there = [(images, {**targets, "there": True}) for images, targets in case.train[2:3]]
    partly = replace(seg, train=blank + there, labeled=lambda targets: targets["there"])
    assert outputs_read(partly, case.model, 2) == {0}
    with pytest.raises(TaskError, match="must have labels for it in one batch at least, found none"):
        outputs_read(replace(partly, train=blank), case.model, 2)


def test_a_chain_serves_its_only_objective():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).eval()
    data = [(torch.randn(4, 4), torch.randn(4, 2))]
    task = Task((Objective("main", data, data, nn.MSELoss(), lambda o, t: 0.0),))
    found = serving(task, model, trace(model, data[0][0]))
    assert set(found.groups.values()) == {frozenset({"main"})}
