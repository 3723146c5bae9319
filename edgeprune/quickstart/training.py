"""Train the dense model of the quickstart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from edgeprune.files import replacing
from edgeprune.quickstart import digits
from edgeprune.quickstart.digits import Augmented, Digits
from edgeprune.quickstart.network import DigitNet
from edgeprune.recovery.evaluation import StepProgress
from edgeprune.recovery.fine_tuning import FineTuning, fine_tune
from edgeprune.tasks.task import Task

Progress = Callable[[int, int], None]
"""Called with (steps done, steps in all)."""

_EPOCHS_HALF_SIZE = 10
_EPOCHS_FULL_SIZE = 3


def smoothed_cross_entropy(outputs: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy with a label smoothing of 0.05."""
    return nn.functional.cross_entropy(outputs, labels, label_smoothing=0.05)


def task(data: Digits, size: int = digits.SIZE) -> Task:
    """The digits as a task at a size of choice: augmented training data, accuracy on the validation split."""
    return Task.single(
        train=Augmented(data.train, size),
        validation=digits.loader(digits.resized(data.validation, size)),
        loss=smoothed_cross_entropy,
        metric=digits.accuracy,
        name="accuracy",
    )


def train(data: Digits, *, seed: int, checkpoint: Path, progress: Progress | None = None) -> DigitNet:
    """A trained dense model; taken from `checkpoint` where an earlier run has left it.

    Args:
        data: The digits.
        seed: Of the weights and of everything random in training.
        checkpoint: Safetensors file; it appears when training is done.
        progress: Told the optimizer steps.
    """
    from safetensors.torch import load_file, save_file

    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = DigitNet()
    if checkpoint.exists():
        model.load_state_dict(load_file(checkpoint))
        return model.eval()
    steps_per_epoch = len(Augmented(data.train))
    total = steps_per_epoch * (_EPOCHS_HALF_SIZE + _EPOCHS_FULL_SIZE)

    def tell(offset: int) -> StepProgress:
        return lambda _step, done, _total: progress(offset + done, total) if progress is not None else None

    half = FineTuning(epochs=_EPOCHS_HALF_SIZE, lr=0.05, optimizer="sgd", weight_decay=5e-4, seed=seed)
    full = FineTuning(epochs=_EPOCHS_FULL_SIZE, seed=seed)
    fine_tune(model, task(data, digits.SIZE // 2), half, progress=tell(0))
    fine_tune(model, task(data), full, progress=tell(steps_per_epoch * _EPOCHS_HALF_SIZE))
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    with replacing(checkpoint) as partial:
        save_file(model.state_dict(), partial)
    return model.eval()


def test_answers(model: nn.Module, data: Digits) -> Tensor:
    """Which images of the held-out test split are recognized, shape (n,), bool; nothing else reads that split."""
    images, labels = data.test
    was_training = model.training
    model.eval()
    with torch.no_grad():
        outputs = torch.cat([model(part) for part in torch.split(images, 60)])
    model.train(was_training)
    return outputs.argmax(1) == labels
