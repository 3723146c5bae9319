"""Mixed precision: what runs in which format, and where it is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from edgeprune.errors import ConfigError
from edgeprune.graph.tracing import trace
from edgeprune.recovery.fine_tuning import fine_tune
from edgeprune.recovery.precision import MixedPrecision
from edgeprune.surgery.cutting import cut_program
from edgeprune.surgery.plan import uniform_plan
from edgeprune.tasks.task import Task

CPU = torch.device("cpu")


class Spy(nn.Module):
    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def forward(self, x):
        self.seen.add((x.dtype, self.training))
        return x


def test_bfloat16_runs_the_forward_and_nothing_else(task, small_net):
    seen, losses = set(), set()
    model = nn.Sequential(small_net(), Spy(seen))

    def loss(outputs, targets):
        losses.add(outputs.dtype)
        return nn.functional.cross_entropy(outputs, targets)

    lead = task.objectives[0]
    spied = Task.single(train=lead.train, validation=lead.validation, loss=loss, metric=lead.metric)
    record = fine_tune(model, spied, epochs=3, lr=5e-3, precision="bfloat16")
    assert seen == {(torch.bfloat16, True), (torch.float32, False)}
    assert losses == {torch.float32}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert record.after["accuracy"] > 0.8


def test_a_cut_program_trains_in_bfloat16_too(task, small_net):
    model = small_net()
    fine_tune(model, task, epochs=2, lr=5e-3)
    model.eval()
    graph = trace(model, torch.zeros(1, 1, 8, 8))
    program = cut_program(model, uniform_plan(graph, 0.3))
    record = fine_tune(program, task, epochs=1, lr=5e-3, precision="bfloat16", teacher=model)
    assert record.after["accuracy"] > record.before["accuracy"]


def test_float16_is_for_cuda_alone(task, small_net):
    with pytest.raises(ConfigError, match="training precision on cpu must be one of float32, bfloat16, found float16"):
        fine_tune(small_net(), task, precision="float16")
    with pytest.raises(ConfigError, match="training precision on meta must be one of float32, found bfloat16"):
        MixedPrecision("bfloat16", torch.device("meta"))
    with pytest.raises(ConfigError, match="must be one of float32, bfloat16, float16, found 'int8'"):
        fine_tune(small_net(), task, precision="int8")
    MixedPrecision("float32", torch.device("meta"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_float16_scales_gradients_on_cuda(task, small_net):
    record = fine_tune(small_net().cuda(), task, epochs=3, lr=5e-3, precision="float16")
    assert record.after["accuracy"] > 0.8


def test_without_mixed_precision_nothing_is_scaled():
    precision = MixedPrecision("float32", CPU)
    weight = nn.Parameter(torch.tensor([3.0]))
    precision.backward((weight**2).sum())
    assert weight.grad.tolist() == [6.0]
    precision.step(torch.optim.SGD([weight], lr=0.1), [weight], 1.0)
    assert weight.item() == pytest.approx(2.9)
    assert precision.state() == {}
