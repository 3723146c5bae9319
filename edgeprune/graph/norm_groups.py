"""Shapes that a group norm computes with: its input as [batch, groups, values of one group].

No node of the traced program has this shape, but runtimes that have no group norm reshape to it, and how many groups are left
at other widths does not follow from the number of channels that are left.
"""

from __future__ import annotations

import numpy as np
from torch.fx import Node

from edgeprune.graph.atoms import KEPT, Ids
from edgeprune.graph.capture import Capture, shape_of
from edgeprune.graph.rules._base import named_arguments


def grouped_name(node: str, groups: int) -> str:
    """The name of the output of a node seen as [batch, groups, values of one group]."""
    return f"{node}.groups{groups}"


def in_norm_groups(captured: Capture, unit_of: dict[str, tuple[Ids, ...]]) -> dict[str, tuple[Ids, ...]]:
    """Codes of the three axes of every group norm's input, by `grouped_name`.

    Args:
        captured: The program.
        unit_of: Codes per node and axis, see `edgeprune.graph.channel_graph.ChannelGraph.unit_of`.
    """
    found: dict[str, tuple[Ids, ...]] = {}
    for node in captured.program.graph.nodes:
        if str(node.target) != "aten.group_norm.default":
            continue
        arguments = named_arguments(node)
        source, groups = arguments["input"], int(arguments["num_groups"])
        assert isinstance(source, Node)
        batch, channels, *_ = unit_of[source.name]
        pixels = int(np.prod(shape_of(source.meta["val"], captured.batch)[2:], dtype=np.int64))
        # Whole groups go, or as many channels of each: a factor is the same throughout a group, or the same in all groups.
        codes = channels.reshape(len(channels), groups, -1)
        throughout = (codes == codes[:, :, :1]).all(axis=(1, 2))[:, None]
        outer = np.where(throughout, codes[:, :, 0], KEPT)
        inner = np.where(throughout, KEPT, codes[:, 0])
        found[grouped_name(source.name, groups)] = (batch, outer, np.repeat(inner, pixels, axis=1))
    return found
