"""Group magnitude as Torch-Pruning computes it: mean square norm over all coupled weights, by the group's mean."""

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


class GroupNorm(Criterion):
    """``m_u / mean of m over the group``, where ``m_u = mean over coupled weights of sum(w * w) over the unit's slice``.

    Coupled weights are the output and input sides of layers and the scales of norms; biases are left out. Unlike in `L2`
    there is no root, so large units weigh more in what a group loses; division by the mean makes 1 the score of an average
    unit in every group.

    Source: G. Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR 2023; defaults of Torch-Pruning's group magnitude
    importance (p = 2, reduced and normalized by the mean).
    """

    name: ClassVar[str] = "group_norm"
    needs_task: ClassVar[bool] = False
    # Divided by their mean, scores compare across groups, but not as losses: an emptied group would still cost little.
    normalization: ClassVar[Normalization] = "log_share"

    def score(
        self, graph: ChannelGraph, model: nn.Module, task: Task | None = None, *, groups: Sequence[str] | None = None
    ) -> dict[str, npt.NDArray[np.float64]]:
        """See `Criterion.score`; `task` is not used."""
        chosen = selected(graph, groups)
        parameters, members = parameter_members(chosen, model)
        scores = {}
        for group in chosen:
            own = members[group.name]
            weights = [member for member in own if not member.parameter.rpartition(".")[2].endswith("bias")] or own
            means = np.mean(
                [unit_sums(parameters[member.parameter].detach().double().square(), member) for member in weights],
                axis=0,
            )
            scores[group.name] = means / means.mean() if means.any() else means
        return scores
