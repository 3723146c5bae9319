"""Squared first-order Taylor estimate of the loss change when a unit is set to zero."""

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

    from edgeprune.graph.channel_graph import ChannelGraph, Member
    from edgeprune.tasks.task import Task

_ROLES = ("input", "output", "vector")


class Taylor(Criterion):
    """``mean over batches of (sum of grad * w over the weights that read the unit) ** 2``.

    The sum is the derivative of the loss with respect to one gate that multiplies the unit's activation wherever it is read,
    so to first order the change of the loss when that gate goes from 1 to 0; a score is its square. Weights that make the
    unit, its batch norms and its depthwise convolutions lie in series with those that read it: adding them too would count
    the same zeroing once per layer. Only a unit that no weight reads is scored by the weights that make it (or else by its
    scales), all of them together.

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
                        sums[group.name] += _gate_derivative(members[group.name], products, group.size) ** 2
                    count += 1
                for name, total in sums.items():
                    scores[name] += objective.weight * total / count
        for name, values in scores.items():
            if not np.isfinite(values).all():
                raise TaskError(
                    f"gradients must be finite for the taylor criterion, found NaN or infinity in group {name!r}."
                )
        return scores


def _gate_derivative(
    members: Sequence[Member], products: Mapping[str, torch.Tensor], size: int
) -> npt.NDArray[np.float64]:
    """Per unit the sum of ``grad * w`` over its members of the first role of `_ROLES` that it has any of."""
    derivative, open_units = np.zeros(size), np.ones(size, dtype=bool)
    for role in _ROLES:
        covered = np.zeros(size, dtype=bool)
        for member in members:
            if member.role != role:
                continue
            covered |= np.array([len(indices) > 0 for indices in member.indices], dtype=bool)
            # No gradient: the loss does not depend on this parameter.
            if member.parameter in products:
                derivative += np.where(open_units, unit_sums(products[member.parameter], member), 0.0)
        open_units &= ~covered
    return derivative


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
