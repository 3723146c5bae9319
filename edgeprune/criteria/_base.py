"""The one interface of all importance scores."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from edgeprune.errors import TaskError

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

    def require(self, task: Task | None) -> None:
        """Refuse a task that is not there, where scores need one: before anything that takes long.

        Raises:
            TaskError: There is none, and scores need data.
        """
        if self.needs_task:
            self._required(task, "its data")

    def _required(self, task: Task | None, what: str) -> Task:
        """The task, which must be there.

        Args:
            task: What was given.
            what: What it is needed for, e.g. ``"its gradients"``.

        Raises:
            TaskError: There is none.
        """
        if task is None:
            raise TaskError(
                f"the {self.name} criterion must have a task for {what}, found none.",
                hint="--task FILE.py:FACTORY, or the data-free criterion l2; task= in Python",
            )
        return task

    def _finite(self, scores: dict[str, npt.NDArray[np.float64]], what: str) -> dict[str, npt.NDArray[np.float64]]:
        """Scores made from data, none of them NaN or infinite.

        Args:
            scores: Group name to scores.
            what: What they were made of, e.g. ``"gradients"``.

        Raises:
            TaskError: Some are not finite.
        """
        for name, values in scores.items():
            if not np.isfinite(values).all():
                raise TaskError(
                    f"{what} must be finite for the {self.name} criterion, found NaN or infinity in group {name!r}."
                )
        return scores
