"""An interrupted fine-tuning goes on to the very weights of one that was not interrupted."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.utils.data import DataLoader, Dataset

from edgeprune.errors import ConfigError
from edgeprune.recovery import checkpoint as checkpoints
from edgeprune.recovery.fine_tuning import FineTuning, fine_tune
from edgeprune.tasks.task import Objective, Task


class Augmented(Dataset):
    """Every source of randomness that a user's data may draw from."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return 200

    def __getitem__(self, index):
        image, label = self.data[index]
        image = image + 0.05 * torch.randn(image.shape) + 0.05 * random.random() + 0.05 * float(np.random.rand())
        return image, label


def dropout_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(384, 10)
    )


def noisy_task(digits):
    train, validation = digits
    metric = lambda outputs, targets: float((outputs.argmax(1) == targets).float().mean())  # noqa: E731
    own = torch.Generator().manual_seed(3)
    return Task(
        (
            Objective(
                "lead",
                DataLoader(Augmented(train), batch_size=25, shuffle=True),
                DataLoader(validation, batch_size=400),
                nn.CrossEntropyLoss(),
                metric,
            ),
            # It is in the middle of a pass wherever an epoch of the other ends.
            Objective(
                "other",
                DataLoader(Augmented(train), batch_size=70, shuffle=True, generator=own, drop_last=True),
                DataLoader(validation, batch_size=400),
                nn.CrossEntropyLoss(),
                metric,
                weight=0.3,
            ),
        )
    )


def run(digits, model, path=None, stop_at=None, **changes):
    random.seed(1)
    np.random.seed(1)

    def stop(_, done, total):
        if done == stop_at:
            raise KeyboardInterrupt

    settings = FineTuning(epochs=4, lr=5e-3, seed=2, **changes)
    return fine_tune(model, noisy_task(digits), settings, checkpoint=path, progress=stop)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"ema": 0.9},
        {"optimizer": "sgd", "select_best": True},
        {"precision": "bfloat16", "ema": 0.99, "select_best": True},
    ],
    ids=str,
)
def test_what_was_interrupted_comes_to_the_same_bits(digits, tmp_path, changes):
    path = tmp_path / "tuning" / "epochs.safetensors"
    usual, resumed = dropout_net(), dropout_net()
    start = copy.deepcopy(resumed)
    expected = run(digits, usual, **changes)
    for stop_at in (19, 30):  # in the third epoch, then in the fourth, of 8 steps each
        with pytest.raises(KeyboardInterrupt):
            run(digits, resumed, path, stop_at, **changes)
        resumed = copy.deepcopy(start)  # another process begins with what the plan gave
    record = run(digits, resumed, path, **changes)
    assert all(torch.equal(value, usual.state_dict()[name]) for name, value in resumed.state_dict().items())
    assert record == expected
    assert [one.name for one in path.parent.iterdir()] == [path.name]
    # It is finished: the same call gives the same at once.
    told = []
    again = copy.deepcopy(start)
    settings = FineTuning(epochs=4, lr=5e-3, seed=2, **changes)
    repeated = fine_tune(again, noisy_task(digits), settings, checkpoint=path, progress=lambda *step: told.append(step))
    assert not told
    assert repeated == expected
    assert all(torch.equal(value, usual.state_dict()[name]) for name, value in again.state_dict().items())


def test_the_file_is_safetensors_with_json(digits, tmp_path):
    path = tmp_path / "epochs.safetensors"
    run(digits, dropout_net(), path, ema=0.9)
    with safe_open(path, framework="pt") as file:
        kinds = {name.partition(".")[0] for name in file.keys()}  # noqa: SIM118 (not a mapping)
    assert kinds == {"model", "optimizer", "average", "kept"}
    assert b"pickle" not in path.read_bytes()


def test_a_checkpoint_of_another_training_is_refused(digits, task, small_net, tmp_path):
    path = tmp_path / "epochs.safetensors"
    with pytest.raises(KeyboardInterrupt):
        run(digits, dropout_net(), path, 9)
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=r"of the same training, .*safetensors differs in settings momentum\."):
        run(digits, dropout_net(), path, momentum=0.8)
    other = dropout_net()
    with torch.no_grad():
        other[0].bias[0] += 1e-6
    with pytest.raises(ConfigError, match=r"differs in starting weights\."):
        run(digits, other, path)
    with pytest.raises(ConfigError, match=r"differs in settings .*objectives, steps in all, starting weights\."):
        fine_tune(small_net(), task, checkpoint=path)
    assert path.read_bytes() == before
    path.write_bytes(before[:-100])
    with pytest.raises(ConfigError, match="a checkpoint must be as edgeprune writes it"):
        run(digits, dropout_net(), path)


def test_a_write_that_is_interrupted_leaves_the_epoch_before(tmp_path, monkeypatch):
    path = tmp_path / "epochs.safetensors"
    checkpoints.write(path, {"a": 1}, {"x": torch.ones(3)}, [1])

    def half(tensors, file, metadata):
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "save_file", half)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.write(path, {"a": 1}, {"x": torch.zeros(3)}, [2])
    tensors, values = checkpoints.read(path, {"a": 1})
    assert values == [1]
    assert tensors["x"].tolist() == [1, 1, 1]
    assert [one.name for one in tmp_path.iterdir()] == [path.name]
