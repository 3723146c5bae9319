"""The batches that a search looks at: training data, read once, in two parts.

A search compares losses on the first part, and asks for metrics on the second, which the losses have not been fitted to. The
validation data decide nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from edgeprune.errors import TaskError
from edgeprune.tasks.batches import objective_batches, sample_count, sharing
from edgeprune.tasks.task import Objective, Task

Batch = tuple[Any, Any]


class CalibrationData:
    """A few training batches of each objective, in two parts.

    Where all that a batch holds are tensors with the samples along axis 0, the samples are in random order over all batches,
    whatever the loader does.

    Args:
        task: The objectives; those that were given the same training data share batches here too.
        device: Where the batches are kept.
        losses: Most batches of each objective for losses.
        metrics: Most batches of each objective for metrics, others than those.
        seed: Of the order.

    Attributes:
        losses: Task whose training data are the first part.
        metrics: Task whose validation data are the second part.
        shuffled: The objectives whose samples are in random order.

    Raises:
        TaskError: An objective has no two batches.
    """

    def __init__(self, task: Task, device: torch.device, losses: int, metrics: int, seed: int) -> None:
        first: dict[str, Objective] = {}
        second: dict[str, Objective] = {}
        shuffled: set[str] = set()
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for together in sharing(task.objectives, "train"):
                read = list(objective_batches(together[0], "train", device, losses + metrics))
                if len(read) == 1:
                    raise TaskError(
                        f"a search under limits needs at least two training batches of objective {together[0].name!r}, one for "
                        "losses and one for metrics, found one.",
                        hint="a smaller batch size",
                    )
                # A last batch that is smaller comes anywhere.
                read = [read[place] for place in torch.randperm(len(read), generator=generator).tolist()]
                mixed = _mixed(read, generator)
                if mixed is not None:
                    shuffled |= {one.name for one in together}
                cut = max(1, len(read) * losses // (losses + metrics))
                # The same lists for all that share them: so they share the forward too.
                batches = read if mixed is None else mixed
                parts = batches[:cut], batches[cut:]
                for one in together:
                    first[one.name] = replace(one, train=parts[0])
                    second[one.name] = replace(one, validation=parts[1])
        self.losses = Task(tuple(first[one.name] for one in task.objectives))
        self.metrics = Task(tuple(second[one.name] for one in task.objectives))
        self.shuffled = frozenset(shuffled)


def _mixed(batches: Sequence[Batch], generator: torch.Generator) -> list[Batch] | None:
    """Batches of the same sizes with the samples of all of them in another order; None where they cannot be taken apart."""
    counts = [sample_count(inputs) for inputs, _ in batches]
    trees = [pytree.tree_flatten(batch) for batch in batches]
    leaves, form = trees[0]
    for (found, own), count in zip(trees, counts, strict=True):
        alike = own == form and all(isinstance(leaf, torch.Tensor) and leaf.ndim for leaf in found)
        if not alike or any(len(leaf) != count for leaf in found):
            return None
        if any(
            leaf.shape[1:] != one.shape[1:] or leaf.dtype != one.dtype for leaf, one in zip(found, leaves, strict=True)
        ):
            return None
    order = torch.randperm(sum(counts), generator=generator)
    columns = [
        torch.cat([found[place] for found, _ in trees])[order.to(leaves[place].device)] for place in range(len(leaves))
    ]
    parts = [torch.split(column, counts) for column in columns]
    return [pytree.tree_unflatten([part[number] for part in parts], form) for number in range(len(batches))]
