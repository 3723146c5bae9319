"""L1 norm of the filters that make a unit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import numpy.typing as npt

from edgeprune.criteria._base import Criterion, Normalization
from edgeprune.criteria.slices import makers, parameter_members, selected, unit_sums

if TYPE_CHECKING:
    from torch import nn

    from edgeprune.graph.channel_graph import ChannelGraph
    from edgeprune.tasks.task import Task


class L1(Criterion):
    """``sum of |w| over the filters that make the unit``.

    Only weights that make the unit count, of all layers that do where several are coupled (a residual connection, a depthwise
    convolution behind); biases, norms and the layers that read it do not. For everything that goes with the unit see `L2`.

    Source: H. Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017, section 3.1.
    """

    name: ClassVar[str] = "l1"
    needs_task: ClassVar[bool] = False
    # Sums over layers of different size and scale only rank the units of one group.
    normalization: ClassVar[Normalization] = "log_share"

    def score(
        self, graph: ChannelGraph, model: nn.Module, task: Task | None = None, *, groups: Sequence[str] | None = None
    ) -> dict[str, npt.NDArray[np.float64]]:
        """See `Criterion.score`; `task` is not used."""
        chosen = selected(graph, groups)
        parameters, members = parameter_members(chosen, model)
        return {
            group.name: np.sum(
                [
                    unit_sums(parameters[member.parameter].detach().abs(), member)
                    for member in makers(members[group.name])
                ],
                axis=0,
            )
            for group in chosen
        }
