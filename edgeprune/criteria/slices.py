"""From channel groups to the weights of their units."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from edgeprune.errors import ModelError

if TYPE_CHECKING:
    from edgeprune.graph.channel_graph import ChannelGraph, ChannelGroup, Member


def selected(graph: ChannelGraph, groups: Sequence[str] | None) -> list[ChannelGroup]:
    """The groups of those names, in the graph's order; all when None."""
    if groups is None:
        return list(graph.groups)
    wanted = set(groups)
    return [group for group in graph.groups if group.name in wanted]


def parameter_members(
    groups: Sequence[ChannelGroup], model: nn.Module
) -> tuple[dict[str, nn.Parameter], dict[str, list[Member]]]:
    """What a group's removal takes away that was learned.

    Returns:
        The parameters by name, and per group name those members that are parameters (buffers such as running means are
        statistics of the data and left out).

    Raises:
        ModelError: A group has no parameter at all.
    """
    known = dict(model.named_parameters(remove_duplicate=False))
    members = {group.name: [member for member in group.members if member.parameter in known] for group in groups}
    for name, found in members.items():
        if not found:
            raise ModelError(f"a channel group must have parameters to be scored, found none in {name!r}.")
    used = {member.parameter for found in members.values() for member in found}
    return {name: known[name] for name in sorted(used)}, members


def makers(members: Sequence[Member]) -> list[Member]:
    """Those members that make the channels; all of them where none does."""
    return [member for member in members if member.role == "output"] or list(members)


def unit_rows(values: torch.Tensor, member: Member) -> torch.Tensor:
    """A tensor's slices as one row per unit.

    Args:
        values: Of the member's parameter's shape.
        member: Axis and, per unit, indices along that axis.

    Returns:
        Shape (units, elements of a slice), float64.
    """
    indices = torch.tensor(member.indices, device=values.device)
    found = values.detach().movedim(member.axis, 0)[indices.flatten()]
    return found.double().reshape(len(member.indices), -1)


def unit_sums(values: torch.Tensor, member: Member) -> npt.NDArray[np.float64]:
    """Sum a tensor over each unit's slice.

    Args:
        values: One value per element of the member's parameter, its shape.
        member: Axis and, per unit, indices along that axis.

    Returns:
        Shape (units,).
    """
    others = [axis for axis in range(values.ndim) if axis != member.axis]
    along = values.detach().double()
    along = along.sum(dim=others) if others else along
    lengths = torch.tensor([len(indices) for indices in member.indices])
    flat = torch.tensor([index for indices in member.indices for index in indices], dtype=torch.long)
    units = torch.repeat_interleave(torch.arange(len(member.indices)), lengths)
    sums = torch.zeros(len(member.indices), dtype=torch.float64)
    sums.index_add_(0, units, along.cpu()[flat])
    result: npt.NDArray[np.float64] = sums.numpy()
    return result
