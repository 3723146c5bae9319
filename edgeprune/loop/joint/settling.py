"""Damage as it is beside a plan: what was estimated one section at a time is measured with all others as the plan has them.

Estimates add up; networks do not. Tiles that are harmless alone may not be beside narrow layers. So the chosen plan's sections
are given back one by one, what that changes corrects the estimates, and the search runs again; of all plans the one with the
least measured loss is taken, and widths alone are among them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from edgeprune.errors import BudgetInfeasibleError
from edgeprune.surgery.cutting import apply
from edgeprune.tasks.batches import call, device_of, labeled_batches, loss_of, mode

if TYPE_CHECKING:
    from torch import nn

    from edgeprune.loop.joint.candidates import Option
    from edgeprune.loop.joint.searching import Found, JointSearch
    from edgeprune.loop.planning import Progress
    from edgeprune.surgery.plan import PruningPlan
    from edgeprune.tasks.task import Task

_FACTORS = (0.1, 100.0)
"""What a measurement may make of an estimate."""

_log = logging.getLogger("edgeprune.loop")


class CutLoss:
    """Mean training loss of a model cut by plans, on the same batches.

    Args:
        model: The dense model.
        task: Data and losses; objectives count by their weight.
        batches: Most batches of each objective, kept in memory.
    """

    def __init__(self, model: nn.Module, task: Task, batches: int) -> None:
        self._model = model
        self._data = [(one, list(labeled_batches(one, "train", device_of(model), batches))) for one in task.objectives]
        self._seen: dict[str, float] = {}

    def of(self, plan: PruningPlan) -> float:
        """The loss with a plan applied and nothing tuned; that of the dense model where it removes nothing."""
        if plan.hash not in self._seen:
            empty = not (plan.kept or plan.kept_tiles or plan.removed)
            module = self._model if empty else apply(self._model, plan)
            total = 0.0
            with mode(module, training=False), torch.no_grad():
                for one, read in self._data:
                    losses = [float(loss_of(one, call(module, inputs), targets)) for inputs, targets in read]
                    total += one.weight * float(np.mean(losses))
            self._seen[plan.hash] = total
        return self._seen[plan.hash]


def settled(
    search: JointSearch, budget: float, loss: CutLoss, *, turns: int, progress: Progress | None = None
) -> tuple[Found, float]:
    """The plan with the least measured loss of those that were found within a budget, and that loss.

    Costs (4 * sections + 2) losses per turn at most.

    Args:
        search: With estimated damages.
        budget: In the unit of its prices.
        loss: Measures plans.
        turns: How often damages are corrected at most; 0 only compares with widths alone.
        progress: Told the sections done.

    Raises:
        BudgetInfeasibleError: No plan is within it.
    """
    current = search.within(budget)
    best = (loss.of(current.plan), current)
    if any(option.tiles for option in current.options):
        try:
            narrow = search.without_tiles().within(budget)
        except BudgetInfeasibleError:
            pass
        else:
            best = min(best, (loss.of(narrow.plan), narrow), key=lambda pair: pair[0])
    seen = [current.options]
    for turn in range(turns):

        def told(done: int, total: int, turn: int = turn) -> None:
            if progress is not None:
                progress("measuring damage beside the plan", turn * total + done, turns * total)

        search = search.rescaled(_corrected(search, current.options, loss, told))
        current = search.within(budget)
        if current.options in seen:
            break
        seen.append(current.options)
        here = loss.of(current.plan)
        _log.info("turn %d: the plan's loss is %.4f, the best one's %.4f", turn, here, best[0])
        best = min(best, (here, current), key=lambda pair: pair[0])
    return best[1], best[0]


def _corrected(
    search: JointSearch, options: Sequence[Option], loss: CutLoss, told: Callable[[int, int], None]
) -> list[tuple[float, float]]:
    """Factors of each section: what its widths and its tiles cost beside the plan, or alone where that is more."""
    candidates = search.candidates
    dense = [next(one for one in some if one.narrowing == 0 and not one.tiles) for some in search.options]
    here, untouched = loss.of(candidates.plan(options)), loss.of(candidates.plan(dense))
    found = []
    for place, option in enumerate(options):
        told(place, len(options))
        narrow = replace(option, tiles={}, tiling=0.0)

        def beside(one: Option, place: int = place) -> float:
            return loss.of(candidates.plan([*options[:place], one, *options[place + 1 :]]))

        def alone(one: Option, place: int = place) -> float:
            return loss.of(candidates.plan([*dense[:place], one, *dense[place + 1 :]]))

        wide, tiled = search.factors[place]
        if option.narrowing > 0:
            measured = max(beside(narrow) - beside(dense[place]), alone(narrow) - untouched)
            wide = float(np.clip(measured / option.narrowing, *_FACTORS))
        if option.tiling > 0:
            measured = max(here - beside(narrow), alone(option) - alone(narrow))
            tiled = float(np.clip(measured / option.tiling, *_FACTORS))
        found.append((wide, tiled))
    return found
