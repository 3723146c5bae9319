"""Random scores: the baseline that every criterion must beat."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import numpy.typing as npt

from edgeprune.criteria._base import Criterion, Normalization
from edgeprune.criteria.slices import selected

if TYPE_CHECKING:
    from torch import nn

    from edgeprune.graph.channel_graph import ChannelGraph
    from edgeprune.tasks.task import Task


class Random(Criterion):
    """Uniform in [0, 1), a function of the seed and the group's name only.

    Args:
        seed: Another seed, other scores.
    """

    name: ClassVar[str] = "random"
    needs_task: ClassVar[bool] = False
    normalization: ClassVar[Normalization] = "log_share"

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def score(
        self, graph: ChannelGraph, model: nn.Module, task: Task | None = None, *, groups: Sequence[str] | None = None
    ) -> dict[str, npt.NDArray[np.float64]]:
        """See `Criterion.score`; `model` and `task` are not used."""
        return {
            group.name: np.random.default_rng([self.seed, zlib.crc32(group.name.encode())]).random(group.size)
            for group in selected(graph, groups)
        }
