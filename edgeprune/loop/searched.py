"""What a search that looks at data, or trains, while it chooses widths hands to the rest of `edgeprune.prune`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from edgeprune.loop.planning import Planner, Progress, Proposal
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
    """Soft masking, NetAdapt, or PAGCP."""

    @property
    def trains(self) -> bool:
        """Whether weights change on the way."""
        ...

    def search(
        self,
        planner: Planner,
        proposal: Proposal,
        *,
        fine_tuning: FineTuning | None = None,
        distill: bool = False,
        progress: Progress | None = None,
    ) -> Searched:
        """Another plan for the latency that a plan aimed at, and the weights that it is for."""
        ...

    def left(self, settings: FineTuning, task: Task) -> FineTuning:
        """What of the fine-tuning is left for the cut model."""
        ...
