"""Damage in units of the loss: a few measured losses per group put the curves of all groups on one scale."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from edgeprune.criteria._base import Scores
from edgeprune.criteria.batch_statistics import by_batch
from edgeprune.criteria.damage import DamageCurves, best_units
from edgeprune.criteria.gates import closing_members
from edgeprune.criteria.slices import parameter_members, selected
from edgeprune.errors import ConfigError, TaskError
from edgeprune.surgery.cutting import cut_program
from edgeprune.surgery.plan import make_plan
from edgeprune.tasks.batches import call, device_of, labeled_batches, loss_of, mode

if TYPE_CHECKING:
    from torch import nn

    from edgeprune.graph.branches import ResidualBranch
    from edgeprune.graph.channel_graph import ChannelGraph, ChannelGroup
    from edgeprune.tasks.task import Task

_LEAST_SLOPE = 1e-3
"""Of the median scale: what harmless removals cost, so that the order of widths stays."""

_log = logging.getLogger("edgeprune.criteria")


@dataclass(frozen=True)
class Calibrated:
    """Damage curves on the scale of the loss.

    Attributes:
        curves: Group name to damage by width, shape (size + 1,); falls with the width, 0 at the full size. Where a branch was
            removed, width 0 has what that was measured to cost, which may be less than what few units cost.
        measured: Group name to pairs (width, increase of the loss), in the order of measuring. A group that time did not
            reach has none, and the median scale of the others.
        dense_loss: Loss of the whole model on the same batches.
    """

    curves: DamageCurves
    measured: Mapping[str, tuple[tuple[int, float], ...]]
    dense_loss: float


@dataclass(frozen=True)
class DamageCalibration:
    """How damage curves are put on the scale of the loss.

    Per group the loss is measured at a few widths, the worst units closed where they are read
    (`edgeprune.criteria.gates.gate_members`; nothing is cut, and running statistics stay). Predicted damage is then mapped to
    measured increase by straight lines through the origin and these points, made monotone; behind the last point the line
    goes on in proportion. The order of the units and of a group's widths stays as it is; what changes is how groups compare.
    An increase below 0 counts as 0. A residual branch that may go is removed as a whole for one more measurement.

    Costs (groups * widths + branches + 1) forward passes over the batches.

    Attributes:
        kept: Shares of the units that stay at the measured widths, in the order of measuring: all groups at the first one,
            then all at the second.
        batches: Most training batches per objective; all of them are in memory together.
        seconds: Measuring ends after so much time; None means when all is measured. A limit that is reached makes the
            result depend on the machine's speed.
        batch_statistics: Batch norms normalize by the batch while the loss is measured, as if their statistics had been
            estimated anew after each removal; running ones describe what is no longer there.
    """

    kept: tuple[float, ...] = (0.5, 0.75, 0.25)
    batches: int = 4
    seconds: float | None = None
    batch_statistics: bool = False

    def __post_init__(self) -> None:
        if not self.kept or not all(0 <= share < 1 for share in self.kept):
            raise ConfigError(f"the kept shares must lie in [0, 1) and be at least one, found {self.kept}.")
        if self.batches < 1:
            raise ConfigError(f"damage must be calibrated on at least 1 batch, found batches={self.batches}.")

    def calibrate(
        self,
        curves: DamageCurves,
        scores: Scores,
        graph: ChannelGraph,
        model: nn.Module,
        task: Task | None,
        *,
        branches: Sequence[ResidualBranch] = (),
        progress: Callable[[int, int], None] | None = None,
    ) -> Calibrated:
        """Put damage curves on the scale of the loss; the model itself stays as it is, a copy is masked.

        Args:
            curves: Of `edgeprune.criteria.damage.damage_curves`.
            scores: What they were made of.
            graph: Channel groups of the model.
            model: The dense model.
            task: Data and loss.
            branches: Residual branches whose removal is measured too; it is the damage of their lead at width 0.
            progress: Called with (measured, in all).

        Raises:
            TaskError: There is no task, or it cannot be used.
            SurgeryError: A branch is to be removed from a program that cannot be written down.
        """
        if task is None:
            raise TaskError("damage must have a task to be calibrated, found none.", hint="give task=")
        groups = selected(graph, list(curves))
        masked = _Masked(model, graph, groups, scores, batch_statistics=self.batch_statistics)
        # Read once: a loader that shuffles would give every measurement other samples.
        device = device_of(model)
        batches = [list(labeled_batches(objective, "train", device, self.batches)) for objective in task.objectives]
        wanted = {
            (group.name, width): group
            for share in self.kept
            for group in groups
            for width in [max(1, round(share * group.size))]
            if curves[group.name][width] > 0
        }
        total = len(wanted) + len(branches)
        started = time.monotonic()
        dense_loss = masked.loss(task, batches)
        removals = {}
        for done, branch in enumerate(branches):
            removals[branch.lead] = masked.loss_without(branch, task, batches) - dense_loss
            if progress is not None:
                progress(done + 1, total)
        measured: dict[str, list[tuple[int, float]]] = {group.name: [] for group in groups}
        for done, ((name, width), group) in enumerate(wanted.items()):
            if self.seconds is not None and time.monotonic() - started > self.seconds:
                _log.warning("damage was calibrated at %s of %s widths in %s s", done, len(wanted), self.seconds)
                break
            with masked.closed(group, width):
                measured[name].append((width, masked.loss(task, batches) - dense_loss))
            if progress is not None:
                progress(len(branches) + done + 1, total)
        scaled = _scaled(curves, measured)
        for name, loss in removals.items():
            scaled[name][0] = max(0.0, loss) + _LEAST_SLOPE * scaled[name][0]
            measured[name].append((0, loss))
        return Calibrated(scaled, {name: tuple(points) for name, points in measured.items()}, dense_loss)


class _Masked:
    """A copy of a model in which units can be closed."""

    def __init__(
        self,
        model: nn.Module,
        graph: ChannelGraph,
        groups: Sequence[ChannelGroup],
        scores: Scores,
        *,
        batch_statistics: bool,
    ) -> None:
        self._model, self._graph, self._scores = copy.deepcopy(model), graph, scores
        self._batch_statistics = batch_statistics
        parameters, members = parameter_members(groups, self._model)
        self._parameters: Mapping[str, torch.Tensor] = parameters
        self._gates = {group.name: closing_members(members[group.name], group.size) for group in groups}

    @contextmanager
    def closed(self, group: ChannelGroup, width: int) -> Iterator[None]:
        """All but the best units are zero where they are read, for a block."""
        gone = np.ones(group.size, dtype=bool)
        gone[list(best_units(self._scores[group.name], width))] = False
        with torch.no_grad():
            before = {
                member.parameter: self._parameters[member.parameter].clone() for member, _ in self._gates[group.name]
            }
            try:
                for member, gated in self._gates[group.name]:
                    indices = [index for unit in np.flatnonzero(gone & gated) for index in member.indices[unit]]
                    weight = self._parameters[member.parameter]
                    weight.index_fill_(member.axis, torch.tensor(indices, dtype=torch.long, device=weight.device), 0.0)
                yield
            finally:
                for name, values in before.items():
                    self._parameters[name].copy_(values)

    def loss(self, task: Task, batches: Sequence[Sequence[tuple[Any, Any]]]) -> float:
        """Weighted sum over the objectives of the mean loss of their batches, in eval form."""
        return self._loss(self._model, task, batches)

    def loss_without(self, branch: ResidualBranch, task: Task, batches: Sequence[Sequence[tuple[Any, Any]]]) -> float:
        """The same of the model without a branch."""
        plan = make_plan(self._graph, dict.fromkeys(branch.groups, ()))
        return self._loss(cut_program(self._model, plan), task, batches)

    def _loss(self, model: nn.Module, task: Task, batches: Sequence[Sequence[tuple[Any, Any]]]) -> float:
        total = 0.0
        norms = by_batch(model) if self._batch_statistics else nullcontext()
        with mode(model, training=False), torch.no_grad(), norms:
            for objective, own in zip(task.objectives, batches, strict=True):
                losses = [float(loss_of(objective, call(model, inputs), targets)) for inputs, targets in own]
                total += objective.weight * float(np.mean(losses))
        return total


def _scaled(curves: DamageCurves, measured: Mapping[str, Sequence[tuple[int, float]]]) -> DamageCurves:
    """Every curve through the monotone line of its points."""
    lines = {}
    for name, points in measured.items():
        ordered = sorted((float(curves[name][width]), loss) for width, loss in points)
        if ordered:
            predicted = np.array([0.0, *(damage for damage, _ in ordered)])
            lines[name] = predicted, np.maximum.accumulate([0.0, *(loss for _, loss in ordered)])
    slopes = {name: float(found[-1] / predicted[-1]) for name, (predicted, found) in lines.items()}
    scale = float(np.median(list(slopes.values())) or max(slopes.values()) or 1.0) if slopes else 1.0
    scaled = {}
    for name, curve in curves.items():
        if name not in lines:
            scaled[name] = scale * curve
            continue
        predicted, found = lines[name]
        line = np.where(curve > predicted[-1], slopes[name] * curve, np.interp(curve, predicted, found))
        # Where the loss did not grow, fewer units are still not better than more.
        scaled[name] = line + _LEAST_SLOPE * scale * curve
    return scaled
