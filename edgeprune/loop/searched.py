"""What a search that trains the model while it chooses widths hands to the rest of `edgeprune.prune`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgeprune.loop.planning import Planner, Proposal
    from edgeprune.recovery.evaluation import RecoveryRecord
    from edgeprune.recovery.fine_tuning import FineTuning


@dataclass(frozen=True)
class Searched:
    """A plan, and the weights that it is for.

    Attributes:
        planner: Makes further plans from where the search ended; its model has the shapes of the dense one and the weights
            of the search.
        proposal: The plan.
        fine_tuning: What of the fine-tuning is left for the cut model.
        record: What the search did, with the metrics before and after.
        notes: Sentences that a person should read.
    """

    planner: Planner
    proposal: Proposal
    fine_tuning: FineTuning
    record: RecoveryRecord
    notes: tuple[str, ...]
