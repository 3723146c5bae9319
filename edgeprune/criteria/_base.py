"""The one interface of all importance scores."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from torch import nn

    from edgeprune.graph.channel_graph import ChannelGraph
    from edgeprune.tasks.task import Task

Scores = Mapping[str, npt.NDArray[np.float64]]
"""Group name to one score per unit, at least 0; the unit with the smallest score goes first."""
Normalization = Literal["none", "share", "log_share"]


class Criterion(ABC):
    """Scores every unit of every channel group: how much would be lost with it.

    What `edgeprune.testing.criteria` proves of every subclass: one finite score >= 0 per unit, the same scores on a second
    call, and a model that is left exactly as it was (weights, gradients, train or eval form).
    """

    name: ClassVar[str]
    needs_task: ClassVar[bool]
    """Whether scores need data and a loss."""
    normalization: ClassVar[Normalization]
    """How the damage of different groups is made comparable, see `edgeprune.criteria.damage.damage_curves`: ``"none"`` for
    scores that have one unit everywhere, such as squared changes of the loss, ``"log_share"`` for all others."""

    @abstractmethod
    def score(
        self, graph: ChannelGraph, model: nn.Module, task: Task | None = None, *, groups: Sequence[str] | None = None
    ) -> dict[str, npt.NDArray[np.float64]]:
        """Score the units of channel groups.

        Args:
            graph: Channel groups of `model`.
            model: The dense model; on return it is as it was.
            task: Data and loss, for criteria that need them.
            groups: Names of the groups to score; all when None.

        Returns:
            Group name to an array of shape (size,).

        Raises:
            TaskError: The criterion needs a task and there is none, or the task cannot be used.
            ModelError: A group lacks what the criterion looks at.
        """
