"""Damage in units of the loss: a few measured losses per group put the curves of all groups on one scale."""

from __future__ import annotations

import copy
import itertools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from edgeprune.criteria._base import Scores
from edgeprune.criteria.batch_statistics import by_batch
from edgeprune.criteria.common_prefix import MOST_BYTES, Prefix, first_reader
from edgeprune.criteria.damage import DamageCurves, best_units
from edgeprune.criteria.gates import closing_members
from edgeprune.criteria.slices import parameter_members, selected
from edgeprune.errors import ConfigError, TaskError
from edgeprune.surgery.cutting import cut_program
from edgeprune.surgery.plan import make_plan
from edgeprune.surgery.program_module import ProgramModule
from edgeprune.tasks.batches import call, device_of, labeled_batches, loss_of, mode, sharing

if TYPE_CHECKING:
    from torch import nn

    from edgeprune.graph.branches import ResidualBranch
    from edgeprune.graph.channel_graph import ChannelGraph, ChannelGroup
    from edgeprune.tasks.task import Objective, Task

Losses = Mapping[str, float]
"""By objective."""
Recall = Callable[[Any, Callable[[], Any]], Any]
"""Called with what is to be measured, JSON values, and what measures it; gives what was measured, then or now."""

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
            raise TaskError(
                "damage must have a task to be calibrated, found none.", hint="--task FILE.py:FACTORY; task= in Python"
            )
        masked = _Masked(self, model, graph, selected(graph, list(curves)), scores, task)
        weights = {one.name: one.weight for one in task.objectives}

        def weighted(losses: Mapping[str, float]) -> float:
            return sum(weights[name] * loss for name, loss in losses.items())

        dense, measured, removed = self._measured([curves], masked, branches, progress)
        points = {
            name: [(width, weighted(losses) - weighted(dense)) for width, losses in several]
            for name, several in measured.items()
        }
        scaled = _scaled(curves, points)
        for name, losses in removed.items():
            loss = weighted(losses) - weighted(dense)
            scaled[name][0] = max(0.0, loss) + _LEAST_SLOPE * scaled[name][0]
            points[name].append((0, loss))
        return Calibrated(scaled, {name: tuple(several) for name, several in points.items()}, weighted(dense))

    def calibrate_each(
        self,
        curves: Mapping[str, DamageCurves],
        scores: Scores,
        graph: ChannelGraph,
        model: nn.Module,
        task: Task,
        *,
        recall: Recall | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> dict[str, Calibrated]:
        """As `calibrate`, with curves of each objective on the scale of its own loss, without its weight.

        The same widths are measured for all objectives at once, so it costs as many forward passes as for one where they share
        a loader.

        Args:
            curves: By objective, of the same groups; a curve of 0 throughout stays that: the objective does not depend on the
                group.
            scores: By which units are kept in all of them.
            graph: Channel groups of the model.
            model: The dense model.
            task: Data and losses.
            recall: Knows what was measured before an interruption.
            progress: Called with (measured, in all).

        Raises:
            TaskError: The task cannot be used.
        """
        every = [curves[one.name] for one in task.objectives]
        masked = _Masked(self, model, graph, selected(graph, list(every[0])), scores, task)
        dense, measured, _ = self._measured(every, masked, (), progress, recall)
        found = {}
        for one in task.objectives:
            points = {
                name: [
                    (width, losses[one.name] - dense[one.name])
                    for width, losses in several
                    if curves[one.name][name][width] > 0
                ]
                for name, several in measured.items()
            }
            scaled = _scaled(curves[one.name], points)
            found[one.name] = Calibrated(
                scaled, {name: tuple(several) for name, several in points.items()}, dense[one.name]
            )
        return found

    def _measured(
        self,
        curves: Sequence[DamageCurves],
        masked: _Masked,
        branches: Sequence[ResidualBranch],
        progress: Callable[[int, int], None] | None,
        recall: Recall | None = None,
    ) -> tuple[Losses, dict[str, list[tuple[int, Losses]]], dict[str, Losses]]:
        """Losses by objective: of the whole model, per group at each measured width, and without each branch by its lead."""
        wanted = {
            (group.name, width): group
            for share in self.kept
            for group in masked.groups
            for width in [max(1, round(share * group.size))]
            if any(one[group.name][width] > 0 for one in curves)
        }
        total = len(wanted) + len(branches)
        started = time.monotonic()
        dense = masked.losses() if recall is None else recall(["dense losses"], masked.losses)
        removals = {}
        for done, branch in enumerate(branches):
            removals[branch.lead] = masked.losses_without(branch)
            if progress is not None:
                progress(done + 1, total)
        measured: dict[str, list[tuple[int, Losses]]] = {group.name: [] for group in masked.groups}
        every = list(wanted.items())
        if self.seconds is None:
            # Where all is measured, from the input on: what lies before a group's first reader is computed once.
            every.sort(key=lambda item: masked.place(item[1]))
        for done, ((name, width), group) in enumerate(every):
            if self.seconds is not None and time.monotonic() - started > self.seconds:
                _log.warning("damage was calibrated at %s of %s widths in %s s", done, len(wanted), self.seconds)
                break

            def losses(group: ChannelGroup = group, width: int = width) -> Losses:
                with masked.closed(group, width):
                    return masked.losses_behind(group)

            measured[name].append((width, losses() if recall is None else recall(["losses", name, width], losses)))
            if progress is not None:
                progress(len(branches) + done + 1, total)
        return dense, measured, removals


class _Masked:
    """A copy of a model in which units can be closed, and the batches on which it is looked at."""

    def __init__(
        self,
        settings: DamageCalibration,
        model: nn.Module,
        graph: ChannelGraph,
        groups: Sequence[ChannelGroup],
        scores: Scores,
        task: Task,
    ) -> None:
        self._dense, self._graph, self._scores, self.groups = model, graph, scores, tuple(groups)
        self._batch_statistics = settings.batch_statistics
        # Read once: a loader that shuffles would give every measurement other samples.
        self._batches = [
            (several, list(labeled_batches(several[0], "train", device_of(model), settings.batches)))
            for several in _together(task)
        ]
        inputs = [one for _, batches in self._batches for one, _ in batches]
        whole = _program(model, graph, inputs)
        self._model = copy.deepcopy(model) if whole is None else whole
        self._prefix = None if whole is None else Prefix(copy.deepcopy(whole), inputs, MOST_BYTES)
        parameters, members = parameter_members(groups, self._model)
        self._parameters: Mapping[str, torch.Tensor] = parameters
        self._gates = {group.name: closing_members(members[group.name], group.size) for group in groups}
        self._places = {
            group.name: 0
            if whole is None
            else first_reader(whole.program, {member.parameter for member, _ in self._gates[group.name]})
            for group in groups
        }

    def place(self, group: ChannelGroup) -> int:
        """How many operations there are before the first that reads what is zero where the group is closed; 0 where unknown."""
        return self._places[group.name]

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

    def losses(self) -> Losses:
        """Mean loss of the batches by objective, in eval form."""
        return self._losses(self._model)

    def losses_behind(self, group: ChannelGroup) -> Losses:
        """The same where a group is closed; for groups in the order of their `place`, what lies before it is computed once."""
        place = self._places[group.name]
        if self._prefix is None or self._prefix.count > place:
            return self.losses()
        with self._norms(self._prefix.module):
            self._prefix.advance(place)
        return self._losses(self._model, self._prefix)

    def losses_without(self, branch: ResidualBranch) -> Losses:
        """The same of the model without a branch."""
        plan = make_plan(self._graph, dict.fromkeys(branch.groups, ()))
        return self._losses(cut_program(self._dense, plan))

    def _norms(self, model: nn.Module) -> AbstractContextManager[None]:
        return by_batch(model) if self._batch_statistics else nullcontext()

    def _losses(self, model: nn.Module, prefix: Prefix | None = None) -> Losses:
        found: dict[str, list[float]] = {}
        number = itertools.count()
        with mode(model, training=False), torch.no_grad(), self._norms(model):
            for several, batches in self._batches:
                for inputs, targets in batches:
                    if prefix is not None and isinstance(model, ProgramModule):
                        outputs = prefix.outputs(model, next(number))
                    else:
                        outputs = call(model, inputs)
                    for one in several:
                        found.setdefault(one.name, []).append(float(loss_of(one, outputs, targets)))
        return {name: float(np.mean(losses)) for name, losses in found.items()}


def _program(model: nn.Module, graph: ChannelGraph, inputs: Sequence[Any]) -> ProgramModule | None:
    """The model as its program, where that can be written down and takes these inputs.

    On other devices than the CPU the model itself is run: constants of forward lie where the model was traced.
    """
    if graph.parts or not graph.dynamic_batch or device_of(model).type != "cpu":
        return None
    expected = [tuple(example.shape[1:]) for example in graph.example_inputs]
    for one in inputs:
        leaves = pytree.tree_leaves(one)
        if [tuple(leaf.shape[1:]) if isinstance(leaf, torch.Tensor) else None for leaf in leaves] != expected:
            return None
    plan = make_plan(graph, {}, allow_empty=True)
    return None if plan.program is None else cut_program(model, plan).eval()


def _together(task: Task) -> Iterator[tuple[Objective, ...]]:
    """Objectives by loader; one that only some batches have labels for reads its own."""
    for several in sharing(task.objectives, "train"):
        if any(one.labeled is not None for one in several):
            yield from ((one,) for one in several)
        else:
            yield several


def _scaled(curves: DamageCurves, measured: Mapping[str, Sequence[tuple[int, float]]]) -> DamageCurves:
    """Every curve through the monotone line of its points."""
    lines = {}
    for name, points in measured.items():
        ordered = sorted((float(curves[name][width]), loss) for width, loss in points)
        if ordered and ordered[-1][0] > 0:
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
