"""The loss of each sample of a batch, where an objective's loss is the mean of those."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree

from edgeprune.tasks.batches import labeled_samples, loss_of
from edgeprune.tasks.task import Objective

_SAME = 1e-3
"""Relative difference between the loss of a batch and the mean of those of its samples, up to which the two are one."""


def losses_by_sample(one: Objective, outputs: Any, targets: Any, count: int) -> list[float] | None:
    """The loss of each sample that has labels; None where the loss of the batch is not their mean, or one is below 0.

    Args:
        one: Whose loss.
        outputs: What the model returned for the batch.
        targets: Of the batch.
        count: Its samples.
    """
    found = []
    for place in range(count):

        def only(leaf: torch.Tensor, place: int = place) -> torch.Tensor:
            return leaf[place : place + 1] if leaf.ndim and len(leaf) == count else leaf

        own, wanted = (pytree.tree_map_only(torch.Tensor, only, tree) for tree in (outputs, targets))
        if labeled_samples(one, own, wanted, 1)[2]:
            found.append(float(loss_of(one, own, wanted)))
    if not found:
        return found
    whole, mean = float(loss_of(one, outputs, targets)), sum(found) / len(found)
    return found if min(found) >= 0 and abs(whole - mean) <= _SAME * max(abs(whole), abs(mean)) else None
