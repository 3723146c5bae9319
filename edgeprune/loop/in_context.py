"""Damage beside the rest of a plan: what each decision is worth where the others are taken, measured.

Damage curves are made one group at a time on the dense model and then summed, as if what one removal costs did not hang on the
others. Behind many removals it does: a block that hardly counts in the dense model may be the last of its stage. So the loss is
measured around a plan, one decision changed at a time, the curves are corrected by it, and the plan is made again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeprune.criteria.damage import DamageCurves, best_units
from edgeprune.graph.branches import emptied
from edgeprune.surgery.plan import make_plan

if TYPE_CHECKING:
    from torch import nn

    from edgeprune.allocation.choices import Choice
    from edgeprune.criteria._base import Scores
    from edgeprune.graph.channel_graph import ChannelGraph
    from edgeprune.tasks.task import Task

_log = logging.getLogger("edgeprune.loop")

Widths = Mapping[str, int]

_MOST = 4.0
"""A curve is scaled by at most this factor at once, and by at least its inverse: one measurement is not the truth."""
_LEAST = 1e-6
"""Damages below are nothing; there is nothing to scale."""


class PlanLoss:
    """Loss of cut models on training batches that are read once; batch norms normalize by the batch, nothing is tuned.

    Args:
        model: The dense model.
        graph: Its channel groups.
        scores: Which units are kept at a width: the best.
        task: Data and losses.
        batches: Most training batches per objective; they stay in memory.
    """

    def __init__(self, model: nn.Module, graph: ChannelGraph, scores: Scores, task: Task, batches: int = 4) -> None:
        from edgeprune.tasks.batches import device_of, labeled_batches

        self._model, self._graph, self._scores, self._task = model, graph, scores, task
        device = device_of(model)
        self._batches = [list(labeled_batches(one, "train", device, batches)) for one in task.objectives]
        self._known: dict[tuple[int, ...], float] = {}

    def at(self, widths: Widths) -> float:
        """The weighted loss at some widths of all groups; a group of a removed branch has 0.

        Raises:
            SurgeryError: The cut program cannot be written down.
        """
        key = tuple(widths[group.name] for group in self._graph.groups)
        if key not in self._known:
            self._known[key] = self._loss(widths)
        return self._known[key]

    def _loss(self, widths: Widths) -> float:
        import torch

        from edgeprune.surgery.cutting import cut_program
        from edgeprune.tasks.batches import call, loss_of

        kept: dict[str, Any] = {name: () for name, width in widths.items() if width == 0}
        kept |= {
            name: best_units(values, widths[name])
            for name, values in self._scores.items()
            if widths[name] < len(values)
        }
        module = cut_program(self._model, make_plan(self._graph, kept, allow_empty=True)).eval()
        total = 0.0
        with torch.no_grad(), ExitStack() as stack:
            stack.enter_context(module.watched(lambda name, values: None))
            for objective, own in zip(self._task.objectives, self._batches, strict=True):
                losses = [float(loss_of(objective, call(module, inputs), targets)) for inputs, targets in own]
                total += objective.weight * float(np.mean(losses))
        return total


@dataclass(frozen=True)
class _Change:
    """One decision otherwise: of which group, to which width."""

    group: str
    width: int


def changes(
    choices: tuple[Choice, ...], candidates: Mapping[str, tuple[int, ...]], widths: Widths
) -> Iterator[_Change]:
    """What is tried around a plan: a removed branch put back, a branch taken out, a narrowed group whole, a whole one narrower.

    Args:
        choices: The decisions.
        candidates: Widths of each decision's first group, descending.
        widths: The plan.
    """
    for choice in choices:
        name = choice.groups[0]
        if choice.frozen:
            continue
        if choice.removable and widths[name] > 0:
            yield _Change(name, 0)
        if widths[name] < choice.size:
            yield _Change(name, choice.size)
        else:
            narrower = [width for width in candidates[name] if 0 < width < choice.size]
            if narrower:
                yield _Change(name, narrower[0])


def corrected(
    curves: DamageCurves,
    choices: tuple[Choice, ...],
    candidates: Mapping[str, tuple[int, ...]],
    widths: Widths,
    loss: Callable[[str, int], float],
    progress: Callable[[int, int], None] | None = None,
) -> DamageCurves:
    """The curves as they are beside a plan.

    What a removed branch costs becomes what putting it back gains; what taking one out costs is measured; a curve is scaled so
    that it gives the measured change between two widths. A curve goes half of the way, in the logarithm, at once.

    Args:
        curves: Damage by width, shape (size + 1,) each; they are not changed.
        choices: The decisions.
        candidates: Widths of each decision's first group, descending.
        widths: The plan.
        loss: Called with a group and a width: the loss of the plan with only that changed, minus the plan's own.
        progress: Called with (measured, in all).
    """
    found = {name: curve.copy() for name, curve in curves.items()}
    every = list(changes(choices, candidates, widths))
    tied = {choice.groups[0]: choice.groups for choice in choices}
    for done, change in enumerate(every):
        name, now = change.group, widths[change.group]
        difference = loss(name, change.width)
        curve = found[name]
        if change.width == 0:
            curve[0] = _halfway(curve[0], float(curve[now]) + max(0.0, difference))
        elif now == 0:
            curve[0] = _halfway(curve[0], max(0.0, -difference))
        else:
            said = sum(float(found[one][change.width] - found[one][now]) for one in tied[name])
            if abs(said) > _LEAST:
                factor = float(np.clip(difference / said, 1 / _MOST, _MOST)) ** 0.5
                for one in tied[name]:
                    removal = found[one][0]
                    found[one] *= factor
                    found[one][0] = removal
        if progress is not None:
            progress(done + 1, len(every))
    return found


def _halfway(before: float, after: float) -> float:
    return float(np.sqrt(max(before, _LEAST) * max(after, _LEAST)))


def changed(graph: ChannelGraph, tied: tuple[str, ...], widths: Widths, width: int) -> dict[str, int]:
    """A plan's widths with one decision changed; a branch that is put back is whole, one that is taken out has nothing.

    Args:
        graph: Of the model.
        tied: The groups of the decision.
        widths: The plan.
        width: What these groups get.
    """
    found = {**widths, **dict.fromkeys(tied, width)}
    if width > 0:
        for branch in graph.branches:
            if branch.lead in tied and widths[branch.lead] == 0:
                sizes = graph.widths()
                found |= {name: sizes[name] for name in branch.groups}
    return emptied(graph.branches, found)
