"""The criterion that needs nothing but the weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from edgeprune.graph.channel_graph import ChannelGraph, Member


def l2_norms(graph: ChannelGraph) -> dict[str, npt.NDArray[np.float64]]:
    """Per group and unit the L2 norm of the weights that make its channels (of all its weights where none do)."""
    tensors: dict[str, Any] = {**graph.program.constants, **graph.program.state_dict}
    norms = {}
    for group in graph.groups:
        makers = [member for member in group.members if member.role == "output"]
        squares = np.zeros(group.size)
        for member in makers or group.members:
            squares += _squares(tensors[member.parameter].detach().double().cpu().numpy(), member)
        norms[group.name] = np.sqrt(squares)
    return norms


def _squares(weight: npt.NDArray[np.float64], member: Member) -> npt.NDArray[np.float64]:
    others = tuple(axis for axis in range(weight.ndim) if axis != member.axis)
    per_index = np.square(weight).sum(axis=others)
    sums: npt.NDArray[np.float64] = per_index[np.array(member.indices)].sum(axis=1)
    return sums
