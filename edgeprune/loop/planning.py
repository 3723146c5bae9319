"""From a model, a predictor and a budget to a plan: scores, damage curves, allocation."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgeprune.allocation import registry as allocators
from edgeprune.allocation._base import Allocation, Allocator, Certificate, Ready, infeasible
from edgeprune.allocation.cost import CostModel
from edgeprune.criteria import registry as criteria
from edgeprune.criteria._base import Criterion, Scores
from edgeprune.criteria.damage import DamageCurves, best_units, damage_curves
from edgeprune.errors import BudgetInfeasibleError, ConfigError, EmptyPlanError
from edgeprune.graph.branches import emptied
from edgeprune.loop.fronts import front_by_bands
from edgeprune.spec import Constraints
from edgeprune.surgery.constraints import WidthRule, resolve, with_removable
from edgeprune.surgery.plan import PruningPlan, make_plan

if TYPE_CHECKING:
    from torch import nn

    from edgeprune.allocation.terms import Limit
    from edgeprune.criteria.calibration import DamageCalibration
    from edgeprune.latency.predictor import Predictor
    from edgeprune.lowering.kernel_graph import KernelGraph
    from edgeprune.tasks.task import Task

ALLOCATOR = "exact"
"""How widths are chosen by default: proven, and quicker than the searches that prove nothing."""

Progress = Callable[[str, int, int], None]
"""Called with (step, done, in all)."""


@dataclass(frozen=True)
class Proposal:
    """A plan with its prediction; nothing has been cut yet.

    Attributes:
        plan: What to cut; holds the prediction.
        allocation: Widths and certificate.
        aim_ms: Predicted latency that the allocation had to stay below, milliseconds.
        predicted_ms: Predicted latency, milliseconds.
        low_ms: Lower end of its interval.
        high_ms: Upper end of its interval.
    """

    plan: PruningPlan
    allocation: Allocation
    aim_ms: float
    predicted_ms: float
    low_ms: float
    high_ms: float


class Planner:
    """Makes plans for one model and one predictor; scores and latencies are computed once for all budgets.

    Args:
        model: The dense model.
        kernel_graph: Its kernels at any widths.
        predictor: Of the board.
        task: Data for criteria that need them.
        constraints: What widths must respect.
        criterion: Name or object; ``"taylor"`` with a task and ``"l2"`` without one when None.
        allocator: Name or object.
        calibrate_damage: How damage is put on the scale of measured losses; None leaves it as the criterion gives it.
        limits: Budgets besides the latency, which every plan keeps.
        blocks: Whether whole residual branches may go. What that costs is measured, as the loss without each of them, so it
            needs a task, and all damage is put on that scale.
        about_ms: Predicted latency of the plans that are looked for, milliseconds; see `CostModel`.
        progress: Told what is being done.

    Attributes:
        model: The dense model.
        kernel_graph: Its kernels at any widths.
        predictor: Of the board.
        task: Data for criteria that need them, and for recovery.
        cost: Predicted latency by widths.
        rules: Constraints by group.
        criterion: The criterion in use.
        allocator: The allocator in use.
        calibrate_damage: How damage is put on the scale of measured losses, or None.
        limits: Budgets besides the latency.

    Raises:
        ConfigError: Whole branches may go, and there is no task.
        ConstraintError: A constraint matches nothing.
        EmptyPlanError: The model has no channel group.
    """

    def __init__(
        self,
        model: nn.Module,
        kernel_graph: KernelGraph,
        predictor: Predictor,
        *,
        task: Task | None = None,
        constraints: Constraints | None = None,
        criterion: str | Criterion | None = None,
        allocator: str | Allocator = ALLOCATOR,
        calibrate_damage: DamageCalibration | None = None,
        limits: Sequence[Limit] = (),
        blocks: bool = False,
        about_ms: float | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.kernel_graph, self.graph = kernel_graph, kernel_graph.graph
        if not self.graph.groups:
            raise EmptyPlanError(
                "a model must have at least one channel group to be pruned, found none.", hint="edgeprune explain MODEL"
            )
        self.model, self.predictor, self.task = model, predictor, task
        self.criterion = criteria.get(criterion or ("l2" if task is None else "taylor"))
        self.allocator = allocators.get(allocator)
        self.calibrate_damage, self.limits = calibrate_damage, tuple(limits)
        self.allocator.require_limits(self.limits)
        self.rules = resolve(constraints or Constraints(), self.graph)
        if blocks:
            if task is None:
                raise ConfigError(
                    "removing whole residual branches needs a task, to measure the loss without each, found none.",
                    hint="--task FILE.py:FACTORY",
                )
            from edgeprune.criteria.calibration import DamageCalibration

            self.rules = with_removable(self.rules, kernel_graph.removable)
            self.calibrate_damage = calibrate_damage or DamageCalibration(batch_statistics=True)
        self.cost = CostModel(kernel_graph, predictor, rules=self.rules, about_ms=about_ms)
        self._progress = progress
        self._scored_by: Planner | None = None

    @property
    def whole(self) -> dict[str, int]:
        """The widths of the dense model."""
        return self.graph.widths()

    @property
    def dense_ms(self) -> float:
        """Predicted latency of the dense model, milliseconds."""
        return self.predictor.network_ms(self.cost.kernels({}))

    @cached_property
    def scores(self) -> dict[str, npt.NDArray[np.float64]]:
        """Score of every unit of every group that is not frozen."""
        if self._scored_by is not None:
            return self._scored_by.scores
        movable = [name for choice in self.cost.choices if not choice.frozen for name in choice.groups]
        if not movable:
            return {}
        self._tell("scoring", 0)
        scores = self.criterion.score(self.graph, self.model, self.task, groups=movable)
        self._tell("scoring", 1)
        return scores

    @cached_property
    def damage(self) -> DamageCurves:
        """Damage by width of the same groups."""
        if self._scored_by is not None:
            return self._scored_by.damage
        curves = damage_curves(self.scores, self.criterion.normalization)
        if self.calibrate_damage is None or not curves:
            return curves

        def progress(done: int, total: int) -> None:
            if self._progress is not None:
                self._progress("calibrating damage", done, total)

        branches = [branch for branch in self.graph.branches if self.rules[branch.lead].removable]
        return self.calibrate_damage.calibrate(
            curves, self.scores, self.graph, self.model, self.task, branches=branches, progress=progress
        ).curves

    def about(self, ms: float) -> Planner:
        """The same planner with prices of networks of about another latency, milliseconds (`CostModel.about`).

        What either of them scores serves both. Where what weights cost does not depend on the length of a network, it is this
        planner itself.
        """
        cost = self.cost.about(ms)
        if math.isclose(cost.dense_ms, self.cost.dense_ms, rel_tol=1e-9):
            return self
        found = self._priced(cost)
        found._scored_by = self
        return found

    def settled(self, budget_ms: float, turns: int = 3, *, refitting: Any = None) -> Planner:
        """A planner for budgets near one, whose damage was measured beside the plan for it.

        Up to `turns` times: make the plan, measure its loss, change one decision at a time and measure again, correct the curves
        (`edgeprune.loop.in_context`). The curves of the plan with the least measured loss are taken.

        For plans that are refitted afterwards it is found instead at which share of their damage blocks are to go
        (`edgeprune.loop.after_refit`).

        Args:
            budget_ms: Predicted latency that plans must stay below, milliseconds. Where it is out of reach, or reached by the
                dense model, this planner itself comes back.
            turns: How often at most; without effect where plans are refitted.
            refitting: Example inputs, as the model was traced with, where layers are refitted by least squares before the loss is
                measured.

        Raises:
            ConfigError: There is no task to measure a loss on.
        """
        from edgeprune.loop.after_refit import refitted_curves
        from edgeprune.loop.in_context import settled_curves

        if self.task is None:
            raise ConfigError("damage beside a plan needs a task, to measure the loss, found none.")
        if budget_ms >= self.dense_ms:
            return self

        def told(done: int, total: int) -> None:
            if self._progress is not None:
                self._progress(
                    "measuring damage beside the plan" if refitting is None else "refitting plans", done, total
                )

        if refitting is None:
            curves = settled_curves(self, budget_ms, turns, told)
        else:
            curves = refitted_curves(self, budget_ms, refitting, told)
        return self if curves is None else self.with_damage(curves)

    def with_damage(self, curves: DamageCurves) -> Planner:
        """The same planner with other damage by width."""
        found = copy.copy(self)
        found.__dict__.pop("_ready", None)
        found.__dict__["damage"] = curves
        return found

    def widths_within(self, curves: DamageCurves, budget_ms: float) -> dict[str, int]:
        """The widths with the least damage by some curves, within a predicted latency in milliseconds.

        Raises:
            BudgetInfeasibleError: It is out of reach.
        """
        ready = self.allocator.prepare(self.graph.groups, curves, self.cost, self.rules, self.limits)
        return emptied(self.graph.branches, ready.within(budget_ms).widths)

    def rescored(
        self,
        model: nn.Module,
        scores: Scores,
        *,
        criterion: str | Criterion,
        rules: Mapping[str, WidthRule] | None = None,
        limits: Sequence[Limit] | None = None,
    ) -> Planner:
        """The same planner for other weights of the same model, with scores that the caller has. No loss is measured.

        Args:
            model: What plans are to be applied to.
            scores: Of every unit of the groups that may be pruned, shape (size,) each.
            criterion: What they are scores of: says how they become damage.
            rules: Other constraints by group; the same when None.
            limits: Other budgets besides the latency; the same when None.
        """
        found = copy.copy(self)
        for known in ("scores", "damage", "_ready"):
            found.__dict__.pop(known, None)
        found.model, found.criterion = model, criteria.get(criterion)
        found.rules = self.rules if rules is None else dict(rules)
        found.limits = self.limits if limits is None else tuple(limits)
        found.__dict__["scores"] = dict(scores)
        found.__dict__["damage"] = damage_curves(scores, found.criterion.normalization)
        return found

    def allocating(self, allocator: Allocator, ready: Ready) -> Planner:
        """The same planner with another allocator.

        Args:
            allocator: Its name is written into plans.
            ready: What it has made of this planner's problem.
        """
        found = copy.copy(self)
        found.allocator = allocator
        found.__dict__["_ready"] = ready
        return found

    def keeps_limits(self, widths: Mapping[str, int]) -> bool:
        """Whether some widths keep the budgets besides the latency."""
        return all(limit.cost.value(widths) <= limit.at_most for limit in self.limits)

    def propose(self, budget_ms: float, *, margin: float = 0.0) -> Proposal:
        """A plan whose predicted latency is at most ``budget_ms * (1 - margin)``.

        Where only the margin is out of reach, the smallest reachable latency is aimed at instead.

        Raises:
            BudgetInfeasibleError: The budget itself is out of reach.
        """
        _ = self.damage  # scoring tells its own progress
        self._tell("allocating", 0)
        aim_ms = budget_ms * (1 - margin)
        try:
            allocation = self._ready.within(aim_ms)
        except BudgetInfeasibleError as error:
            if aim_ms < error.best_ms <= budget_ms:
                aim_ms = error.best_ms
                allocation = self._ready.within(aim_ms)
            elif error.widths is None or error.best_ms <= budget_ms:
                raise  # it is not the latency that is out of reach
            else:
                # The allocator speaks of its aim; the user asked for a budget.
                raise infeasible(self.cost, error.widths, error.best_ms, budget_ms) from error
        self._tell("allocating", 1)
        return self.proposal(allocation, aim_ms)

    def allocated(self, budget_ms: float) -> Allocation:
        """Widths within a predicted latency, without a plan.

        Raises:
            BudgetInfeasibleError: It is out of reach.
        """
        return self._ready.within(budget_ms)

    def front(self, points: int = 20) -> tuple[Proposal, ...]:
        """Plans along the Pareto front of damage and predicted latency, from the fastest to the dense one.

        Each is priced at about its own latency (`edgeprune.loop.fronts`).

        Args:
            points: Number of latencies, evenly from the smallest that was found to the dense one; a plan that is the best at
                several of them is there once.
        """
        _ = self.damage  # scoring tells its own progress
        self._tell("allocating", 0)
        found = front_by_bands(self.cost.as_long_as({}), self._ready_at, points)
        self._tell("allocating", 1)
        own = self.cost.as_long_as
        return tuple(self._priced(own(one.widths)).proposal(one, one.certificate.budget_ms) for one in found)

    def proposal(self, allocation: Allocation, aim_ms: float, plan: PruningPlan | None = None) -> Proposal:
        """The plan for widths from any allocator: in each group the units with the best scores are kept.

        Args:
            allocation: The widths.
            aim_ms: Predicted latency that they had to stay below, milliseconds.
            plan: One with these widths that is there already; it is taken, whatever the scores are now.
        """
        allocation = replace(allocation, widths=emptied(self.graph.branches, allocation.widths))
        predicted_ms, low_ms, high_ms = self.cost.interval(allocation.widths)
        if plan is not None:
            return Proposal(plan, allocation, aim_ms, predicted_ms, low_ms, high_ms)
        kept: dict[str, tuple[int, ...]] = {name: () for name, width in allocation.widths.items() if width == 0}
        kept |= {
            name: best_units(values, allocation.widths[name])
            for name, values in self.scores.items()
            if allocation.widths[name] < len(values)
        }
        plan = make_plan(self.graph, kept, predicted=self._information(allocation.widths), allow_empty=True)
        return Proposal(plan, allocation, aim_ms, predicted_ms, low_ms, high_ms)

    def dense(self, budget_ms: float) -> Proposal:
        """The plan that removes nothing."""
        certificate = Certificate(
            method="none",
            budget_ms=budget_ms,
            predicted_ms=self.dense_ms,
            damage=0.0,
            bound=0.0,
            evaluations=1,
            note="the dense widths meet the budget.",
        )
        widths = self.graph.widths()
        predicted_ms, low_ms, high_ms = self.cost.interval(widths)
        plan = make_plan(self.graph, {}, predicted=self._information(widths), allow_empty=True)
        return Proposal(plan, Allocation(widths, certificate), budget_ms, predicted_ms, low_ms, high_ms)

    @cached_property
    def _ready(self) -> Ready:
        return self.allocator.prepare(self.graph.groups, self.damage, self.cost, self.rules, self.limits)

    def _ready_at(self, cost: CostModel) -> Ready:
        if cost is self.cost:
            return self._ready
        return self.allocator.prepare(self.graph.groups, self.damage, cost, self.rules, self.limits)

    def _priced(self, cost: CostModel) -> Planner:
        found = copy.copy(self)
        found.__dict__.pop("_ready", None)
        found.cost = cost
        return found

    def _information(self, widths: Mapping[str, int]) -> dict[str, object]:
        predicted_ms, low_ms, high_ms = self.cost.interval(widths)
        return {
            "latency_ms": predicted_ms,
            "low_ms": low_ms,
            "high_ms": high_ms,
            "dense_ms": self.dense_ms,
            "table": self.predictor.table_hash,
            "threads": self.predictor.table.header["threads"],
            "criterion": self.criterion.name,
            "allocator": self.allocator.name,
        }

    def _tell(self, step: str, done: int) -> None:
        if self._progress is not None:
            self._progress(step, done, 1)
