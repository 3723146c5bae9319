"""The moving average of weights, against its formula and with the batch norms that it needs."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from edgeprune.errors import ConfigError
from edgeprune.recovery.averaging import WeightAverage
from edgeprune.recovery.batch_norm import reestimate_batch_norm
from edgeprune.recovery.evaluation import evaluate
from edgeprune.recovery.fine_tuning import fine_tune
from edgeprune.tasks.task import Task


def test_the_average_equals_its_recursion():
    weight = nn.Parameter(torch.tensor([1.0, -2.0]))
    average = WeightAverage([weight], 0.5)
    expected, path = [1.0, -2.0], [[3.0, 1.0], [0.5, 0.0], [-1.0, 4.0], [2.0, 2.0]]
    for step, values in enumerate(path, 1):
        with torch.no_grad():
            weight.copy_(torch.tensor(values))
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = [decay * old + (1 - decay) * new for old, new in zip(expected, values, strict=True)]
    assert average.values[0].tolist() == pytest.approx(expected)
    assert decay < 0.5, "the decay grows; it is not yet what was asked for"


def test_averaged_weights_are_kept_with_statistics_of_their_own(task, small_net):
    trained, averaged = small_net(), small_net()
    fine_tune(trained, task, epochs=2, lr=5e-3)
    record = fine_tune(averaged, task, epochs=2, lr=5e-3, ema=0.9)
    assert record.details["kept_weights"] == "averaged"
    assert record.details["kept_epoch"] == 2
    assert record.after == record.details["epochs"][1]["averaged"] == evaluate(averaged, task)
    # The training itself is the same: the average only looks on.
    plain = fine_tune(small_net(), task, epochs=2, lr=5e-3)
    assert [one["loss"] for one in plain.details["epochs"]] == [one["loss"] for one in record.details["epochs"]]
    assert plain.after == record.details["epochs"][1]["metrics"]
    assert plain.details["kept_weights"] == "trained"
    assert not torch.equal(trained[0].weight, averaged[0].weight)
    # Statistics of the averaged weights, not those that the trained ones left.
    again = copy.deepcopy(averaged)
    reestimate_batch_norm(again, task.objectives[0].train)
    for name in ("1.running_mean", "4.running_var"):
        here, exact, left = (one.state_dict()[name] for one in (averaged, again, trained))
        # Other batches of the same images: behind the first batch norm that makes a small difference.
        assert (here - exact).abs().max() < 0.1 * (here - left).abs().max()


DRAW = {
    "torch": lambda: torch.rand(()),
    "its own": lambda: 0.0,
    "Python": random.random,
    "NumPy": np.random.rand,
}


class Brightened(Dataset):
    def __init__(self, data, draw):
        self.data, self.draw = data, draw

    def __len__(self):
        return 200

    def __getitem__(self, index):
        image, label = self.data[index]
        return image + 0.5 * float(self.draw()), label


@pytest.mark.parametrize("source", DRAW)
def test_the_training_is_the_same_with_an_average_whatever_its_data_draw_from(digits, task, small_net, source):
    def trained(**changes):
        random.seed(1)
        np.random.seed(1)
        own = torch.Generator().manual_seed(1) if source == "its own" else None
        data = DataLoader(Brightened(digits[0], DRAW[source]), batch_size=50, shuffle=True, generator=own)
        lead = task.objectives[0]
        noisy = Task.single(train=data, validation=lead.validation, loss=lead.loss, metric=lead.metric)
        epochs = fine_tune(small_net(), noisy, epochs=2, lr=5e-3, **changes).details["epochs"]
        return [(one["loss"], one["metrics"]) for one in epochs]

    assert trained(ema=0.9) == trained()


def test_the_better_of_trained_and_averaged_weights_is_kept_when_asked(task, small_net):
    record = fine_tune(small_net(), task, epochs=2, lr=5e-3, ema=0.999, select_best=True)
    figures = {
        (epoch, weights): entry["metrics" if weights == "trained" else "averaged"]["accuracy"]
        for epoch, entry in enumerate(record.details["epochs"], 1)
        for weights in ("trained", "averaged")
    }
    kept = record.details["kept_epoch"], record.details["kept_weights"]
    assert figures[kept] == max(figures.values()) == record.after["accuracy"]


def test_a_decay_outside_of_its_range_is_refused(task, small_net):
    with pytest.raises(ConfigError, match=r"decay of the weight average must lie in \[0, 1\), found 1.0"):
        fine_tune(small_net(), task, ema=1.0)
