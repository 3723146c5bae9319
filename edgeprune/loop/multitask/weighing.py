"""The search of `edgeprune.loop.multitask.per_task`: damage per objective, what each limit allows of it, plans, and checks."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgeprune.allocation._base import Allocation, rounded_up_ms
from edgeprune.allocation.exact import Exact
from edgeprune.allocation.per_objective import BoundedDamages, ObjectiveDamage, PerObjective
from edgeprune.criteria.damage import DamageCurves, best_units, damage_curves
from edgeprune.errors import BudgetInfeasibleError
from edgeprune.loop.multitask.calibration_data import CalibrationData
from edgeprune.loop.multitask.journal import Journal, identity_of_search
from edgeprune.loop.multitask.layers import evenly_cut
from edgeprune.loop.multitask.looking import Looking
from edgeprune.loop.multitask.rooms import Rooms
from edgeprune.loop.searched import Searched
from edgeprune.recovery.evaluation import RecoveryRecord, evaluate
from edgeprune.recovery.generators import Generators
from edgeprune.tasks.batches import device_of
from edgeprune.tasks.task import Objective, Task

if TYPE_CHECKING:
    from edgeprune.loop.multitask.per_task import PerTask
    from edgeprune.loop.planning import Planner, Progress, Proposal

_LEAST_SCALE = 1e-3
"""Of the largest damage that was seen: a limit that allows nothing must not make every damage infinitely large."""
_MOST = 4.0
"""What one plan's metrics say of a scale changes it by at most this factor."""
_ROOM = 1.1
"""How many times as wide as a plan needs them limits are said to do."""

_log = logging.getLogger("edgeprune.loop")


@dataclass(frozen=True)
class _Plan:
    """Widths that were looked at.

    Attributes:
        ready: What made them.
        allocation: The widths.
        metrics: By objective, on the data of the check.
        used: How much of its limit each limited objective uses; above 1 it is broken.
    """

    ready: BoundedDamages
    allocation: Allocation
    metrics: Mapping[str, float]
    used: Mapping[str, float]

    @property
    def worst(self) -> float:
        return max(self.used.values())


