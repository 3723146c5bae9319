"""What is known of a pruned model whatever was removed from it: channels, whole blocks, or tiles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from edgeprune.loop.result import LatencyCheck, MetricVerdict, PruningRound
    from edgeprune.recovery.evaluation import RecoveryRecord
    from edgeprune.surgery.plan import PruningPlan


@dataclass(frozen=True, kw_only=True)
class Pruned:
    """A pruned model, and what every way of pruning knows about it.

    Attributes:
        module: The pruned model.
        plan: What was cut.
        check_max_abs: Largest difference between the cut model's outputs and the masked one's, before recovery.
        metrics_before: Validation metric of the dense model by objective; empty without a task.
        metrics_after: The same of `module`.
        verdicts: Per objective both, its limit and whether it is kept. The validation data have decided nothing, but for the
            epoch that is kept where fine-tuning selects the best.
        recovery: What each recovery step did, with the metrics before and after.
        measured: Dense and pruned engine timed interleaved on the board, with the milliseconds as timed; None where no board
            did: the latency is *unverified*.
        rounds: Plans that were tried, in order.
        chosen: Index of the one that was taken.
        notes: Sentences that a person should read.
    """

    module: nn.Module
    plan: PruningPlan
    check_max_abs: float
    metrics_before: Mapping[str, float] = field(default_factory=dict)
    metrics_after: Mapping[str, float] = field(default_factory=dict)
    verdicts: tuple[MetricVerdict, ...] = ()
    recovery: tuple[RecoveryRecord, ...] = ()
    measured: LatencyCheck | None = None
    rounds: tuple[PruningRound, ...] = ()
    chosen: int = 0
    notes: tuple[str, ...] = ()
