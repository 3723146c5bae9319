"""From a plan to a model: cut, check against the masked model, recover."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edgeprune.errors import ReconstructionError
from edgeprune.recovery.fine_tuning import FineTuning, fine_tune
from edgeprune.recovery.taps import find_taps
from edgeprune.recovery.teaching import Distillations, made

if TYPE_CHECKING:
    from torch import nn

    from edgeprune.loop.planning import Planner, Progress, Proposal
    from edgeprune.recovery.distillation._base import Distillation
    from edgeprune.recovery.evaluation import RecoveryRecord
    from edgeprune.surgery.plan import PruningPlan

_log = logging.getLogger("edgeprune.loop")

Refit = bool | Literal["biases"]
"""Whether layers are refitted, or their biases alone."""

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
    distill: bool | Distillations = False,
    taps: Sequence[str] = (),
    refit: Refit = False,
    calibration_batches: int | None = CALIBRATION_BATCHES,
    progress: Progress | None = None,
) -> Realized:
    """Cut the planner's model as proposed, check the cut, and recover on the planner's task: `cut`, then `tuned`.

    Args:
        planner: See `cut`.
        proposal: See `cut`.
        example_inputs: See `cut`.
        module: See `cut`.
        teacher: See `tuned`.
        fine_tuning: See `tuned`.
        distill: See `tuned`.
        taps: See `tuned`.
        refit: See `cut`.
        calibration_batches: See `cut`.
        progress: Called with (step, done, in all).

    Raises:
        SurgeryError: The cut model does not equal the masked one.
        TaskError: The task cannot be used.
    """
    begun = cut(
        planner,
        proposal,
        example_inputs,
        module=module,
        refit=refit,
        calibration_batches=calibration_batches,
        progress=progress,
    )
    return tuned(
        planner,
        proposal.plan,
        begun,
        teacher=teacher,
        fine_tuning=fine_tuning,
        distill=distill,
        taps=taps,
        progress=progress,
    )


def cut(
    planner: Planner,
    proposal: Proposal,
    example_inputs: Any,
    *,
    module: nn.Module | None = None,
    refit: Refit = False,
    calibration_batches: int | None = CALIBRATION_BATCHES,
    progress: Progress | None = None,
) -> Realized:
    """Cut the planner's model as proposed, check the cut, and do what needs no gradients for it.

    Args:
        planner: Holds the dense model, which is not changed, and the task.
        proposal: What to cut.
        example_inputs: Tensor, tuple or dict, as the model was traced with.
        module: The planner's model cut as proposed, where the caller has it; it is tuned in place.
        refit: Whether layers are refitted by least squares before they are tuned, or their biases alone (``"biases"``), where
            the model allows it.
        calibration_batches: Most training batches for batch-norm re-estimation; all when None.
        progress: Called with (step, done, in all).

    Raises:
        SurgeryError: The cut model does not equal the masked one.
        TaskError: The task cannot be used.
    """
    from edgeprune.recovery.batch_norm import reestimate_batch_norm
    from edgeprune.recovery.bias_compensation import compensate_biases
    from edgeprune.recovery.reconstruction import reconstruct
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
    difference, notes = checked(model, proposal.plan, example_inputs)
    tell("checking", 1)
    if task is None:
        return Realized(module, difference, (), notes)
    train = task.objectives[0].train
    first = None
    if refit:
        try:
            step = compensate_biases if refit == "biases" else reconstruct
            first = step(module, planner.graph, proposal.plan, example_inputs, train, task=task, progress=progress)
        except ReconstructionError as error:
            notes = (*notes, f"Layers were not refitted: {error.message}")
    if first is None:
        first = reestimate_batch_norm(module, train, batches=calibration_batches, task=task, progress=progress)
    return Realized(module, difference, (first,), notes)


def checked(model: nn.Module, plan: PruningPlan, example_inputs: Any) -> tuple[float, tuple[str, ...]]:
    """`edgeprune.check` in float64, or in float32 for a model that insists on it.

    Returns:
        Largest difference between cut and masked model, and sentences that a person should read.

    Raises:
        SurgeryError: The cut model does not equal the masked one.
    """
    import torch

    from edgeprune.surgery.checking import PrecisionError, check

    try:
        return check(model, plan, example_inputs, tolerance=CHECK_TOLERANCE), ()
    except PrecisionError as error:
        _log.info("the check is repeated in float32: %s", error.message)
        found = check(
            model,
            plan,
            example_inputs,
            tolerance=CHECK_TOLERANCE_FLOAT32,
            dtype=torch.float32,
            relative=True,
        )
    note = (
        "The model does not run in float64, so the cut model was compared with the masked one in float32: they differ "
        f"by {found:.1e} of the largest value."
    )
    return found, (note,)


def tuned(
    planner: Planner,
    plan: PruningPlan,
    begun: Realized,
    *,
    teacher: nn.Module | None = None,
    fine_tuning: FineTuning | None = None,
    distill: bool | Distillations = False,
    taps: Sequence[str] = (),
    checkpoint: Path | None = None,
    progress: Progress | None = None,
) -> Realized:
    """Fine-tune what `cut` came to on the planner's task; without one it stays as it is.

    Args:
        planner: Holds the dense model and the task.
        plan: What was cut.
        begun: The cut model, which is tuned in place.
        teacher: The dense model that teaches where `distill` is set; the planner's when None.
        fine_tuning: How; ``FineTuning(epochs=0)`` leaves it at what was done before.
        distill: By which losses the dense model teaches the cut one (`edgeprune.recovery.distillation.registry`); by its
            logits where True.
        taps: Modules whose values are compared; the ends of stages where there are none.
        checkpoint: File that an interrupted tuning goes on from.
        progress: Called with (step, done, in all).

    Raises:
        ConfigError: A tap or distillation is unknown.
        ModelError: Features are to be compared, and there is no place for it.
        TaskError: The task cannot be used.
    """
    if planner.task is None:
        return begun
    settings = fine_tuning or FineTuning()
    losses: tuple[Distillation, ...] = ()
    # Who is not taught needs no place to be taught at: a search may have left no epochs.
    if distill and settings.epochs > 0 and settings.steps != 0:
        losses = made("logits" if distill is True else distill, settings.temperature)
    by_features = any(one.reads == "features" for one in losses)
    record = fine_tune(
        begun.module,
        planner.task,
        settings,
        teacher=(teacher or planner.model) if losses else None,
        distillation=losses or "logits",
        taps=find_taps(planner.graph, plan, begun.module, taps) if by_features else (),
        checkpoint=checkpoint,
        progress=progress,
    )
    return replace(begun, recovery=(*begun.recovery, record))
