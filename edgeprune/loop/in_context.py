"""Damage beside the rest of a plan: what each decision is worth where the others are taken, measured.

Damage curves are made one group at a time on the dense model and then summed, as if what one removal costs did not hang on the
others. Behind many removals it does: a block that hardly counts in the dense model may be the last of its stage. So the loss is
measured around a plan, one decision changed at a time, the curves are corrected by it, and the plan is made again.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeprune.criteria.damage import DamageCurves, best_units
from edgeprune.errors import BudgetInfeasibleError
from edgeprune.graph.branches import emptied
from edgeprune.surgery.plan import make_plan

if TYPE_CHECKING:
    from torch import nn

    from edgeprune.allocation.choices import Choice
    from edgeprune.criteria._base import Scores
    from edgeprune.graph.channel_graph import ChannelGraph
    from edgeprune.loop.planning import Planner
    from edgeprune.surgery.plan import PruningPlan
    from edgeprune.surgery.program_module import ProgramModule
    from edgeprune.tasks.task import Task

_log = logging.getLogger("edgeprune.loop")

Widths = Mapping[str, int]

_MOST = 4.0
"""A curve is scaled by at most this factor at once, and by at least its inverse: one measurement is not the truth."""
_LEAST = 1e-6
"""Damages below are nothing; there is nothing to scale."""


def settled_curves(
    planner: Planner, budget_ms: float, turns: int, progress: Callable[[int, int], None]
) -> DamageCurves | None:
    """Damage curves by which the plan for a budget has the least measured loss of all that were tried.

    Args:
        planner: With a task. It stays as it is.
        budget_ms: Predicted latency that plans must stay below, milliseconds.
        turns: How often curves are corrected at most.
        progress: Called with (measured, in all).

    Returns:
        The curves; None where the budget is out of reach.

    Raises:
        SurgeryError: A cut program cannot be written down.
    """
    assert planner.task is not None
    graph, choices = planner.graph, planner.cost.choices
    loss = PlanLoss(planner.model, graph, planner.scores, planner.task)
    tied = {choice.groups[0]: choice.groups for choice in choices}
    candidates = {choice.groups[0]: choice.candidates(planner.cost) for choice in choices if not choice.frozen}
    curves, best = planner.damage, (float("inf"), planner.damage)
    seen: list[dict[str, int]] = []
    for turn in range(turns + 1):
        try:
            widths = planner.widths_within(curves, budget_ms)
        except BudgetInfeasibleError:
            return None
        if widths in seen:
            break
        seen.append(widths)
        here = loss.at(widths)
        _log.info("turn %d: the plan's loss is %.4f", turn, here)
        best = min(best, (here, curves), key=lambda pair: pair[0])
        if turn == turns:
            break

        def other(name: str, width: int, widths: dict[str, int] = widths) -> dict[str, int]:
            return changed(graph, tied[name], widths, width)

        def difference(
            name: str, width: int, other: Callable[[str, int], dict[str, int]] = other, here: float = here
        ) -> float:
            return loss.at(other(name, width)) - here

        def told(done: int, total: int, turn: int = turn) -> None:
            progress(turn * total + done, turns * total)

        every = (other(change.group, change.width) for change in changes(choices, candidates, widths))
        loss.measure_beside(widths, every, told)
        curves = corrected(curves, choices, candidates, widths, difference)
    return best[1]


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
        key = self._key(widths)
        if key not in self._known:
            from edgeprune.criteria.batch_statistics import by_batch
            from edgeprune.tasks.batches import call

            module, inputs = self._model_of(self._plan(widths)), [one for one, _ in self._every()]
            with by_batch(module):
                self._known[key] = self._weighted(lambda number: call(module, inputs[number]))
        return self._known[key]

    def measure_beside(
        self, widths: Widths, others: Iterable[Widths], progress: Callable[[int, int], None] | None = None
    ) -> None:
        """Measure the losses at many widths that are some but for a group or two; `at` knows them afterwards.

        They are the same to the last bit as measured one by one. What lies before the first difference is computed once.

        Args:
            widths: Of all groups.
            others: The same, changed.
            progress: Called with (measured, in all).

        Raises:
            SurgeryError: As `at`.
        """
        from edgeprune.criteria.batch_statistics import by_batch
        from edgeprune.criteria.common_prefix import models_beside

        plans = {self._key(one): self._plan(one) for one in others}
        wanted = {key: plan for key, plan in plans.items() if key not in self._known}
        own = self._plan(widths)
        if own.program is None or any(plan.program is None for plan in wanted.values()):
            # Its model cannot be made; that is said as ever.
            for plan in (own, *wanted.values()):
                self._model_of(plan)
        models = models_beside(own, wanted, self._model_of, [inputs for inputs, _ in self._every()], by_batch)
        for done, (key, outputs) in enumerate(models):
            self._known[key] = self._weighted(outputs)
            if progress is not None:
                progress(done + 1, len(wanted))

    def _key(self, widths: Widths) -> tuple[int, ...]:
        return tuple(widths[group.name] for group in self._graph.groups)

    def _plan(self, widths: Widths) -> PruningPlan:
        kept: dict[str, Any] = {name: () for name, width in widths.items() if width == 0}
        kept |= {
            name: best_units(values, widths[name])
            for name, values in self._scores.items()
            if widths[name] < len(values)
        }
        return make_plan(self._graph, kept, allow_empty=True)

    def _model_of(self, plan: PruningPlan) -> ProgramModule:
        from edgeprune.surgery.cutting import cut_program

        return cut_program(self._model, plan).eval()

    def _every(self) -> Iterator[tuple[Any, Any]]:
        """The batches of all objectives, one behind the other."""
        return itertools.chain.from_iterable(self._batches)

    def _weighted(self, outputs: Callable[[int], Any]) -> float:
        """The weighted loss, from what a model returns for a batch by its number."""
        import torch

        from edgeprune.tasks.batches import loss_of

        total, number = 0.0, 0
        with torch.no_grad():
            for objective, own in zip(self._task.objectives, self._batches, strict=True):
                losses = []
                for _, targets in own:
                    losses.append(float(loss_of(objective, outputs(number), targets)))
                    number += 1
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
    """
    found = {name: curve.copy() for name, curve in curves.items()}
    tied = {choice.groups[0]: choice.groups for choice in choices}
    for change in changes(choices, candidates, widths):
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
