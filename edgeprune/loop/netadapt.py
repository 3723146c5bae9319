"""NetAdapt: step by step, the one cut that costs least accuracy after a short tuning, until the latency is met.

Source: T.-J. Yang et al., "NetAdapt: Platform-Aware Neural Network Adaptation for Mobile Applications", ECCV 2018, algorithm 1.
As there: every step asks for less latency by a share that decays, every layer alone is narrowed until it saves that much, the
filters with the largest L2 norm stay, each of these networks is tuned for a short time, and the one with the best accuracy is
kept; a long tuning comes last. Other than there: latency is our predictor's for the network as a whole, widths are the edges of
its stairs, coupled layers are narrowed together, and a whole residual branch is one more cut where blocks may go.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from edgeprune.allocation._base import Allocation, infeasible, unproven
from edgeprune.criteria.damage import best_units
from edgeprune.criteria.slices import makers, parameter_members, unit_sums
from edgeprune.errors import ConfigError
from edgeprune.graph.branches import emptied
from edgeprune.loop.multitask.journal import identity_of_search
from edgeprune.loop.netadapt_kept import Kept, put_into
from edgeprune.loop.searched import Searched
from edgeprune.recovery.evaluation import RecoveryRecord, evaluate
from edgeprune.recovery.fine_tuning import FineTuning, fine_tune
from edgeprune.recovery.generators import Generators
from edgeprune.surgery.constraints import without
from edgeprune.surgery.cutting import cut_program
from edgeprune.surgery.plan import make_plan
from edgeprune.surgery.writing_back import write_back
from edgeprune.tasks.batches import device_of, labeled_batches
from edgeprune.tasks.task import Objective, Task

if TYPE_CHECKING:
    from torch import nn

    from edgeprune.allocation.choices import Choice
    from edgeprune.loop.planning import Planner, Progress, Proposal
    from edgeprune.recovery.distillation._base import Distillation
    from edgeprune.surgery.plan import PruningPlan
    from edgeprune.surgery.program_module import ProgramModule

_HALVINGS = 20
"""How often a step that no cut reaches is halved."""

_log = logging.getLogger("edgeprune.loop")


@dataclass(frozen=True)
class NetAdapt:
    """How the search goes. It makes about (steps * groups) short tunings: minutes to hours.

    Attributes:
        reduction: Latency that the first step has to save, as a share of the dense one.
        decay: What a step has to save, over what the one before had to.
        tuning_steps: Optimizer steps of each short tuning; 0 tunes nothing on the way.
        batches: Training batches of each objective on which cuts are compared; they are read once and stay in memory.
            The validation data decide nothing.
        most_tunings: The search is refused if it would take more.
    """

    reduction: float = 0.05
    decay: float = 0.96
    tuning_steps: int = 20
    batches: int = 8
    most_tunings: int = 2_000

    def __post_init__(self) -> None:
        if not (0 < self.reduction < 1 and 0 < self.decay <= 1):
            raise ConfigError(
                f"reduction must lie in (0, 1) and decay in (0, 1], found {self.reduction} and {self.decay}."
            )
        if self.tuning_steps < 0 or self.batches < 1 or self.most_tunings < 1:
            raise ConfigError(
                "tuning_steps must be at least 0, batches and most_tunings at least 1, "
                f"found {self.tuning_steps}, {self.batches} and {self.most_tunings}."
            )

    def steps(self, share: float) -> int:
        """Steps that save a share of the dense latency, where each saves what it has to.

        Raises:
            ConfigError: However many there are, the steps decay to less than that.
        """
        if self.decay == 1:
            return math.ceil(share / self.reduction - 1e-9)
        left = 1 - share * (1 - self.decay) / self.reduction
        if left <= 0:
            raise ConfigError(
                f"steps that begin with {self.reduction:g} and decay by {self.decay:g} save at most "
                f"{self.reduction / (1 - self.decay):.0%} of the latency, found that {share:.0%} has to be saved.",
                hint=f"without --netadapt, or a larger budget; NetAdapt(reduction={self.reduction * 2:g}) in Python",
            )
        return math.ceil(math.log(left) / math.log(self.decay) - 1e-9)

    @property
    def trains(self) -> bool:
        """Whether weights change on the way."""
        return True

    @property
    def resumes(self) -> bool:
        """Whether it goes on from where it was interrupted: after the last cut that was tuned."""
        return True

    def left(self, settings: FineTuning, task: Task) -> FineTuning:
        """What of the fine-tuning is left for the cut model: all of it."""
        return settings

    def tunings(self, planner: Planner, budget_ms: float) -> int:
        """About how many short tunings it takes to a predicted latency, milliseconds.

        Raises:
            ConfigError: They are too many.
        """
        steps = self.steps(max(0.0, 1 - budget_ms / planner.dense_ms))
        groups = sum(not choice.frozen for choice in planner.cost.choices)
        if steps * groups > self.most_tunings:
            raise ConfigError(
                f"netadapt may take {self.most_tunings} short tunings, found that {steps} steps with "
                f"{groups} groups take about {steps * groups}.",
                hint="--keep some layers, or a larger budget; "
                f"NetAdapt(reduction={2 * self.reduction:g}) or a larger most_tunings in Python",
            )
        return steps * groups

    def require(self, planner: Planner, budget_ms: float) -> None:
        """Refuse what cannot be searched.

        Args:
            planner: Of the dense model.
            budget_ms: Predicted latency that is aimed at, at most, milliseconds.

        Raises:
            ConfigError: There is no task, there are budgets besides the latency, the model was traced in parts, or it would
                take too many tunings.
        """
        if planner.task is None:
            raise ConfigError("netadapt tunes, so it needs a task, found none.", hint="--task FILE.py:FACTORY")
        if planner.limits:
            raise ConfigError(f"netadapt keeps a latency only, found a budget of {planner.limits[0].name} too.")
        if planner.graph.parts:
            raise ConfigError("netadapt needs a model that was traced as a whole, found one traced in parts.")
        self.tunings(planner, budget_ms)

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
        """Narrow a copy of the planner's model until it keeps the latency that a plan aimed at.

        Args:
            planner: Of the dense model, with a task.
            proposal: Its plan, of which only the latency is taken.
            fine_tuning: How short tunings are done, but for their length; all of it is left for the cut model.
            distill: Losses on the outputs by which the dense model teaches.
            checkpoint: Folder for what an interrupted search goes on from.
            progress: Called with (step, short tunings done, about how many there will be).

        Raises:
            ConfigError: As `require`.
            BudgetInfeasibleError: No single cut saves anything any more, and the latency is not met.
            TaskError: The task cannot be used.
            SurgeryError: A cut program cannot be written down.
        """
        self.require(planner, proposal.aim_ms)
        settings = fine_tuning or FineTuning()
        found = _Search(self, planner, replace(settings, select_best=False), distill, checkpoint, progress)
        return found.run(proposal.aim_ms)


class _Search:
    """Where the search is: widths, which units they are, and dense-shaped weights that hold what was tuned."""

    def __init__(
        self,
        settings: NetAdapt,
        planner: Planner,
        tuning: FineTuning,
        distill: Sequence[Distillation],
        folder: Path | None,
        progress: Progress | None,
    ) -> None:
        assert planner.task is not None
        self.settings, self.planner, self.progress = settings, planner, progress
        self.tuning = replace(tuning, epochs=max(1, settings.tuning_steps), steps=settings.tuning_steps)
        self.teacher, self.distill = planner.model if distill else None, distill
        self.graph, self.cost = planner.graph, planner.cost
        self.model = copy.deepcopy(planner.model)
        self.left = copy.deepcopy(planner.model)
        """The same, with 0 for what was cut."""
        self.widths: dict[str, int] = self.graph.widths()
        self.kept: dict[str, tuple[int, ...]] = {name: tuple(range(size)) for name, size in self.widths.items()}
        self.choices = [choice for choice in self.cost.choices if not choice.frozen]
        device = device_of(self.model)
        # Cuts are compared on the same batches, and not on those that the result is reported on.
        self.task = Task(
            tuple(
                replace(one, validation=list(labeled_batches(one, "train", device, settings.batches)))
                for one in planner.task.objectives
            )
        )
        self.tunings = 0
        self.history: list[dict[str, Any]] = []
        identity = {} if folder is None else identity_of_search(settings, planner, self.tuning, distill)
        self.memory = Kept(folder, identity, Generators.of(planner.task, device))

    def run(self, budget_ms: float) -> Searched:
        assert self.planner.task is not None
        planned = self.settings.tunings(self.planner, budget_ms)
        before = evaluate(self.model, self.planner.task)
        least_ms = self.settings.reduction * self.planner.dense_ms
        if (kept := self.memory.step(self.model)) is not None:
            before, least_ms = kept["before"], kept["least_ms"]
            self._go_on(kept)
        while (now_ms := self.cost.ms(self.widths)) > budget_ms:
            self._step(now_ms, least_ms, budget_ms, planned)
            least_ms *= self.settings.decay
            self._keep(before, least_ms)
        scores = self._scores(self.model)
        for name, values in scores.items():
            gone = np.ones(len(values), dtype=bool)
            gone[list(self.kept[name])] = False
            if gone.any():
                # Further plans keep first what is kept here: what was cut was not tuned with the rest.
                ceiling = values[~gone].min() if not gone.all() else 1.0
                values[gone] *= 0.5 * ceiling / max(values[gone].max(), 1e-300)
        removed = {name for branch in self.graph.branches if self.widths[branch.lead] == 0 for name in branch.groups}
        planner = self.planner.rescored(self.model, scores, criterion="l2", rules=without(self.planner.rules, removed))
        damage = sum(float(planner.damage[name][self.widths[name]]) for name in scores if name not in removed)
        allocation: Allocation = unproven(
            "netadapt",
            dict(self.widths),
            budget_ms=budget_ms,
            predicted_ms=self.cost.ms(self.widths),
            damage=damage,
            evaluations=self.tunings,
            note=f"{len(self.history)} steps were taken greedily, by {self.tunings} short tunings; nothing is proven.",
        )
        proposal = planner.proposal(allocation, budget_ms, self._plan(self.widths, self.kept))
        after = evaluate(cut_program(self.model, proposal.plan), self.planner.task)
        record = RecoveryRecord("netadapt", before, after, {"tunings": self.tunings, "steps": self.history})
        note = f"NetAdapt: {len(self.history)} cuts were kept out of {self.tunings} that were tried with a short tuning each."
        return Searched(planner, proposal, record, (note,))

    def _keep(self, before: Mapping[str, float], least_ms: float) -> None:
        values = {
            "steps": len(self.history),
            "before": dict(before),
            "least_ms": least_ms,
            "widths": self.widths,
            "kept": {name: list(units) for name, units in self.kept.items()},
            "tunings": self.tunings,
            "history": self.history,
        }
        self.memory.keep_step(self.model, values)

    def _go_on(self, values: Mapping[str, Any]) -> None:
        """Be where the search was after its last finished step; the model has its weights already."""
        self.widths = {name: int(width) for name, width in values["widths"].items()}
        self.kept = {name: tuple(units) for name, units in values["kept"].items()}
        self.tunings, self.history = values["tunings"], list(values["history"])
        plan = self._plan(self.widths, self.kept)
        self._put_into_left(cut_program(self.model, plan), plan)

    def _put_into_left(self, module: ProgramModule, plan: PruningPlan) -> None:
        with torch.no_grad():
            for parameter in self.left.parameters():
                parameter.zero_()
        write_back(self.left, module, plan)

    def _step(self, now_ms: float, least_ms: float, budget_ms: float, planned: int) -> None:
        """Keep the best of all cuts that save enough, each alone and tuned for a short time."""
        cuts: list[tuple[Choice, dict[str, int]]] = []
        for _ in range(_HALVINGS):
            # The last step needs no more than the budget.
            cuts = self._cuts(max(now_ms - least_ms, budget_ms))
            if cuts:
                break
            least_ms /= 2
        if not cuts:
            raise infeasible(self.cost, self.widths, now_ms, budget_ms)
        lead = self.task.objectives[0]
        scores = self._scores(self.left)
        best: tuple[float, float] | None = None
        taken: tuple[dict[str, int], dict[str, tuple[int, ...]], PruningPlan, ProgramModule] | None = None
        step = len(self.history)
        tried = self.memory.cuts(step)
        known = len(tried.ranks)
        first_best = tried.ranks.index(max(tried.ranks)) if known else None
        self.tunings += known
        for place, (choice, widths) in enumerate(cuts):
            if place < known and place != first_best:
                continue  # it was tuned before an interruption, and another one was better
            kept = dict(self.kept) | {
                name: self._best(scores[name], name, width) if width else ()
                for name, width in widths.items()
                if width < self.widths[name]
            }
            plan = self._plan(widths, kept)
            module = cut_program(self.model, plan)
            if place < known:
                rank = tried.ranks[place]
                put_into(module, tried.tensors)
            else:
                rank = self._tuned(module, lead, widths, step)
                tried.ranks.append(rank)
                self.tunings += 1
            if best is None or rank > best:
                best, taken = rank, (widths, kept, plan, module)
                chosen = choice.groups[0]
            if place >= known:
                assert taken is not None
                self.memory.keep_cuts(step, tried.ranks, taken[3])
                if self.progress is not None:
                    self.progress("trying cuts", self.tunings, max(self.tunings, planned))
        assert best is not None
        assert taken is not None
        self.widths, self.kept, plan, module = taken
        write_back(self.model, module, plan)
        self._put_into_left(module, plan)
        metric = best[0] if lead.higher_is_better else -best[0]
        self.history.append(
            {"group": chosen, "width": self.widths[chosen], "predicted_ms": -best[1], lead.name: metric}
        )
        _log.info("%s goes to %d: %.4g ms, %s %.4f", chosen, self.widths[chosen], -best[1], lead.name, metric)

    def _tuned(
        self, module: ProgramModule, lead: Objective, widths: Mapping[str, int], step: int
    ) -> tuple[float, float]:
        """Tune a cut for a short time: its metric, higher is better, and minus its latency."""
        # Another part of the data at every step, the same for all cuts of one.
        tuned = fine_tune(
            module,
            self.task,
            self.tuning,
            teacher=self.teacher,
            distillation=self.distill,
            seed=self.tuning.seed + step,
        )
        figure = tuned.after[lead.name] if lead.higher_is_better else -tuned.after[lead.name]
        # Of equally good ones the fastest; the last digits of a mean over batches are rounding.
        return float(f"{figure:.6g}"), -self.cost.ms(widths)

    def _cuts(self, at_most_ms: float) -> list[tuple[Choice, dict[str, int]]]:
        """Per decision the widest candidate with which the network takes at most so long."""
        found = []
        for choice in self.choices:
            now = self.widths[choice.groups[0]]
            tried = [
                emptied(self.graph.branches, {**self.widths, **dict.fromkeys(choice.groups, width)})
                for width in choice.candidates(self.cost)
                if width < now
            ]
            for widths, ms in zip(tried, self.cost.many_ms(tried), strict=True):
                if ms <= at_most_ms:
                    found.append((choice, widths))
                    break
        return found

    def _scores(self, model: nn.Module) -> dict[str, npt.NDArray[np.float64]]:
        """L2 norm of what makes each unit."""
        movable = {name for choice in self.choices for name in choice.groups}
        groups = [group for group in self.graph.groups if group.name in movable]
        parameters, members = parameter_members(groups, model)
        return {
            group.name: np.sqrt(
                np.sum(
                    [unit_sums(parameters[one.parameter].square(), one) for one in makers(members[group.name])], axis=0
                )
            )
            for group in groups
        }

    def _best(self, scores: npt.NDArray[np.float64], name: str, width: int) -> tuple[int, ...]:
        """Of the units that are still there, those with the largest scores."""
        there = np.array(self.kept[name], dtype=np.int64)
        return tuple(int(there[place]) for place in best_units(scores[there], width))

    def _plan(self, widths: Mapping[str, int], kept: Mapping[str, tuple[int, ...]]) -> PruningPlan:
        dense = self.graph.widths()
        changed = {name: kept[name] if width else () for name, width in widths.items() if width < dense[name]}
        return make_plan(self.graph, changed, allow_empty=True)
