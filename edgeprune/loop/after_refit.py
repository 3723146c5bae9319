"""What whole blocks are worth where layers are refitted by least squares afterwards: found by refitting a few plans.

A refit repairs the loss of a whole block better than that of channels, and damage curves, which are measured without one, do
not know it. How much better is about one number for a model and a budget, so plans are made with the removal of blocks at
several shares of its damage, each is cut and refitted, and the one with the least loss counts.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgeprune.criteria.damage import DamageCurves
from edgeprune.errors import BudgetInfeasibleError, ReconstructionError
from edgeprune.loop.in_context import PlanLoss

if TYPE_CHECKING:
    from edgeprune.loop.planning import Planner
    from edgeprune.surgery.plan import PruningPlan

SHARES = (1.0, 0.5, 0.25, 0.1, 0.03)
"""Of the damage of removing a block, at which plans are made; the first leaves the curves as they are."""
BATCHES, READ = 4, 16
"""Training batches per objective that the loss is measured on: the last of so many, since a refit reads the first ones."""

_log = logging.getLogger("edgeprune.loop")


class RefittedLoss(PlanLoss):
    """Loss of cut models after a refit of their layers (`edgeprune.recovery.reconstruction`), on training batches.

    Args:
        planner: With a task.
        example_inputs: Tensor, tuple or dict, as the model was traced with.
    """

    def __init__(self, planner: Planner, example_inputs: Any) -> None:
        from edgeprune.tasks.batches import device_of, labeled_batches

        assert planner.task is not None
        super().__init__(planner.model, planner.graph, planner.scores, planner.task, batches=1)
        device = device_of(planner.model)
        self._batches = [
            list(deque(labeled_batches(one, "train", device, READ), BATCHES)) for one in planner.task.objectives
        ]
        self._example_inputs = example_inputs

    def at(self, widths: Mapping[str, int]) -> float:
        """The weighted loss at some widths of all groups; a group of a removed branch has 0.

        Raises:
            ReconstructionError: The model cannot be refitted.
        """
        key = self._key(widths)
        if key not in self._known:
            self._known[key] = self._after_refit(self._plan(widths))
        return self._known[key]

    def _after_refit(self, plan: PruningPlan) -> float:
        from edgeprune.recovery.reconstruction import reconstruct
        from edgeprune.surgery.cutting import apply
        from edgeprune.tasks.batches import call, mode

        module, graph = apply(self._model, plan), self._graph
        reconstruct(module, graph, plan, self._example_inputs, self._task.objectives[0].train)
        inputs = [one for one, _ in self._every()]
        with mode(module, training=False):
            return self._weighted(lambda number: call(module, inputs[number]))


def refitted_curves(
    planner: Planner, budget_ms: float, example_inputs: Any, progress: Callable[[int, int], None]
) -> DamageCurves | None:
    """Damage curves by which the plan for a budget has the least loss after a refit, of all that were tried.

    Args:
        planner: With a task. It stays as it is.
        budget_ms: Predicted latency that plans must stay below, milliseconds.
        example_inputs: Tensor, tuple or dict, as the model was traced with.
        progress: Called with (tried, in all).

    Returns:
        The curves; None where the budget is out of reach, or the model cannot be refitted.

    Raises:
        TaskError: The task cannot be used.
    """
    leads = {branch.lead for branch in planner.graph.branches if planner.rules[branch.lead].removable}
    loss = RefittedLoss(planner, example_inputs)
    best: tuple[float, DamageCurves] | None = None
    for place, share in enumerate(SHARES):
        curves = {name: _at_share(curve, share) if name in leads else curve for name, curve in planner.damage.items()}
        try:
            widths = planner.widths_within(curves, budget_ms)
            here = loss.at(widths)
        except (BudgetInfeasibleError, ReconstructionError) as error:
            _log.info("damage stays as it was measured without a refit: %s", error.message)
            return None
        gone = sum(widths[name] == 0 for name in leads)
        _log.info("blocks at %g of their damage: %d go, the loss of the refitted plan is %.4f", share, gone, here)
        if best is None or here < best[0]:
            best = here, curves
        progress(place + 1, len(SHARES))
    return None if best is None else best[1]


def _at_share(curve: npt.NDArray[np.float64], share: float) -> npt.NDArray[np.float64]:
    found: npt.NDArray[np.float64] = curve.copy()
    found[0] *= share
    return found
