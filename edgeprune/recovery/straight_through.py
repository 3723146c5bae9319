"""A model that trains with some of its units masked, in a way that lets them come back.

A masked unit counts for nothing: the weights that read it are zero. The gradient passes to those weights as if there were no
mask (straight-through), so they go on learning, and say what the loss would gain if the unit were there.

Source: R. Humble et al., "Soft Masking for Cost-Constrained Channel Pruning", ECCV 2022, section 3.1; the estimator is that
of Y. Bengio, N. Leonard, A. Courville, "Estimating or Propagating Gradients Through Stochastic Neurons", 2013.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from edgeprune.criteria.gates import closing_members, derivatives_of, gate_members
from edgeprune.criteria.slices import parameter_members
from edgeprune.errors import TaskError
from edgeprune.tasks.batches import sample_count

if TYPE_CHECKING:
    from edgeprune.graph.channel_graph import ChannelGroup


class StraightThroughMasks(nn.Module):
    """Runs a model on masked weights; its parameters are the model's own, unmasked.

    What runs over masked units other than by a weight (a layer norm or a mean over pruned channels) still sees them here, while
    the cut model does not; everything else computes what the cut model computes.

    Args:
        model: Trained in place; its forward stays as it is.
        groups: What can be masked; at first nothing is.
        absent: Names of parameters that count as zero throughout and do not learn: those of removed branches.

    Raises:
        ModelError: A group has no parameter.
        TaskError: A weight that a mask lies on does not require gradients.

    Attributes:
        model: As given.
        samples: In the last batch that went forward in train form.
    """

    def __init__(self, model: nn.Module, groups: Sequence[ChannelGroup], absent: Collection[str] = ()) -> None:
        super().__init__()
        self.model = model
        self._parameters_of, members = parameter_members(groups, model)
        self._sizes = {group.name: group.size for group in groups}
        self._gates = {name: gate_members(members[name], size) for name, size in self._sizes.items()}
        self._closing = {name: closing_members(members[name], size) for name, size in self._sizes.items()}
        self._absent = set(absent)
        for name in {member.parameter for gates in self._gates.values() for member, _ in gates} - self._absent:
            if not self._parameters_of[name].requires_grad:
                raise TaskError(
                    f"soft masking scores units by gradients, so {name} must require them, found that it does not.",
                    hint="requires_grad_(True), or constraints that keep what it reads",
                )
        self._masks: dict[str, torch.Tensor] = {}
        self.samples = 0
        self.keep({})

    def keep(self, kept: Mapping[str, Sequence[int]]) -> None:
        """Mask all units but these; groups that are not named stay whole."""
        masks: dict[int, tuple[str, torch.Tensor]] = {}
        known = dict(self.model.named_parameters(remove_duplicate=False))
        for group, units in kept.items():
            gone = np.ones(self._sizes[group], dtype=bool)
            gone[list(units)] = False
            for member, closed in self._closing[group]:
                indices = [index for unit in np.flatnonzero(gone & closed) for index in member.indices[unit]]
                if indices:
                    weight = known[member.parameter]
                    # Tied weights are one tensor with one mask.
                    _, mask = masks.setdefault(id(weight), (member.parameter, torch.ones_like(weight)))
                    mask.index_fill_(member.axis, torch.tensor(indices, device=weight.device), 0.0)
        self._masks = {name: mask.detach() for name, mask in masks.values() if name not in self._absent}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the model, on masked weights."""
        if self.training:
            self.samples = sample_count((args, kwargs))
        known = dict(self.model.named_parameters(remove_duplicate=False))
        weights = {
            # Exactly weight * mask going forward: what is taken away is the very same number.
            name: known[name] + (known[name] * mask - known[name]).detach()
            for name, mask in self._masks.items()
        }
        weights |= {name: torch.zeros_like(known[name]) for name in self._absent if name in known}
        return torch.func.functional_call(self.model, weights, args, kwargs)

    def gate_derivatives(self) -> dict[str, npt.NDArray[np.float64]]:
        """From the gradients of the last step, the derivative of the loss by a gate on each unit, masked ones included.

        Returns:
            Group name to an array of shape (size,); all 0 where the loss does not depend on a group.
        """
        products = {
            name: parameter.grad.double() * parameter.detach().double()
            for name, parameter in self._parameters_of.items()
            if parameter.grad is not None
        }
        return {name: derivatives_of(gates, products, self._sizes[name]) for name, gates in self._gates.items()}
