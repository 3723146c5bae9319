"""Squared first-order Taylor estimate of the loss change when a unit is set to zero."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import numpy.typing as npt

from edgeprune.criteria._base import Criterion, Normalization
from edgeprune.criteria.gates import mean_squares
from edgeprune.criteria.slices import selected
from edgeprune.errors import ConfigError
from edgeprune.tasks.batches import device_of, labeled_batches

if TYPE_CHECKING:
    from torch import nn

    from edgeprune.graph.channel_graph import ChannelGraph
    from edgeprune.tasks.task import Task


class Taylor(Criterion):
    """``mean over batches of (sum of grad * w over the weights that read the unit) ** 2``.

    The sum is the derivative of the loss with respect to one gate that multiplies the unit's activation wherever it is read,
    so to first order the change of the loss when that gate goes from 1 to 0; a score is its square. What makes the unit lies in
    series with that and is left out, see `edgeprune.criteria.gates.gate_members`.

    The gradients are those of the training loss in eval form (running batch-norm statistics, no dropout). The noise of a
    batch's gradient is squared too, so scores of small batches are larger: compare scores of one batch size only. Several
    objectives: the weighted sum of their scores.

    Source: P. Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019: the squared first-order form,
    on a gate per unit.

    Args:
        batches: Most training batches per objective.
    """

    name: ClassVar[str] = "taylor"
    needs_task: ClassVar[bool] = True
    normalization: ClassVar[Normalization] = "none"

    def __init__(self, batches: int = 32) -> None:
        if batches < 1:
            raise ConfigError(f"the taylor criterion must use at least 1 batch, found batches={batches}.")
        self.batches = batches

    def score(
        self, graph: ChannelGraph, model: nn.Module, task: Task | None = None, *, groups: Sequence[str] | None = None
    ) -> dict[str, npt.NDArray[np.float64]]:
        """See `Criterion.score`."""
        task, chosen = self._required(task, "its gradients"), selected(graph, groups)
        scores = {group.name: np.zeros(group.size) for group in chosen}
        for objective in task.objectives:
            batches = labeled_batches(objective, "train", device_of(model), self.batches)
            for name, squares in mean_squares(chosen, model, objective, batches).items():
                scores[name] += objective.weight * squares
        return self._finite(scores, "gradients")