class Weighing:
    """One search.

    Args:
        settings: How.
        planner: Of the dense model, with a task.
        seed: Of the order in which a loader shuffles.
        checkpoint: Folder for what an interrupted search goes on from.
        progress: Called with (step, done, in all).

    Raises:
        TaskError: The task cannot be used.
    """

    def __init__(
        self, settings: PerTask, planner: Planner, *, seed: int, checkpoint: Path | None, progress: Progress | None
    ) -> None:
        assert planner.task is not None
        self.settings, self.planner, self.task, self.progress = settings, planner, planner.task, progress
        self.graph = planner.graph
        self.choices = [choice for choice in planner.cost.choices if not choice.frozen]
        data = CalibrationData(
            self.task, device_of(planner.model), settings.batches, settings.metric_batches, seed=seed
        )
        generators = Generators.of(self.task, device_of(planner.model))
        self.journal = Journal(checkpoint, identity_of_search(settings, planner), generators)
        self.looking = Looking(planner.model, self.graph, data, batch_statistics=True, journal=self.journal)
        self.names = [one.name for one in self.task.objectives]
        self.limited = {one.name for one in self.task.objectives if one.limit is not None}
        self.history: list[dict[str, Any]] = []

    def run(self, proposal: Proposal) -> Searched:
        """See `PerTask.search`."""
        validation = evaluate(self.planner.model, self.task)
        self.ranking, self.curves = self._damage()
        dense = self.looking.metrics(self._kept(self.graph.widths()))
        self.rooms = Rooms(self.task, validation, dense, 0.0)
        scales = self._scales()
        aim_ms = proposal.aim_ms
        ready = self._allocator(scales).prepare(
            self.graph.groups, {}, self.planner.cost, self.planner.rules, self.planner.limits
        )
        best: _Plan | None = None
        seen: list[dict[str, int]] = []
        for turn in range(self.settings.corrections + 1):
            if turn:
                ready = ready.otherwise(self._allocator(scales))
            plan = self._planned(ready, scales, aim_ms)
            better = best is None or plan.worst < best.worst
            best = plan if better else best
            self._tell("weighing objectives", turn + 1, self.settings.corrections + 1)
            if plan.allocation.widths in seen or (self.settings.hold and plan.worst <= 1):
                break
            seen.append(plan.allocation.widths)
            scales = self._corrected(scales, plan)
        assert best is not None
        if self.settings.hold and best.worst > 1:
            raise self._infeasible(best, scales, aim_ms)
        return self._found(best, aim_ms, validation)

    def _damage(self) -> tuple[dict[str, npt.NDArray[np.float64]], dict[str, DamageCurves]]:
        """By which scores units are kept, and the damage by width per objective."""
        planner, criterion = self.planner, self.planner.criterion
        movable = [name for choice in self.choices for name in choice.groups]
        each = {}
        for done, one in enumerate(self.task.objectives):
            self._tell("scoring per objective", done, len(self.names))

            def score(one: Objective = one) -> dict[str, list[float]]:
                found = criterion.score(self.graph, planner.model, Task((one,)), groups=movable)
                return {group: [float(value) for value in values] for group, values in found.items()}

            found = self.journal.recall(["scores", one.name], score, draws=True)
            each[one.name] = {group: np.array(values, dtype=np.float64) for group, values in found.items()}
        self._tell("scoring per objective", len(self.names), len(self.names))
        # A loss that is measured in small numbers counts as much as another.
        totals = {name: sum(float(values.sum()) for values in scores.values()) or 1.0 for name, scores in each.items()}
        ranking = {
            group: np.sum([each[name][group] / totals[name] for name in self.names], axis=0) for group in movable
        }
        curves = {name: damage_curves(scores, criterion.normalization, ranking) for name, scores in each.items()}
        calibration = planner.calibrate_damage or self.settings.calibration
        if calibration is None:
            return ranking, curves

        def progress(done: int, total: int) -> None:
            self._tell("calibrating damage per objective", done, total)

        calibrated = calibration.calibrate_each(
            curves, ranking, self.graph, planner.model, self.task, recall=self.journal.recall, progress=progress
        )
        return ranking, {name: one.curves for name, one in calibrated.items()}

    def _scales(self) -> dict[str, float]:
        """The damage of each objective that counts as 1: that which its limit allows, where all layers are cut evenly."""
        pairs = list[tuple[dict[str, float], dict[str, float]]]()
        for widths in evenly_cut(self.choices, self.graph.widths()):
            metrics = self.looking.first_metrics(self._kept(widths))
            pairs.append((self._damages(widths), metrics))
            if self.rooms.all_broken(metrics, pairs[0][1]):
                break
        self.rooms.fit(dict.fromkeys(self.names, 0.0), pairs)
        bounds = self.rooms.bounds()
        most = {name: max(damages[name] for damages, _ in pairs) for name in self.names}
        # What has no limit counts in the mean, by what it loses where the others are at theirs.
        return {name: max(bounds.get(name, most[name]), _LEAST_SCALE * most[name]) or 1.0 for name in self.names}

    def _allocator(self, scales: Mapping[str, float], *, bounded: bool = False) -> PerObjective:
        weights = {one.name: one.weight for one in self.task.objectives}
        solver = self.planner.allocator
        assert isinstance(solver, Exact)
        return PerObjective(
            [
                ObjectiveDamage(
                    name,
                    self.curves[name],
                    scales[name],
                    scales[name] if bounded and name in self.limited else math.inf,
                    worst=name in self.limited,
                    weight=weights[name],
                )
                for name in self.names
            ],
            self.settings.mean_share,
            solver,
        )

    def _planned(self, ready: BoundedDamages, scales: Mapping[str, float], aim_ms: float) -> _Plan:
        """The plan for some scales; where limits must hold, under them if that is possible."""
        if self.settings.hold:
            bounded = ready.otherwise(self._allocator(scales, bounded=True))
            try:
                return self._checked(bounded, bounded.within(aim_ms))
            except BudgetInfeasibleError as error:
                # By the curves; what it comes to is another matter, so the least that can be lost is looked at.
                _log.info("under the limits as the curves have them: %s", error.message)
        return self._checked(ready, ready.within(aim_ms))

    def _checked(self, ready: BoundedDamages, allocation: Allocation) -> _Plan:
        metrics = self.looking.metrics(self._kept(allocation.widths))
        plan = _Plan(ready, allocation, metrics, self.rooms.used(metrics))
        self.history.append(
            {
                "widths": dict(allocation.widths),
                "predicted_ms": allocation.certificate.predicted_ms,
                "damage": self._damages(allocation.widths),
                "used": dict(plan.used),
            }
        )
        _log.info("%.4g ms, of their limits objectives use %s", allocation.certificate.predicted_ms, dict(plan.used))
        return plan

    def _corrected(self, scales: Mapping[str, float], plan: _Plan) -> dict[str, float]:
        """Scales at which the plan's damages would have said what its metrics did; half of the way, in the logarithm."""
        damages, found = self._damages(plan.allocation.widths), dict(scales)
        for name, used in plan.used.items():
            said = damages[name] / scales[name]
            if said > 0:
                factor = float(np.clip(said / used if used > 0 else _MOST, 1 / _MOST, _MOST))
                found[name] = scales[name] * math.sqrt(factor)
        return found

    def _infeasible(self, best: _Plan, scales: dict[str, float], aim_ms: float) -> BudgetInfeasibleError:
        """That limits and latency cannot hold together: what can, and who is in the way."""
        ready = best.ready.otherwise(self._allocator(scales, bounded=True))
        dense = self.graph.widths()
        widths, best_ms, binding = dense, self.planner.cost.ms(dense), ready.binding()
        for _ in range(self.settings.corrections + 1):
            fastest = ready.fastest_bounded()
            if fastest is None or fastest[1] >= best_ms:
                break
            metrics = self.looking.metrics(self._kept(fastest[0]))
            used = self.rooms.used(metrics)
            if max(used.values()) <= 1:
                widths, best_ms = dict(fastest[0]), fastest[1]
                break
            # All the way: what is said must have been seen to hold.
            damages = self._damages(fastest[0])
            scales |= {name: min(scales[name], 0.95 * damages[name] / part) for name, part in used.items() if part > 1}
            ready = ready.otherwise(self._allocator(scales, bounded=True))
            binding = ready.binding() or binding
        binding = binding or max(best.used, key=lambda name: best.used[name])
        broken = [name for name, part in best.used.items() if part > 1]
        # At other limits a search comes by other plans, of which the best may be somewhat worse than this one.
        needed = {name: self.rooms.needed(name, best.metrics[name], _ROOM) for name in broken}
        would_do = " ".join(f"--limit {name}={limit}" for name, limit in needed.items())
        asked = ", ".join(f"{one.name}={one.limit}" for one in self.task.objectives if one.limit is not None)
        return BudgetInfeasibleError(
            f"latency must be <= {aim_ms:.4g} ms, the smallest plan found that keeps the limits ({asked}) before tuning takes "
            f"{best_ms:.4g} ms; {binding} holds it up.",
            best_ms=best_ms,
            widths=widths,
            # A plan aims somewhat below its budget.
            hint=f"--latency {rounded_up_ms(1.03 * best_ms)}ms, or {would_do}, or limits that need not hold before tuning",
        )

    def _found(self, plan: _Plan, aim_ms: float, validation: dict[str, float]) -> Searched:
        planner = self.planner.rescored(self.planner.model, self.ranking, criterion=self.planner.criterion)
        planner = planner.allocating(plan.ready.allocator, plan.ready)
        proposal = planner.proposal(plan.allocation, aim_ms)
        details = {
            "calibrated": (self.planner.calibrate_damage or self.settings.calibration) is not None,
            "damage": self._damages(plan.allocation.widths),
            "used": dict(plan.used),
            "plans": self.history,
        }
        after = evaluate(self.looking.cut(self._kept(plan.allocation.widths)), self.task)
        record = RecoveryRecord("per_task", validation, after, details)
        parts = ", ".join(f"{name} {part:.0%}" for name, part in plan.used.items())
        beyond = [
            f"{name}={self.rooms.needed(name, plan.metrics[name])}" for name, part in plan.used.items() if part > 1
        ]
        note = f"A damage curve per objective: of what the limits allow, before tuning, {parts} is used."
        if beyond:
            note += f" Without tuning these limits would do: {', '.join(beyond)}."
        return Searched(planner, proposal, record, (note,))

    def _damages(self, widths: Mapping[str, int]) -> dict[str, float]:
        return {
            name: sum(float(curve[widths[group]]) for group, curve in self.curves[name].items()) for name in self.names
        }

    def _kept(self, widths: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        return {
            name: best_units(self.ranking[name], width) if name in self.ranking else tuple(range(width))
            for name, width in widths.items()
        }

    def _tell(self, step: str, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(step, done, total)
