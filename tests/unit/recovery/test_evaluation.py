from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from edgeprune.errors import TaskError
from edgeprune.recovery.evaluation import evaluate
from edgeprune.tasks.task import Objective, Task


def mean_absolute_error(outputs, targets):
    return float((outputs - targets).abs().mean())


def largest(outputs, targets):
    return float(outputs.max() - targets.max())


def data(count=7, batch_size=4):
    values = torch.arange(count, dtype=torch.float32)[:, None]
    return DataLoader(TensorDataset(values, values**2), batch_size=batch_size)


def test_a_metric_is_averaged_over_samples_not_batches():
    task = Task.single(
        train=data(), validation=data(), loss=nn.MSELoss(), metric=mean_absolute_error, higher_is_better=False
    )
    values = torch.arange(7.0)
    assert evaluate(nn.Identity(), task)["mean_absolute_error"] == pytest.approx(
        float((values - values**2).abs().mean())
    )


def test_a_pooled_metric_sees_all_batches_at_once():
    seen = []

    def metric(outputs, targets):
        seen.append((outputs.shape, targets.shape))
        return largest(outputs, targets)

    task = Task.single(train=data(), validation=data(), loss=nn.MSELoss(), metric=metric, pooled=True)
    assert evaluate(nn.Identity(), task)["metric"] == 6.0 - 36.0
    assert seen == [((7, 1), (7, 1))]


def test_pooled_outputs_may_be_structured():
    class Heads(nn.Module):
        def forward(self, inputs):
            return {"twice": 2 * inputs, "pair": (inputs, inputs.sum())}

    def metric(outputs, targets):
        assert outputs["pair"][1].shape == (2,)
        return float((outputs["twice"] - 2 * outputs["pair"][0]).abs().max() + targets.shape[0])

    task = Task.single(train=data(), validation=data(), loss=nn.MSELoss(), metric=metric, pooled=True)
    assert evaluate(Heads(), task)["metric"] == 7.0


def test_every_objective_is_reported_on_its_own_data():
    task = Task(
        (
            Objective("error", data(), data(), nn.MSELoss(), mean_absolute_error, higher_is_better=False),
            Objective("largest", data(3), data(3), nn.MSELoss(), largest, pooled=True),
        )
    )
    found = evaluate(nn.Identity(), task)
    assert list(found) == ["error", "largest"]
    assert found["largest"] == 2.0 - 4.0


def test_the_split_and_the_number_of_batches_can_be_chosen():
    task = Task.single(
        train=data(8), validation=data(4), loss=nn.MSELoss(), metric=lambda outputs, _: float(outputs.sum())
    )
    assert evaluate(nn.Identity(), task, split="train", batches=1)["metric"] == 0 + 1 + 2 + 3


def test_evaluation_changes_nothing():
    model = nn.Sequential(nn.BatchNorm1d(1), nn.Dropout(0.9))
    task = Task.single(train=data(), validation=data(), loss=nn.MSELoss(), metric=mean_absolute_error)
    first, second = evaluate(model, task), evaluate(model, task)
    assert first == second
    assert model.training
    assert model[0].num_batches_tracked == 0


def test_an_empty_loader_and_a_nan_metric_are_refused():
    with pytest.raises(TaskError, match="validation data of objective 'largest' must yield at least one batch"):
        evaluate(nn.Identity(), Task.single(train=data(), validation=[], loss=nn.MSELoss(), metric=largest))
    with pytest.raises(TaskError, match="metric of objective 'metric' must be finite, found nan"):
        evaluate(
            nn.Identity(),
            Task.single(train=data(), validation=data(), loss=nn.MSELoss(), metric=lambda outputs, _: float("nan")),
        )


class Counted(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, inputs):
        self.calls += 1
        return inputs


def test_objectives_of_one_loader_share_the_forward():
    shared = data(9, 3)

    def task(first, second):
        return Task(
            (
                Objective("error", first, first, nn.MSELoss(), mean_absolute_error, higher_is_better=False),
                Objective("largest", second, second, nn.MSELoss(), largest, pooled=True),
            )
        )

    together, apart = Counted(), Counted()
    assert evaluate(together, task(shared, shared)) == evaluate(apart, task(data(9, 3), data(9, 3)))
    assert (together.calls, apart.calls) == (3, 6)


@pytest.mark.parametrize("pooled", [False, True])
def test_a_metric_is_that_of_the_samples_with_labels(pooled):
    values = torch.arange(12, dtype=torch.float32)[:, None]
    there = torch.tensor([True, False, True] + 3 * [False] + 6 * [True])
    batches = [
        (values[start : start + 3], (2 * values[start : start + 3], there[start : start + 3]))
        for start in range(0, 12, 3)
    ]
    objective = Objective(
        "error",
        batches,
        batches,
        nn.MSELoss(),
        lambda outputs, targets: float((outputs - targets[0]).abs().mean()),
        pooled=pooled,
        labeled=lambda targets: targets[1],
    )
    assert evaluate(nn.Identity(), Task((objective,)))["error"] == pytest.approx(float(values[there].mean()))
    with pytest.raises(
        TaskError, match="validation data of objective 'error' must have labels for it in at least one batch"
    ):
        evaluate(nn.Identity(), Task((replace(objective, labeled=lambda targets: False),)))
