"""First-order Taylor estimate of the loss change when a unit is set to zero."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import numpy.typing as npt
import torch

from edgeprune.criteria._base import Criterion, Normalization
from edgeprune.criteria.slices import parameter_members, selected, unit_sums
from edgeprune.errors import ConfigError, TaskError
from edgeprune.tasks.batches import call, device_of, loss_of, mode, objective_batches

if TYPE_CHECKING:
    from torch import nn

    from edgeprune.graph.channel_graph import ChannelGraph
    from edgeprune.tasks.task import Task


class Taylor(Criterion):
    """``mean over batches of (sum over all coupled members of sum(grad * w) over the unit's slice) ** 2``.

    The gradients are those of the training loss in eval form (running batch-norm statistics, no dropout), so scores do not
    depend on the training batch size more than the loss does. Several objectives: the weighted sum of their scores.

    Source: P. Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019 (the squared first-order
    form), summed over coupled members before squaring.

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
        if task is None:
            raise TaskError(
                "the taylor criterion must have a task for its gradients, found none.",
                hint="give task=, or the data-free criterion l2",
            )
        chosen = selected(graph, groups)
        parameters, members = parameter_members(chosen, model)
        scores = {group.name: np.zeros(group.size) for group in chosen}
        device = device_of(model)
        with mode(model, training=False), _differentiable(parameters), torch.enable_grad():
            for objective in task.objectives:
                sums = {group.name: np.zeros(group.size) for group in chosen}
                count = 0
                for inputs, targets in objective_batches(objective, "train", device, self.batches):
                    loss = loss_of(objective, call(model, inputs), targets)
                    if not loss.requires_grad:
                        raise TaskError(
                            f"the loss of objective {objective.name!r} must be differentiable, found one without a gradient."
                        )
                    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
                    products = {
                        name: gradient.double() * parameter.detach().double()
                        for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True)
                        if gradient is not None
                    }
                    for group in chosen:
                        change = np.zeros(group.size)
                        for member in members[group.name]:
                            if member.parameter in products:
                                change += unit_sums(products[member.parameter], member)
                        sums[group.name] += change**2
                    count += 1
                for name, total in sums.items():
                    scores[name] += objective.weight * total / count
        for name, values in scores.items():
            if not np.isfinite(values).all():
                raise TaskError(
                    f"gradients must be finite for the taylor criterion, found NaN or infinity in group {name!r}."
                )
        return scores


@contextmanager
def _differentiable(parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Frozen parameters can be pruned too, so they need gradients for the time of scoring."""
    frozen = [parameter for parameter in parameters.values() if not parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
