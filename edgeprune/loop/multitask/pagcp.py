"""PAGCP: layer by layer the narrowest width that every objective's limit allows, until a latency is met.

Source: H. Ye et al., "Performance-aware Approximation of Global Channel Pruning for Multitask CNNs" (PAGCP), IEEE TPAMI 45(8),
2023. As there: layers in the order of what they contribute to the cost, each cut in the network as it is cut so far, as far as
the worst objective's loss allows; a sequence of tolerances whose product is the global one; a filter that keeps the layers
whose cuts save most per loss; rounds with tuning in between. Other than there: the cost is the predicted latency of the network,
there is one global tolerance per objective, which follows from its limit, what a layer does not use of its tolerance the next
ones have, metrics are checked at every commit, and the filter gives back what the latency does not need. `Pagcp(compat=True)` has
FLOPs, one tolerance, lost where it is not used, and a fixed share of the layers instead.

Where the published code does otherwise, with `compat` too: a layer that no width violates is committed at its narrowest; a layer
whose mildest cut violates stays whole and hands its tolerance on (as there, but on purpose); losses near 0 do not make ratios
explode; and what is looked at are training batches, so that the validation data can judge. Norms are those of a round's start.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgeprune.errors import ConfigError
from edgeprune.loop.multitask.layers import energy_limit
from edgeprune.loop.serving import served
from edgeprune.recovery.fine_tuning import FineTuning

if TYPE_CHECKING:
    from edgeprune.loop.planning import Planner, Progress, Proposal
    from edgeprune.loop.searched import Searched
    from edgeprune.recovery.distillation._base import Distillation
    from edgeprune.tasks.task import Task

PUBLISHED_RATE = 0.06
"""What the first layer may add to a loss with `compat`."""


@dataclass(frozen=True)
class Pagcp:
    """How the search goes. A round looks at about (layers * 5) cut models on `batches` batches.

    Attributes:
        rounds: Most rounds; between two the cut model is tuned, which makes room under the limits. It ends when the latency is
            met.
        batches: Training batches of each objective on which losses are compared; they are read once and stay in memory.
        metric_batches: Further training batches, on which the metrics of every commit are checked.
        tuning_steps: Optimizer steps between two rounds.
        initial_rate: What the first layer may add to a loss at most, as a share of it; less where the limit leaves little room.
            None: twice what each layer might add if all might add the same; 6 % with `compat`.
        epsilon: Added to losses before they are divided, as a share of what the limit lets them grow by, so that a dense loss
            near 0 does not make every ratio large.
        bisect: Whether the narrowest width that is allowed is looked for where one batch says that it is, as if losses grew from
            width to width; otherwise widths are tried one after another until one is not allowed.
        early_stop: How likely a width may be given up wrongly before all samples were looked at, per decision (for all
            objectives together); 0: all are always looked at. Widths that are committed are looked at whole. With batch norms it
            takes about eight `batches` to stop before what is certain (`edgeprune.loop.multitask.stops`).
        cached: Whether only what differs from the model that was cut so far is computed.
        compat: The published method: FLOPs as cost and for the filter, widths in steps of 5 %, L1 norms, running batch-norm
            statistics, one global tolerance of all losses, no limits needed.
        tolerance: With `compat`: what all layers together may multiply a loss by.
        top: With `compat`: share of the layers whose cuts the filter keeps.
    """

    rounds: int = 1
    batches: int = 4
    metric_batches: int = 4
    tuning_steps: int = 50
    initial_rate: float | None = None
    epsilon: float = 0.1
    bisect: bool = True
    early_stop: float = 0.01
    cached: bool = True
    compat: bool = False
    tolerance: float = 6.0
    top: float = 0.8

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.batches < 1 or self.metric_batches < 1 or self.tuning_steps < 0:
            raise ConfigError(
                "rounds, batches and metric_batches must be at least 1 and tuning_steps at least 0, found "
                f"{self.rounds}, {self.batches}, {self.metric_batches} and {self.tuning_steps}."
            )
        if not 0 <= self.early_stop < 1:
            raise ConfigError(f"early_stop must be a probability in [0, 1), found {self.early_stop:g}.")
        rate = PUBLISHED_RATE if self.initial_rate is None else self.initial_rate
        if not (rate > 0 and self.epsilon >= 0 and self.tolerance > 1 and 0 < self.top <= 1):
            raise ConfigError(
                "initial_rate must be above 0, epsilon at least 0, tolerance above 1 and top a share in (0, 1], found "
                f"{rate:g}, {self.epsilon:g}, {self.tolerance:g} and {self.top:g}."
            )

    @property
    def trains(self) -> bool:
        """Whether weights change on the way."""
        return self.rounds > 1 and self.tuning_steps > 0

    @property
    def resumes(self) -> bool:
        """Whether it goes on from where it was interrupted."""
        return True

    def require(self, planner: Planner, budget_ms: float) -> None:
        """Refuse what cannot be searched.

        Args:
            planner: Of the dense model.
            budget_ms: Predicted latency that is aimed at, at most, milliseconds.

        Raises:
            ConfigError: There is no task, an objective has no limit, there are budgets besides latency and energy, whole
                branches may go, or the model was traced in parts.
            TaskError: An objective depends on nothing that can be pruned, or the task cannot be used.
        """
        task = planner.task
        if task is None:
            raise ConfigError("pagcp looks at losses, so it needs a task, found none.", hint="--task FILE.py:FACTORY")
        free = [one.name for one in task.objectives if one.limit is None]
        if free and not self.compat:
            raise ConfigError(
                f"pagcp needs a limit for each objective, found none for {', '.join(free)}.",
                hint=f"--limit {free[0]}=2%",
            )
        others = [limit.name for limit in planner.limits if limit is not energy_limit(planner)]
        if others or (planner.limits and self.compat):
            raise ConfigError(
                f"pagcp keeps a latency{'' if self.compat else ' and an energy'} only, found a budget of "
                f"{(others or ['energy'])[0]} too."
            )
        if planner.graph.parts:
            raise ConfigError("pagcp needs a model that was traced as a whole, found one traced in parts.")
        if any(choice.removable for choice in planner.cost.choices):
            raise ConfigError(
                "pagcp narrows layers, found that whole residual branches may go too.", hint="without --blocks"
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
        """Narrow the layers of the planner's model under the limits of its task until it keeps a latency.

        Args:
            planner: Of the dense model, with a task.
            proposal: A plan that keeps the latency without regard to limits.
            fine_tuning: How the model is tuned between rounds, but for the length; all of it is left for the cut model.
            distill: Losses on the outputs by which the dense model teaches between rounds.
            checkpoint: Folder of its own for what an interrupted search goes on from: the same call on the same data then comes
                to the same plan and weights, and measures only what is missing.
            progress: Called with (step, layers done, in all).

        Raises:
            ConfigError: As `require`.
            TaskError: The task cannot be used, or an objective depends on nothing that can be pruned.
            BudgetInfeasibleError: The latency is out of reach under the limits; says which latency is not, which objective holds
                it up, and the limit that would do.
            SurgeryError: A cut program cannot be written down.
        """
        from edgeprune.loop.multitask.searching import LimitedSearch

        self.require(planner, proposal.aim_ms)
        settings = fine_tuning or FineTuning()
        tuning = replace(
            settings, epochs=max(1, self.tuning_steps), steps=self.tuning_steps, select_best=False, ema=None
        )
        search = LimitedSearch(self, planner, tuning, distill=distill, checkpoint=checkpoint, progress=progress)
        return search.run(proposal)
