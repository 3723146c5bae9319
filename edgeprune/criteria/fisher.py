"""Diagonal of the empirical Fisher information of a gate per unit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch.utils import _pytree as pytree

from edgeprune.criteria._base import Criterion, Normalization
from edgeprune.criteria.gates import mean_squares
from edgeprune.criteria.slices import selected
from edgeprune.errors import ConfigError, TaskError
from edgeprune.tasks.batches import device_of, labeled_batches, sample_count

if TYPE_CHECKING:
    from torch import nn

    from edgeprune.graph.channel_graph import ChannelGraph
    from edgeprune.tasks.task import Task


class Fisher(Criterion):
    """``1/2 * mean over samples of (sum of grad_n * w over the weights that read the unit) ** 2``.

    The gradient is that of the loss of one sample. The sum is its derivative with respect to a gate on the unit
    (`edgeprune.criteria.gates`), its mean square the diagonal of the empirical Fisher information. Where the model is trained,
    that stands for the second derivative of the loss, and half of it for what the loss grows by when the gate goes from 1 to 0.

    Unlike `Taylor`, which squares the gradient of a batch, scores do not depend on the batch size, and gradients of samples
    that cancel still count. The price is a forward and a backward pass per sample. Several objectives: the weighted sum of
    their scores.

    Source: L. Theis et al., "Faster gaze prediction with dense networks and Fisher pruning", 2018, with one gate for all that is
    coupled as in L. Liu et al., "Group Fisher Pruning for Practical Network Compression", ICML 2021. The latter also divides
    by the memory that a unit takes; here the allocator weighs damage against cost.

    Args:
        samples: Most training samples per objective.
    """

    name: ClassVar[str] = "fisher"
    needs_task: ClassVar[bool] = True
    # Expected loss changes: one unit in all groups.
    normalization: ClassVar[Normalization] = "none"

    def __init__(self, samples: int = 256) -> None:
        if samples < 1:
            raise ConfigError(f"the fisher criterion must use at least 1 sample, found samples={samples}.")
        self.samples = samples

    def score(
        self, graph: ChannelGraph, model: nn.Module, task: Task | None = None, *, groups: Sequence[str] | None = None
    ) -> dict[str, npt.NDArray[np.float64]]:
        """See `Criterion.score`; raises `TaskError` too where a batch cannot be taken apart."""
        task, chosen = self._required(task, "its gradients"), selected(graph, groups)
        scores = {group.name: np.zeros(group.size) for group in chosen}
        for objective in task.objectives:
            batches = labeled_batches(objective, "train", device_of(model), self.samples)
            samples = islice(_single(batches), self.samples)
            for name, squares in mean_squares(chosen, model, objective, samples).items():
                scores[name] += objective.weight * squares / 2
        return self._finite(scores, "gradients")


def _single(batches: Iterable[tuple[Any, Any]]) -> Iterator[tuple[Any, Any]]:
    """Every sample of every batch as a batch of its own."""
    for batch in batches:
        count = sample_count(batch[0])
        if count == 1:
            yield batch
            continue
        for leaf in pytree.tree_leaves(batch):
            if not isinstance(leaf, torch.Tensor) or leaf.ndim == 0 or leaf.shape[0] != count:
                found = f"shape {tuple(leaf.shape)}" if isinstance(leaf, torch.Tensor) else type(leaf).__name__
                raise TaskError(
                    f"the fisher criterion must take batches apart along axis 0 of their {count} samples, found {found}.",
                    hint="a loader with batch_size=1, or the criterion taylor",
                )
        for index in range(count):
            yield pytree.tree_map(partial(_one, index), batch)


def _one(index: int, values: torch.Tensor) -> torch.Tensor:
    return values[index : index + 1]
