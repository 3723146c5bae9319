"""L2 norm of everything that a unit's removal takes away. Needs no data: the default without a task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import numpy.typing as npt

from edgeprune.criteria._base import Criterion, Normalization
from edgeprune.criteria.slices import parameter_members, selected, unit_sums

if TYPE_CHECKING:
    from torch import nn

    from edgeprune.graph.channel_graph import ChannelGraph
    from edgeprune.tasks.task import Task


class L2(Criterion):
    """``sqrt(sum over all coupled members of sum(w * w) over the unit's slice)``.

    Members are all parameters that are cut together: output and input side of weights, biases, normalization scales. An
    element that lies in the slices of two members (a conv whose input and output are one group) counts for each.

    Source: group-level magnitude as in G. Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR 2023.
    """

    name: ClassVar[str] = "l2"
    needs_task: ClassVar[bool] = False
    normalization: ClassVar[Normalization] = "log_share"

    def score(
        self, graph: ChannelGraph, model: nn.Module, task: Task | None = None, *, groups: Sequence[str] | None = None
    ) -> dict[str, npt.NDArray[np.float64]]:
        """See `Criterion.score`; `task` is not used."""
        chosen = selected(graph, groups)
        parameters, members = parameter_members(chosen, model)
        squares = {name: parameter.detach().double().square() for name, parameter in parameters.items()}
        return {
            group.name: np.sqrt(
                np.sum([unit_sums(squares[member.parameter], member) for member in members[group.name]], axis=0)
            )
            for group in chosen
        }
