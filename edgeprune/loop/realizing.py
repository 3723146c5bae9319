"""From a plan to a model: cut, check against the masked model, recover."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgeprune.errors import ReconstructionError
from edgeprune.recovery.fine_tuning import FineTuning, fine_tune

if TYPE_CHECKING:
    from torch import nn

    from edgeprune.loop.planning import Planner, Progress, Proposal
    from edgeprune.recovery.evaluation import RecoveryRecord

_log = logging.getLogger("edgeprune.loop")

CHECK_TOLERANCE = 1e-6
"""Largest difference between cut and masked model, both computed in float64."""
CHECK_TOLERANCE_FLOAT32 = 1e-3
"""The same in float32, as a share of the largest value, for a model whose forward casts to float32."""
CALIBRATION_BATCHES = 64
"""Most training batches for batch-norm re-estimation."""


@dataclass(frozen=True)
class Realized:
    """A model that was cut and recovered.

    Attributes:
        module: The model; it shares nothing with the dense one.
        check_max_abs: Largest difference between the cut model's outputs and the masked one's, before recovery.
        recovery: What each recovery step did; empty without a task.
        notes: Sentences that a person should read.
    """

    module: nn.Module
    check_max_abs: float
    recovery: tuple[RecoveryRecord, ...]
    notes: tuple[str, ...] = ()


def realize(
    planner: Planner,
    proposal: Proposal,
    example_inputs: Any,
    *,
    module: nn.Module | None = None,
    teacher: nn.Module | None = None,
    fine_tuning: FineTuning | None = None,
    distill: bool = False,
    refit: bool = False,
    calibration_batches: int | None = CALIBRATION_BATCHES,
    progress: Progress | None = None,
) -> Realized:
    """Cut the planner's model as proposed, check the cut, and recover on the planner's task.

    Args:
        planner: Holds the dense model, which is not changed, and the task.
        proposal: What to cut.
        example_inputs: Tensor, tuple or dict, as the model was traced with.
        module: The planner's model cut as proposed, where the caller has it; it is tuned in place.
        teacher: The model that teaches where `distill` is set; the planner's when None.
        fine_tuning: How the cut model is tuned; ``FineTuning(epochs=0)`` only re-estimates batch norm.
        distill: Whether the cut model is taught, by logits.
        refit: Whether layers are refitted by least squares before they are tuned, where the model allows it.
        calibration_batches: Most training batches for batch-norm re-estimation; all when None.
        progress: Called with (step, done, in all).

    Raises:
        SurgeryError: The cut model does not equal the masked one.
        TaskError: The task cannot be used.
    """
    import torch

    from edgeprune.recovery.batch_norm import reestimate_batch_norm
    from edgeprune.recovery.reconstruction import reconstruct
    from edgeprune.surgery.checking import PrecisionError, check
    from edgeprune.surgery.cutting import apply

    def tell(step: str, done: int) -> None:
        if progress is not None:
            progress(step, done, 1)

    model, task = planner.model, planner.task
    if module is None:
        tell("cutting", 0)
        module = apply(model, proposal.plan)
        tell("cutting", 1)
    tell("checking", 0)
    notes: tuple[str, ...] = ()
    try:
        difference = check(model, proposal.plan, example_inputs, tolerance=CHECK_TOLERANCE)
    except PrecisionError as error:
        _log.info("the check is repeated in float32: %s", error.message)
        difference = check(
            model,
            proposal.plan,
            example_inputs,
            tolerance=CHECK_TOLERANCE_FLOAT32,
            dtype=torch.float32,
            relative=True,
        )
        notes = (
            "The model does not run in float64, so the cut model was compared with the masked one in float32: they differ "
            f"by {difference:.1e} of the largest value.",
        )
    tell("checking", 1)
    if task is None:
        return Realized(module, difference, (), notes)
    train = task.objectives[0].train
    first = None
    if refit:
        try:
            first = reconstruct(
                module, planner.graph, proposal.plan, example_inputs, train, task=task, progress=progress
            )
        except ReconstructionError as error:
            notes = (*notes, f"Layers were not refitted: {error.message}")
    if first is None:
        first = reestimate_batch_norm(module, train, batches=calibration_batches, task=task, progress=progress)
    tuning = fine_tune(module, task, fine_tuning, teacher=(teacher or model) if distill else None, progress=progress)
    return Realized(module, difference, (first, tuning), notes)
