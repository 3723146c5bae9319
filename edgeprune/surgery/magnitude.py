"""The criterion that needs nothing but the weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

if TYPE_CHECKING:
    from edgeprune.graph.channel_graph import ChannelGraph, Member


def l2_norms(graph: ChannelGraph) -> dict[str, npt.NDArray[np.float64]]:
    """Per group and unit the L2 norm of the weights that make its channels (of all its weights where none do)."""
    tensors: dict[str, Any] = {**graph.program.constants, **graph.program.state_dict}
    norms = {}
    for group in graph.groups:
        floating = [member for member in group.members if tensors[member.parameter].is_floating_point()]
        makers = [member for member in floating if member.role == "output"]
        squares = np.zeros(group.size)
        for member in makers or floating:
            squares += _squares(tensors[member.parameter].detach(), member)
        norms[group.name] = np.sqrt(squares)
    return norms


def _squares(weight: torch.Tensor, member: Member) -> npt.NDArray[np.float64]:
    others = [axis for axis in range(weight.ndim) if axis != member.axis]
    per_index = torch.linalg.vector_norm(weight, dim=others) if others else weight.abs()
    squares = per_index.double().square().cpu().numpy()
    sums: npt.NDArray[np.float64] = squares[np.array(member.indices)].sum(axis=1)
    return sums
