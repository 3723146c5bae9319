"""Training under soft masks: scores from its gradients, units chosen anew every few steps, and a plan in the end.

The sources are those of `soft_masking`.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils import _pytree as pytree

from edgeprune.allocation._base import Allocation, Certificate
from edgeprune.criteria.damage import best_units
from edgeprune.errors import BudgetInfeasibleError
from edgeprune.loop.searched import Searched
from edgeprune.recovery.evaluation import RecoveryRecord, evaluate
from edgeprune.recovery.fine_tuning import FineTuning, fine_tune
from edgeprune.recovery.straight_through import StraightThroughMasks
from edgeprune.surgery.constraints import without
from edgeprune.surgery.cutting import apply
from edgeprune.tasks.batches import call, device_of, mode, objective_batches

if TYPE_CHECKING:
    from torch import nn

    from edgeprune.graph.branches import ResidualBranch
    from edgeprune.loop.planning import Planner, Progress, Proposal
    from edgeprune.recovery.distillation._base import Distillation
    from edgeprune.tasks.task import Task

MASKED_TOLERANCE = 1e-3
"""Largest difference between masked and cut outputs, as a share of the largest, that rounding explains."""
LEAST_STEPS = 2
"""A scatter needs as many."""

_LEAST_SHARE = 1e-9

_log = logging.getLogger("edgeprune.loop")


def loss_changes(
    mean: npt.NDArray[np.float64],
    variance: npt.NDArray[np.float64],
    samples: float,
    active: npt.NDArray[np.bool_],
) -> npt.NDArray[np.float64]:
    """How much higher the loss is without each unit than with it, from the derivatives of the loss by its gate.

    The loss is expanded around what is: an active unit's gate is at 1, a masked one's at 0. The curvature is the Fisher
    information, the scatter of the gradient over batches times the samples of one. So an active unit is worth
    ``-mean + curvature / 2``, a masked one ``-mean - curvature / 2``. Squares of first-order terms would not do: where a
    model is trained the derivative of an active unit is near 0, that of a masked one is not, and all that was masked would
    come back, to be masked again next time.

    Source: L. Theis et al., "Faster gaze prediction with dense networks and Fisher pruning", 2018, section 2, for active units.

    Args:
        mean: Of the derivatives over batches, shape (size,).
        variance: Of the derivatives over batches, shape (size,).
        samples: Samples in one batch.
        active: Which units are not masked, shape (size,).

    Returns:
        At least 0, shape (size,).
    """
    curvature = samples * variance
    return np.maximum(0.0, -mean + np.where(active, 0.5, -0.5) * curvature)


def masked_model(planner: Planner, model: nn.Module, gone: Collection[ResidualBranch]) -> StraightThroughMasks:
    """A model under masks, as yet open, on all groups that may be narrowed, without some branches."""
    inside = {name for branch in gone for name in branch.groups}
    movable = {name for choice in planner.cost.choices if not choice.frozen for name in choice.groups}
    maskable = [group for group in planner.graph.groups if group.name in movable - inside]
    return StraightThroughMasks(model, maskable, {name for branch in gone for name in branch.tensors})


class MaskedTraining:
    """Masks, scores and allocations of one training.

    Args:
        planner: Of the dense model, with a task.
        proposal: Its plan, which fixes the target and the branches that go.
        every: Optimizer steps between two allocations.
        reduction: Called with (steps done, steps in all): which share of the way to the target is asked for.
    """

    def __init__(
        self, planner: Planner, proposal: Proposal, *, every: int, reduction: Callable[[int, int], float]
    ) -> None:
        self.every, self.asked, self.dense, self.first = every, reduction, planner, proposal
        self.graph = planner.graph
        self.model = copy.deepcopy(planner.model)
        gone = [branch for branch in self.graph.branches if proposal.allocation.widths[branch.lead] == 0]
        inside = {name for branch in gone for name in branch.groups}
        movable = {name for choice in planner.cost.choices if not choice.frozen for name in choice.groups}
        self.groups = [group for group in self.graph.groups if group.name in movable]
        self.masks = masked_model(planner, self.model, gone)
        # What is gone got no gradient: no later plan may have it back. What stays now stays.
        staying = {name: replace(rule, removable=False) for name, rule in planner.rules.items()}
        self.rules = without(staying, inside)
        self.sums = {group.name: np.zeros(group.size) for group in self.groups}
        self.squares = {group.name: np.zeros(group.size) for group in self.groups}
        self.counted = self.samples = 0
        self.planner = planner
        self.allocation: Allocation | None = None
        self.reduction = 0.0
        self.kept: dict[str, tuple[int, ...]] = {}
        self.ever = {group.name: np.zeros(group.size, dtype=bool) for group in self.groups if group.name not in inside}
        self.reallocations: list[dict[str, Any]] = []

    def train(
        self, masked: FineTuning, *, distill: Sequence[Distillation], checkpoint: Path | None, progress: Progress | None
    ) -> Searched:
        """Train, and choose a last time; see `SoftMasking.search`."""
        task = self.dense.task
        assert task is not None

        def told(step: str, done: int, total: int) -> None:
            if progress is not None:
                progress("soft masking", done, total)

        before = evaluate(self.model, task)
        tuned = fine_tune(
            self.masks,
            task,
            masked,
            teacher=self.dense.model if distill else None,
            distillation=distill,
            checkpoint=checkpoint,
            progress=told,
            watch=self.watch,
            companion=self,
        )
        steps = int(tuned.details["steps"])
        if self.allocation is None or self.reduction < 1:
            self.reallocate(steps, 1.0)
        assert self.allocation is not None
        proposal = self.planner.proposal(self.allocation, self.first.aim_ms)
        difference = self.difference(proposal, task)
        stayed = sum(int(came[list(self.kept.get(name, range(len(came))))].sum()) for name, came in self.ever.items())
        returned = sum(item["returned"] for item in self.reallocations)
        record = RecoveryRecord(
            "soft_masking",
            before,
            evaluate(self.masks, task),
            {
                "epochs": tuned.details["epochs"],
                "steps": steps,
                "reallocations": self.reallocations,
                "returned": returned,
                "masked_before_and_kept": stayed,
                "masked_against_cut": difference,
            },
        )
        notes = [
            f"Soft masking: {len(self.reallocations)} allocations in {steps} steps; {returned} times a masked unit came back, "
            f"and {stayed} units that are kept had been masked."
        ]
        if not difference <= MASKED_TOLERANCE:
            notes.append(
                f"The model as it was masked in training and the cut one differ by {difference:.1e} of the largest output: "
                "something runs over units that were cut (a norm, a mean), and saw them until then."
            )
        return Searched(self.planner, proposal, record, tuple(notes))

    def state(self) -> dict[str, Any]:
        """Sums since the last allocation, masks, and what was allocated, as JSON values."""
        allocation = self.allocation
        return {
            "sums": {name: values.tolist() for name, values in self.sums.items()},
            "squares": {name: values.tolist() for name, values in self.squares.items()},
            "counted": [self.counted, self.samples],
            "reduction": self.reduction,
            "kept": {name: [int(unit) for unit in units] for name, units in self.kept.items()},
            "ever": {name: values.tolist() for name, values in self.ever.items()},
            "reallocations": self.reallocations,
            "allocation": None if allocation is None else [allocation.widths, asdict(allocation.certificate)],
            "scores": None
            if allocation is None
            else {name: np.asarray(values).tolist() for name, values in self.planner.scores.items()},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`; the weights are where they were then already."""
        self.sums, self.squares = (
            {name: np.array(of) for name, of in state[key].items()} for key in ("sums", "squares")
        )
        self.counted, self.samples = state["counted"]
        self.reduction = state["reduction"]
        self.kept = {name: tuple(units) for name, units in state["kept"].items()}
        self.ever = {name: np.array(values, dtype=bool) for name, values in state["ever"].items()}
        self.reallocations = list(state["reallocations"])
        if state["allocation"] is not None:
            widths, certificate = state["allocation"]
            self.allocation = Allocation(dict(widths), Certificate(**certificate))
            scores = {name: np.array(values) for name, values in state["scores"].items()}
            self.planner = self.dense.rescored(self.model, scores, criterion="fisher", rules=self.rules)
            self.masks.keep(self.kept)

    def watch(self, step: int, total: int) -> None:
        """Take in the gradients of a step; at every so many choose units anew."""
        for name, derivatives in self.masks.gate_derivatives().items():
            self.sums[name] += derivatives
            self.squares[name] += derivatives**2
        self.counted += 1
        self.samples += self.masks.samples
        if step % self.every == 0:
            self.reallocate(step, self.asked(step, total))

    def reallocate(self, step: int, reduction: float) -> None:
        """Choose widths and units by the scores since the last time, and mask the others."""
        scores = self.scores()
        dense, self.reduction = self.dense, reduction
        dense_ms = dense.dense_ms
        budget_ms = self.first.aim_ms if reduction >= 1 else dense_ms - reduction * (dense_ms - self.first.aim_ms)
        limits = []
        for limit in dense.limits:
            whole = limit.cost.value({})
            limits.append(replace(limit, at_most=whole - reduction * max(0.0, whole - limit.at_most)))
        planner = dense.rescored(self.model, scores, criterion="fisher", rules=self.rules, limits=limits)
        try:
            allocation = planner.allocated(max(budget_ms, self.first.aim_ms))
        except BudgetInfeasibleError as error:
            # A search that proves nothing may miss with these scores what it found with others.
            _log.info("step %d: %s", step, error.message)
            allocation = self.first.allocation
        self.allocation, widths = allocation, allocation.widths
        self.planner = dense.rescored(self.model, scores, criterion="fisher", rules=self.rules)
        kept = {name: best_units(scores[name], widths[name]) for name in self.ever if widths[name] < len(scores[name])}
        returned = 0
        for name, ever in self.ever.items():
            now = _mask(kept.get(name), len(ever))
            returned += int((now & ~_mask(self.kept.get(name), len(ever))).sum())
            ever |= ~now
        self.kept = kept
        self.masks.keep(kept)
        predicted_ms = planner.cost.ms(widths)
        self.reallocations.append(
            {"step": step, "budget_ms": budget_ms, "predicted_ms": predicted_ms, "returned": returned}
        )
        _log.info("step %d: %.4g ms of %.4g ms, %d units came back", step, predicted_ms, budget_ms, returned)
        for values in (*self.sums.values(), *self.squares.values()):
            values[:] = 0.0
        self.counted = self.samples = 0

    def scores(self) -> dict[str, npt.NDArray[np.float64]]:
        """Changes of the loss by unit, from the steps since the last allocation; as last time where those were too few."""
        if self.counted < LEAST_STEPS:
            known: Mapping[str, npt.NDArray[np.float64]] = self.planner.scores
            return {group.name: known[group.name] for group in self.groups}
        found, kept = {}, {}
        for name, sums in self.sums.items():
            mean = sums / self.counted
            variance = np.maximum(0.0, self.squares[name] / self.counted - mean**2) * self.counted / (self.counted - 1)
            kept[name] = _mask(self.kept.get(name), len(sums))
            found[name] = loss_changes(mean, variance, self.samples / self.counted, kept[name])
        # Of units that are worth nothing those that are there stay.
        least = _LEAST_SHARE * max((float(values.max()) for values in found.values()), default=0.0)
        return {name: np.where(kept[name], np.maximum(values, least), values) for name, values in found.items()}

    def difference(self, proposal: Proposal, task: Task) -> float:
        """Largest difference between outputs of the masked and the cut model on one batch, as a share of the largest."""
        inputs, _ = next(objective_batches(task.objectives[0], "validation", device_of(self.model), 1))
        cut = apply(self.model, proposal.plan)
        with torch.no_grad(), mode(self.masks, training=False), mode(cut, training=False):
            return _distance(call(self.masks, inputs), call(cut, inputs))


def _mask(kept: tuple[int, ...] | None, size: int) -> npt.NDArray[np.bool_]:
    """True for units that stay; all of them where none are named."""
    found = np.ones(size, dtype=bool)
    if kept is not None:
        found[:] = False
        found[list(kept)] = True
    return found


def _distance(one: Any, other: Any) -> float:
    worst = 0.0
    for expected, found in zip(pytree.tree_leaves(one), pytree.tree_leaves(other), strict=True):
        if isinstance(expected, torch.Tensor) and expected.numel():
            wanted = expected.double()
            worst = max(worst, float((wanted - found.double()).abs().max() / wanted.abs().max().clamp(min=1e-12)))
    return worst
