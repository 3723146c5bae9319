"""Mean magnitudes of the weights that make a unit: the scores of the published PAGCP."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from edgeprune.criteria.slices import makers, parameter_members, unit_sums

if TYPE_CHECKING:
    from torch import nn

    from edgeprune.graph.channel_graph import ChannelGraph


def mean_magnitudes(
    graph: ChannelGraph, model: nn.Module, names: Collection[str]
) -> dict[str, npt.NDArray[np.float64]]:
    """Per unit the mean magnitude of the weights that make it, summed over the layers that do.

    Args:
        graph: Channel groups of the model.
        model: Whose weights.
        names: Of the groups.

    Returns:
        Group name to scores, shape (size,).
    """
    groups = [group for group in graph.groups if group.name in names]
    parameters, members = parameter_members(groups, model)
    found = {}
    for group in groups:
        sums = np.zeros(group.size)
        for one in makers(members[group.name]):
            values = parameters[one.parameter]
            sums += unit_sums(values.abs(), one) * values.shape[one.axis] / values.numel()
        found[group.name] = sums
    return found
