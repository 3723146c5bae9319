"""Distance of a unit's filters to those of all other units (FPGM)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import numpy.typing as npt
import torch

from edgeprune.criteria._base import Criterion, Normalization
from edgeprune.criteria.slices import makers, parameter_members, selected, unit_rows

if TYPE_CHECKING:
    from torch import nn

    from edgeprune.graph.channel_graph import ChannelGraph
    from edgeprune.tasks.task import Task


class GeometricMedian(Criterion):
    """``sum over the units v of the group of ||w_u - w_v||``, with `w` the filters that make a unit.

    Units near to the geometric median of all lie in the midst of others that can stand in for them. Where several layers make
    the channels (a residual connection, a depthwise convolution behind), their filters are one long vector, because the unit
    that stands in is the same one in all of them.

    Source: Y. He et al., "Filter Pruning via Geometric Median for Deep Convolutional Neural Networks Acceleration", CVPR 2019.
    Its code can remove filters of small norm beside; that is another criterion. Torch-Pruning's version takes
    distances between ``|w| ** 2``, in which filters of opposite sign are equal; here they are apart.
    """

    name: ClassVar[str] = "geometric_median"
    needs_task: ClassVar[bool] = False
    # Distances rank the units of one group; their scale is that of its weights.
    normalization: ClassVar[Normalization] = "log_share"

    def score(
        self, graph: ChannelGraph, model: nn.Module, task: Task | None = None, *, groups: Sequence[str] | None = None
    ) -> dict[str, npt.NDArray[np.float64]]:
        """See `Criterion.score`; `task` is not used."""
        chosen = selected(graph, groups)
        parameters, members = parameter_members(chosen, model)
        scores = {}
        for group in chosen:
            squares = torch.zeros(group.size, group.size, dtype=torch.float64)
            for member in makers(members[group.name]):
                squares += _squared_distances(unit_rows(parameters[member.parameter], member)).cpu()
            scores[group.name] = squares.sqrt().sum(1).numpy()
        return scores


def _squared_distances(rows: torch.Tensor) -> torch.Tensor:
    """Between all pairs of rows, shape (rows, rows)."""
    # Far from the origin the difference of two products would lose digits.
    rows = rows - rows.mean(0)
    norms = rows.square().sum(1)
    found = (norms[:, None] + norms[None, :] - 2 * rows @ rows.T).clamp_(min=0)
    return found.fill_diagonal_(0)
