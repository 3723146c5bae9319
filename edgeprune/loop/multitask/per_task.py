"""The exact allocation with a damage curve per objective: what the worst loses, in units of its limit, is least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from edgeprune.allocation.exact import Exact
from edgeprune.allocation.per_objective import MEAN_SHARE
from edgeprune.criteria.calibration import DamageCalibration
from edgeprune.errors import ConfigError
from edgeprune.loop.serving import served

if TYPE_CHECKING:
    from edgeprune.loop.planning import Planner, Progress, Proposal
    from edgeprune.loop.searched import Searched
    from edgeprune.recovery.distillation._base import Distillation
    from edgeprune.recovery.fine_tuning import FineTuning
    from edgeprune.tasks.task import Task


@dataclass(frozen=True)
class PerTask:
    """How widths are chosen under one limit per objective, by damage that is told per objective.

    Nothing is trained. It costs the calibration's (3 * groups) forward passes over a few batches, shared by objectives that share
    a loader, about ten looks at evenly cut models, and one look per plan.

    Attributes:
        hold: Whether limits must hold before the model is tuned. Otherwise the plan is the one whose worst objective is least
            beyond its limit; tuning gives back what nobody knows beforehand, and the limits are judged in the end.
        calibration: How each objective's damage is put on the scale of its own loss; None leaves it as the criterion gives it.
        batches: Training batches of each objective on which damage is related to metrics; they stay in memory.
        metric_batches: Further training batches, on which plans are checked.
        mean_share: What the mean of all objectives counts beside the worst (`edgeprune.allocation.per_objective`); 1: the
            weighted sum alone, with `hold` under the limits.
        corrections: How often a plan's metrics correct what its damage was taken to mean, at most.
    """

    hold: bool = False
    calibration: DamageCalibration | None = field(default_factory=lambda: DamageCalibration(batch_statistics=True))
    batches: int = 4
    metric_batches: int = 4
    mean_share: float = MEAN_SHARE
    corrections: int = 4

    def __post_init__(self) -> None:
        if self.batches < 1 or self.metric_batches < 1 or self.corrections < 0 or not 0 <= self.mean_share <= 1:
            raise ConfigError(
                "batches and metric_batches must be at least 1, corrections at least 0 and mean_share a share in [0, 1], found "
                f"{self.batches}, {self.metric_batches}, {self.corrections} and {self.mean_share:g}."
            )

    @property
    def trains(self) -> bool:
        """Whether weights change on the way: no."""
        return False

    @property
    def resumes(self) -> bool:
        """Whether it goes on from where it was interrupted."""
        return True

    def require(self, planner: Planner, budget_ms: float) -> None:
        """Refuse what cannot be done.

        Args:
            planner: Of the dense model.
            budget_ms: Predicted latency that is aimed at, at most, milliseconds.

        Raises:
            ConfigError: There is no task, no objective has a limit, the allocator is not the exact one, the damage of objectives
                cannot be told apart, whole branches may go, or the model was traced in parts.
            TaskError: An objective depends on nothing that can be pruned, or the task cannot be used.
        """
        task = planner.task
        if task is None:
            raise ConfigError("damage per objective needs a task, found none.", hint="--task FILE.py:FACTORY")
        if all(one.limit is None for one in task.objectives):
            raise ConfigError(
                "damage per objective needs a limit for one of them at least, found none.",
                hint=f"--limit {task.objectives[0].name}=2%",
            )
        if not isinstance(planner.allocator, Exact):
            raise ConfigError(
                f"damage per objective needs the exact allocator, found {planner.allocator.name}.",
                hint="--allocator exact",
            )
        if not (planner.criterion.needs_task or self.calibration or planner.calibrate_damage):
            raise ConfigError(
                f"damage per objective needs a criterion that reads losses, or measured ones, found {planner.criterion.name} "
                "without calibration.",
                hint="--criterion taylor, or --calibrate-damage",
            )
        if planner.graph.parts:
            raise ConfigError(
                "damage per objective needs a model that was traced as a whole, found one traced in parts."
            )
        if any(choice.removable for choice in planner.cost.choices):
            raise ConfigError(
                "damage per objective is that of narrower layers, found that whole residual branches may go too.",
                hint="without --blocks",
            )
        served(task, planner.model, planner.graph, [one for one in planner.cost.choices if not one.frozen])

    def left(self, settings: FineTuning, task: Task) -> FineTuning:
        """What of the fine-tuning is left for the cut model: all of it."""
        return settings

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
        """Another plan for the latency that a plan aimed at.

        Args:
            planner: Of the dense model, with a task.
            proposal: Its plan by the damage of all objectives together.
            fine_tuning: Its seed orders the batches; nothing is tuned.
            distill: Not read.
            checkpoint: Folder of its own for what an interrupted search goes on from: what was measured is not measured again.
            progress: Called with (step, done, in all).

        Raises:
            ConfigError: As `require`.
            TaskError: The task cannot be used, or an objective depends on nothing that can be pruned.
            BudgetInfeasibleError: With `hold`: limits and latency cannot hold together; says the smallest latency that was found
                under the limits, which objective holds it up, and the limits that would do.
            SurgeryError: A cut program cannot be written down.
        """
        from edgeprune.loop.multitask.weighing import Weighing

        self.require(planner, proposal.aim_ms)
        seed = 0 if fine_tuning is None else fine_tuning.seed
        return Weighing(self, planner, seed=seed, checkpoint=checkpoint, progress=progress).run(proposal)
