"""Soft masking: widths and units are chosen again and again while the model trains, and what was masked may come back.

Source: R. Humble et al., "Soft Masking for Cost-Constrained Channel Pruning" (SMCP), ECCV 2022. As there: straight-through masks,
importance from the gradients that training has anyhow, a new allocation every few steps, an exponential schedule of the budget,
removal in the end. Other than there: the allocator is any of ours (by default the exact one) over predicted milliseconds,
coupled layers share their mask, and importance is the change of the loss to *second* order (`masked_training.loss_changes`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgeprune.errors import ConfigError
from edgeprune.loop.masked_training import LEAST_STEPS, MaskedTraining, masked_model
from edgeprune.loop.searched import Searched
from edgeprune.recovery.fine_tuning import FineTuning, steps_in_all

if TYPE_CHECKING:
    from edgeprune.loop.planning import Planner, Progress, Proposal
    from edgeprune.recovery.distillation._base import Distillation
    from edgeprune.tasks.task import Task

_EPOCHS = "masked.safetensors"


@dataclass(frozen=True)
class SoftMasking:
    """How a model trains under masks before it is cut.

    Attributes:
        epochs: How many of the epochs of fine-tuning are trained under masks, at its learning rate without a decay; the cut
            model is tuned in the rest.
        every: Optimizer steps between two allocations, at least 2.
        ramp: Share of the masked steps after which the budget has come down from the dense latency to the target; at the
            target units are still traded until the end.
        steepness: Of the exponential schedule: the larger, the earlier most of the latency goes; 0 is a straight line.
    """

    epochs: int = 1
    every: int = 50
    ramp: float = 0.75
    steepness: float = 2.75

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.every < LEAST_STEPS:
            raise ConfigError(
                f"soft masking needs at least 1 epoch and {LEAST_STEPS} steps between allocations, found {self.epochs} and "
                f"{self.every}."
            )
        if not 0 < self.ramp <= 1:
            raise ConfigError(f"the ramp must be a share in (0, 1], found {self.ramp}.")
        if not (math.isfinite(self.steepness) and self.steepness >= 0):
            raise ConfigError(f"the steepness must be at least 0, found {self.steepness}.")

    def reduction(self, step: int, total: int) -> float:
        """Share of the way from the dense cost to the target that is asked for at a step.

        ``(1 - exp(-steepness * t)) / (1 - exp(-steepness))`` with ``t = step / (ramp * total)``, at most 1. Source: the schedule
        of the authors' code, whose 0.05 per epoch over a ramp of 55 epochs is a steepness of 2.75.

        Args:
            step: Steps done.
            total: Steps under masks in all.
        """
        share = min(1.0, step / (self.ramp * total))
        if self.steepness == 0:
            return share
        return math.expm1(-self.steepness * share) / math.expm1(-self.steepness)

    def split(self, settings: FineTuning, task: Task) -> tuple[FineTuning, FineTuning]:
        """The settings of training under masks, and those that are left for the cut model; together as many steps.

        Raises:
            ConfigError: There are not so many epochs, or gradients are scaled.
        """
        if self.epochs > settings.epochs:
            raise ConfigError(
                f"soft masking takes {self.epochs} of the epochs of fine-tuning, found {settings.epochs}.",
                hint=f"--epochs {self.epochs + 1}; FineTuning(epochs=...) in Python",
            )
        if settings.precision == "float16":
            raise ConfigError(
                "soft masking reads gradients as they are, so training must not scale them, found float16.",
                hint="--amp bfloat16",
            )
        masked = replace(settings, epochs=self.epochs, schedule="constant", select_best=False, ema=None)
        if settings.steps is None:
            return masked, replace(settings, epochs=settings.epochs - self.epochs)
        done = steps_in_all(task.objectives[0], masked)
        return masked, replace(settings, epochs=settings.epochs - self.epochs, steps=max(0, settings.steps - done))

    @property
    def trains(self) -> bool:
        """Whether weights change on the way."""
        return True

    @property
    def resumes(self) -> bool:
        """Whether it goes on from where it was interrupted: after the last finished epoch under masks."""
        return True

    def left(self, settings: FineTuning, task: Task) -> FineTuning:
        """What of the fine-tuning is left for the cut model.

        Raises:
            ConfigError: As `split`.
        """
        return self.split(settings, task)[1]

    def require(self, planner: Planner, budget_ms: float) -> None:
        """Refuse what cannot be masked.

        Args:
            planner: Of the dense model.
            budget_ms: Without effect here.

        Raises:
            ConfigError: There is no task.
            TaskError: Weights under masks do not require gradients.
        """
        if planner.task is None:
            raise ConfigError("soft masking trains, so it needs a task, found none.", hint="--task FILE.py:FACTORY")
        # Which branches go is not known yet; what lies in one that may go need not learn.
        masked_model(
            planner, planner.model, [one for one in planner.graph.branches if planner.rules[one.lead].removable]
        )

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
        """Train a copy of the planner's model under masks until it keeps the latency that a plan aimed at.

        Whole residual branches that the plan removes are masked from the start and do not come back: what they are worth was
        measured, and no gradient of a single unit tells it.

        Args:
            planner: Of the dense model, with a task.
            proposal: Its plan, which fixes the target and the branches that go.
            fine_tuning: Of which `epochs` are trained here.
            distill: Losses on the outputs by which the dense model teaches.
            checkpoint: Folder for what an interrupted search goes on from.
            progress: Called with (step, done, in all).

        Raises:
            ConfigError: There is no task, or fewer epochs than are to be trained under masks.
            TaskError: The task cannot be used, or weights under masks do not require gradients.
        """
        if planner.task is None:
            raise ConfigError("soft masking trains, so it needs a task, found none.", hint="--task FILE.py:FACTORY")
        masked, _ = self.split(fine_tuning or FineTuning(), planner.task)
        path = None if checkpoint is None else checkpoint / _EPOCHS
        training = MaskedTraining(planner, proposal, every=self.every, reduction=self.reduction)
        return training.train(masked, distill=distill, checkpoint=path, progress=progress)
