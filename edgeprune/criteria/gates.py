"""What a gate on each unit would change: the derivative of the loss with respect to it, and closing it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from edgeprune.criteria.slices import parameter_members, unit_sums
from edgeprune.errors import TaskError
from edgeprune.tasks.batches import call, loss_of, mode

if TYPE_CHECKING:
    from torch import nn

    from edgeprune.graph.channel_graph import ChannelGroup, Member
    from edgeprune.tasks.task import Objective

_ROLES = ("input", "output", "vector")


def gate_members(members: Sequence[Member], size: int) -> list[tuple[Member, npt.NDArray[np.bool_]]]:
    """The weights on which a gate of each unit lies: those that read it.

    Weights that make a unit, its batch norms and its depthwise convolutions lie in series with those that read it: with them
    the same gate would count once per layer. Only a unit that no weight reads has its gate on the weights that make it (or
    else on its scales), all of them together.

    Args:
        members: Parameters of one group.
        size: Its number of units.

    Returns:
        Members, each with the units that it gates, shape (size,).
    """
    found, open_units = [], np.ones(size, dtype=bool)
    for role in _ROLES:
        covered = np.zeros(size, dtype=bool)
        for member in members:
            if member.role == role:
                covered |= np.array([len(indices) > 0 for indices in member.indices], dtype=bool)
                found.append((member, open_units))
        open_units = open_units & ~covered
    return [(member, gated) for member, gated in found if gated.any()]


def closing_members(members: Sequence[Member], size: int) -> list[tuple[Member, npt.NDArray[np.bool_]]]:
    """The weights that must be zero for a unit to be: those that read it, or all that make it, biases too.

    Args:
        members: Parameters of one group.
        size: Its number of units.

    Returns:
        Members, each with the units that it closes, shape (size,).
    """
    found, unread = [], np.ones(size, dtype=bool)
    for member in members:
        if member.role == "input":
            found.append((member, np.ones(size, dtype=bool)))
            unread &= ~np.array([len(indices) > 0 for indices in member.indices], dtype=bool)
    if unread.any():
        found += [(member, unread) for member in members if member.role != "input"]
    return found


def gate_derivatives(
    groups: Sequence[ChannelGroup], model: nn.Module, objective: Objective, batches: Iterable[tuple[Any, Any]]
) -> Iterator[dict[str, npt.NDArray[np.float64]]]:
    """Per batch the derivative of the loss with respect to one gate per unit, which multiplies the unit where it is read.

    It is the sum of ``grad * w`` over the weights of `gate_members`. The gradients are those of the loss in eval form (running
    batch-norm statistics, no dropout). The model is as it was whenever this stops, also halfway.

    Args:
        groups: The groups to look at.
        model: Where their parameters are.
        objective: For the loss.
        batches: Inputs and targets.

    Yields:
        Group name to derivatives, shape (size,).

    Raises:
        TaskError: The loss has no gradient, or the task cannot be used.
        ModelError: A group has no parameter.
    """
    parameters, members = parameter_members(groups, model)
    gates = {group.name: gate_members(members[group.name], group.size) for group in groups}
    for inputs, targets in batches:
        with mode(model, training=False), differentiable(parameters), torch.enable_grad():
            loss = loss_of(objective, call(model, inputs), targets)
            if not loss.requires_grad:
                raise TaskError(
                    f"the loss of objective {objective.name!r} must be differentiable, found one without a gradient."
                )
            gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        products = {
            name: gradient.double() * parameter.detach().double()
            for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True)
            # No gradient: the loss does not depend on this parameter.
            if gradient is not None
        }
        yield {group.name: derivatives_of(gates[group.name], products, group.size) for group in groups}


def derivatives_of(
    gates: Sequence[tuple[Member, npt.NDArray[np.bool_]]], products: Mapping[str, torch.Tensor], size: int
) -> npt.NDArray[np.float64]:
    """Derivative of the loss by the gate of each unit of a group.

    Args:
        gates: Of `gate_members`.
        products: Gradient times weight by parameter; a parameter that the loss does not depend on is left out.
        size: Units of the group.

    Returns:
        Shape (size,).
    """
    found = np.zeros(size)
    for member, gated in gates:
        if member.parameter in products:
            found += np.where(gated, unit_sums(products[member.parameter], member), 0.0)
    return found


def mean_squares(
    groups: Sequence[ChannelGroup], model: nn.Module, objective: Objective, batches: Iterable[tuple[Any, Any]]
) -> dict[str, npt.NDArray[np.float64]]:
    """Mean over batches of the squared derivatives by gates, see `gate_derivatives`, shape (size,) per group."""
    sums = {group.name: np.zeros(group.size) for group in groups}
    count = 0
    for derivatives in gate_derivatives(groups, model, objective, batches):
        for name, values in derivatives.items():
            sums[name] += values**2
        count += 1
    return {name: total / count for name, total in sums.items()}


@contextmanager
def differentiable(parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Frozen parameters can be pruned too, so they need gradients for the time of scoring."""
    frozen = [parameter for parameter in parameters.values() if not parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
