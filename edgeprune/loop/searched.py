"""What a search that looks at data, or trains, while it chooses widths hands to the rest of `edgeprune.prune`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from edgeprune.loop.planning import Planner, Progress, Proposal
    from edgeprune.recovery.distillation._base import Distillation
    from edgeprune.recovery.evaluation import RecoveryRecord
    from edgeprune.recovery.fine_tuning import FineTuning
    from edgeprune.tasks.task import Task


@dataclass(frozen=True)
class Searched:
    """A plan, and the weights that it is for.

    Attributes:
        planner: Makes further plans from where the search ended; its model has the shapes of the dense one and the weights
            of the search.
        proposal: The plan.
        record: What the search did, with the metrics before and after.
        notes: Sentences that a person should read.
    """

    planner: Planner
    proposal: Proposal
    record: RecoveryRecord
    notes: tuple[str, ...]


class Search(Protocol):
    """Soft masking, NetAdapt, PAGCP, or damage per objective."""

    @property
    def trains(self) -> bool:
        """Whether weights change on the way."""
        ...

    @property
    def resumes(self) -> bool:
        """Whether it goes on from where it was interrupted."""
        ...

    def require(self, planner: Planner, budget_ms: float) -> None:
        """Refuse what cannot be searched, before the long steps: nothing is scored for it.

        Args:
            planner: Of the dense model.
            budget_ms: Predicted latency that is aimed at, at most, milliseconds.
        """
        ...

    def search(
        self,
        planner: Planner,
        proposal: Proposal,
        *,
        fine_tuning: FineTuning | None = None,
        distill: Sequence[Distillation] = (),
        checkpoint: Path | None = None,
        progress: Progress | None = None,
    ) -> Searched:
        """Another plan for the latency that a plan aimed at, and the weights that it is for.

        Args:
            planner: Of the dense model, with a task.
            proposal: Its plan.
            fine_tuning: How to train.
            distill: Losses on the outputs by which the dense model teaches.
            checkpoint: Folder of its own for what an interrupted search goes on from, where it keeps anything (`resumes`).
            progress: Called with (step, done, in all).
        """
        ...

    def left(self, settings: FineTuning, task: Task) -> FineTuning:
        """What of the fine-tuning is left for the cut model."""
        ...
