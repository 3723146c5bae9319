"""What each objective's limit leaves: bounds on losses, worst acceptable metrics, and how far a cut is within them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edgeprune.loop.multitask.metric_bounds import loss_bound
from edgeprune.tasks.limits import Tolerance
from edgeprune.tasks.task import Objective, Task

_ENDLESS = 1e6
"""What is used of a limit that allows nothing; a number that JSON has."""
_SMALL = 1e-6
"""Added to losses before they are divided where no limit says on which scale they lie."""

Losses = Mapping[str, float]
Metrics = Mapping[str, float]


@dataclass
class _Room:
    """Of one objective: largest loss, what is added before losses are divided, and what its loss may grow by."""

    bound: float
    epsilon: float
    size: float


class Rooms:
    """The rooms of all objectives of a task.

    Args:
        task: With limits.
        validation: Metric of the dense model by objective on the validation data, which limits that are values refer to.
        dense: The same on the data on which commits are checked.
        epsilon: Added to losses before they are divided, as a share of what they may grow by.

    Raises:
        TaskError: The dense model does not keep a limit on the validation data.
    """

    def __init__(self, task: Task, validation: Metrics, dense: Metrics, epsilon: float) -> None:
        task.require_kept_by(validation)
        self._limited = {one.name: one for one in task.objectives if one.limit is not None}
        self._validation, self._dense, self._epsilon = dict(validation), dict(dense), epsilon
        self._worst = {name: self._worst_at(one, dense[name]) for name, one in self._limited.items()}
        self._of_pairs: dict[str, float] = {}
        self._rooms: dict[str, _Room] = {}

    @property
    def limited(self) -> bool:
        """Whether an objective has a limit."""
        return bool(self._limited)

    def fit(self, losses: Losses, pairs: Sequence[tuple[Losses, Metrics]]) -> None:
        """Find the loss that each limit allows.

        Args:
            losses: Of the model as it is.
            pairs: Losses and metrics on the same data: of the model as it is, then of ones that are cut more and more. The
                first time it is the dense model.
        """
        self._refer(pairs[0][1])
        for name, one in self._limited.items():
            seen = [(found[name], metrics[name]) for found, metrics in pairs]
            bound = loss_bound(seen[1:], seen[0], self._of_pairs[name], higher_is_better=one.higher_is_better)
            size = max(0.0, bound - losses[name])
            self._rooms[name] = _Room(bound, self._epsilon * size, size)

    def multiply(self, losses: Losses) -> None:
        """No bound on any loss: only how much it may be multiplied by counts."""
        self._rooms = {name: _Room(math.inf, _SMALL, loss + _SMALL) for name, loss in losses.items()}

    def totals(self, losses: Losses) -> dict[str, float]:
        """What the loss of each objective may be multiplied by."""
        return {
            name: (room.bound + room.epsilon) / (losses[name] + room.epsilon) if room.size > 0 else 1.0
            for name, room in self._rooms.items()
        }

    def ratios(self, losses: Losses, base: Losses) -> dict[str, float]:
        """Losses over others."""
        return {
            name: 1.0 if losses[name] == base[name] else _over(losses[name] + room.epsilon, base[name] + room.epsilon)
            for name, room in self._rooms.items()
        }

    def bounds(self) -> dict[str, float]:
        """The largest loss that each limit allows, by the fit."""
        return {name: room.bound for name, room in self._rooms.items()}

    def used(self, metrics: Metrics) -> dict[str, float]:
        """How much of what its limit allows each metric has become worse, on the data of commits; above 1 it is broken."""
        found = {}
        for name, one in self._limited.items():
            sign = -1.0 if one.higher_is_better else 1.0
            worse = max(0.0, sign * (metrics[name] - self._dense[name]))
            found[name] = worse and min(_ENDLESS, _over(worse, sign * (self._worst[name] - self._dense[name])))
        return found

    def most(self, base: Losses, tolerated: Losses) -> dict[str, float]:
        """The largest loss of each objective that is within its bound and, over others, within what is tolerated."""
        return {
            name: min(room.bound, tolerated[name] * (base[name] + room.epsilon) - room.epsilon)
            for name, room in self._rooms.items()
        }

    def allows(self, name: str, loss: float) -> bool:
        """Whether a loss is within the bound of its objective."""
        return loss <= self._rooms[name].bound

    def tighten(self, name: str, loss: float) -> None:
        """A loss was seen that the limit does not allow, whatever the fit said."""
        if name in self._rooms:
            self._rooms[name].bound = min(self._rooms[name].bound, math.nextafter(loss, -math.inf))

    def increase(self, before: Losses, after: Losses) -> float:
        """What losses grew by, each as a share of what it may grow by, added up."""
        grown = {name: max(0.0, after[name] - before[name]) for name in self._rooms}
        return sum(value and _over(value, self._rooms[name].size) for name, value in grown.items())

    def broken(self, metrics: Metrics) -> list[str]:
        """The objectives whose limits are not kept, by the metrics of a commit."""
        return [name for name in self._limited if not self._keeps(name, metrics[name], self._worst[name])]

    def all_broken(self, metrics: Metrics, dense: Metrics) -> bool:
        """Whether no limit is kept any more, by metrics on the data of `fit`.

        Args:
            metrics: Of the cut model.
            dense: Of the dense model there; that of the first time counts.
        """
        self._refer(dense)
        return all(not self._keeps(name, metrics[name], worst) for name, worst in self._of_pairs.items())

    def _refer(self, dense: Metrics) -> None:
        if not self._of_pairs:
            self._of_pairs = {name: self._worst_at(one, dense[name]) for name, one in self._limited.items()}

    def needed(self, name: str, metric: float, room: float = 1.0) -> str:
        """The limit that a metric would keep, as text, some times as wide where there should be room."""
        dense = self._dense[name]
        drop = room * abs(dense - metric)
        return f"{math.ceil(100 * drop / abs(dense) - 1e-9)}%" if dense else f"{math.ceil(100 * drop)}pp"

    def _keeps(self, name: str, value: float, worst: float) -> bool:
        return value >= worst if self._limited[name].higher_is_better else value <= worst

    def _worst_at(self, one: Objective, dense: float) -> float:
        """The worst acceptable metric on some data.

        Args:
            one: The objective.
            dense: Metric of the dense model there.
        """
        if isinstance(one.limit, Tolerance):
            return one.limit.worst(dense, one.higher_is_better, one.name)
        value = one.worst()
        assert value is not None
        # As far from the dense model as on the validation data.
        drop = abs(self._validation[one.name] - value)
        return dense - drop if one.higher_is_better else dense + drop


def _over(value: float, base: float) -> float:
    return value / base if base > 0 else math.inf
