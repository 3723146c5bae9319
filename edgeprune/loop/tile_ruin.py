"""A budget that leaves nothing of what a model knows must be called that, before anything is tuned for hours."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from edgeprune.criteria.tiles.losses import projected_outputs, squared_outputs
from edgeprune.tasks.batches import call, device_of, labeled_batches, loss_of, mode

if TYPE_CHECKING:
    from torch import nn

    from edgeprune.tasks.task import Task

BATCHES = 4
"""Training batches of each objective that are looked at."""


def known_loss(model: nn.Module, task: Task, *, batches: int = BATCHES) -> float:
    """What the model knows, in units of the training loss: how much it rises where each output is the mean of its batch.

    Of outputs that do not depend on the input a loss can hardly be higher for a reason.

    Args:
        model: The dense model.
        task: Training batches and losses; objectives count by their weight, those that need no labels not at all, since
            their losses are no errors.
        batches: Most batches of each objective.

    Returns:
        0 or less where that cannot be told: batches of one sample, or losses that do not say how good outputs are.

    Raises:
        TaskError: The task cannot be used.
    """
    total = 0.0
    with mode(model, training=False), torch.no_grad():
        for one in task.objectives:
            if one.loss in (projected_outputs, squared_outputs):
                continue
            rises = []
            for inputs, targets in labeled_batches(one, "train", device_of(model), batches):
                outputs = call(model, inputs)
                blind = pytree.tree_map_only(torch.Tensor, _mean, outputs)
                rises.append(float(loss_of(one, blind, targets)) - float(loss_of(one, outputs, targets)))
            total += one.weight * float(np.mean(rises))
    return total


def ruin_notes(damage: float, known: float) -> Iterator[str]:
    """That an estimated damage is more than all that there is to lose, where it is.

    Args:
        damage: Estimated increase of the training loss.
        known: Of `known_loss`.
    """
    if 0 < known <= damage:
        yield (
            f"This budget is estimated to raise the training loss by {damage:.3g}, and outputs that do not look at the input "
            f"would by {known:.3g}: it only destroys accuracy, unless tuning brings it back. A larger budget loses less."
        )


def _mean(value: torch.Tensor) -> Any:
    return value.mean(0, keepdim=True).expand_as(value) if value.ndim and value.is_floating_point() else value
