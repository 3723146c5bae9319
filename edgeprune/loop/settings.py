"""What steers the stages of one pruning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgeprune.budget import Budget
    from edgeprune.loop.realizing import Refit
    from edgeprune.loop.searched import Search
    from edgeprune.recovery.distillation._base import Distillation
    from edgeprune.recovery.fine_tuning import FineTuning


@dataclass(frozen=True)
class Settings:
    """What steers a pruning besides the model, the predictor and the planner.

    Attributes:
        budget: See `edgeprune.prune`, as all of them.
        margin: Share of the budget that the predicted latency stays below it.
        fine_tuning: How the cut model is tuned.
        distillations: By which losses the dense model teaches; none where there are none.
        taps: Modules whose values these compare.
        refit: Whether layers are refitted, or their biases alone.
        blocks: Whether whole residual branches may go.
        search: What chooses widths while it trains, or None.
        calibration_batches: Most training batches for batch-norm re-estimation.
        most_rounds: Most plans that are tried on the board.
        measuring_rounds: Rounds of each comparison on the board.
    """

    budget: Budget
    margin: float
    fine_tuning: FineTuning
    distillations: tuple[Distillation, ...]
    taps: tuple[str, ...]
    refit: Refit
    blocks: bool
    search: Search | None
    calibration_batches: int | None
    most_rounds: int
    measuring_rounds: int
