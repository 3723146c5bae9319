"""What a candidate costs: multiply-accumulates that are counted, or milliseconds that a predictor gives the whole network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from edgeprune.allocation.choices import Choice
from edgeprune.allocation.cost import CostModel
from edgeprune.allocation.resources import MultiplyAccumulates
from edgeprune.allocation.tiles.options import thinned
from edgeprune.criteria.tiles.sums import Floats
from edgeprune.graph.branches import emptied

if TYPE_CHECKING:
    from edgeprune.latency.predictor import Predictor
    from edgeprune.lowering.kernel_graph import KernelGraph
    from edgeprune.surgery.constraints import WidthRule
    from edgeprune.surgery.plan import PruningPlan

MOST_WIDTHS = 16
"""Widths of one choice that are considered."""

Widths = Mapping[str, int]


class Prices(Protocol):
    """Costs of candidates, in one unit.

    Attributes:
        unit: For messages.
        most_points: So many numbers of tiles are priced per set of widths.
        dense: What the dense model costs.
        exact: Whether the cost of a plan is the sum of what its sections cost.
    """

    unit: str
    most_points: int
    dense: float
    exact: bool

    def candidates(self, choice: Choice) -> tuple[int, ...]:
        """Widths worth considering, descending, the full size first, without 0."""

    def narrow(self, many: Sequence[Widths]) -> Floats:
        """The model at each of these widths, all tiles there; groups left out are dense."""

    def tiled(self, plan: PruningPlan, widths: Widths, removed: float) -> float:
        """The model cut by a plan.

        Args:
            plan: With tiles.
            widths: Of the plan.
            removed: Multiply-accumulates that go with its tiles, beyond what the widths take.
        """


class Counted:
    """Multiply-accumulates of the whole model, attention and classifier included.

    Args:
        kernel_graph: The lowered dense model.
    """

    unit = "multiply-accumulates"
    most_points = 256
    exact = True

    def __init__(self, kernel_graph: KernelGraph) -> None:
        self._count = MultiplyAccumulates(kernel_graph)
        self._branches = kernel_graph.graph.branches
        self.dense = self._count.value({})

    def candidates(self, choice: Choice) -> tuple[int, ...]:
        """See `Prices.candidates`: multiples of a power of two, which runtimes like, and both ends."""
        widths, step = choice.allowed, 1
        while len(widths) > MOST_WIDTHS:
            step *= 2
            ends = (choice.allowed[0], choice.allowed[-1])
            widths = tuple(width for width in choice.allowed if width % step == 0 or width in ends)
        return widths

    def narrow(self, many: Sequence[Widths]) -> Floats:
        """See `Prices.narrow`."""
        return np.array([self._count.value(emptied(self._branches, widths)) for widths in many])

    def tiled(self, plan: PruningPlan, widths: Widths, removed: float) -> float:
        """See `Prices.tiled`; the plan is not looked at."""
        del plan
        return float(self.narrow([widths])[0]) - removed


class Timed:
    """Predicted milliseconds of the whole model.

    Args:
        kernel_graph: The lowered dense model.
        predictor: Of the device.
        rules: What widths must respect.
    """

    unit = "ms"
    most_points = 6
    exact = False

    def __init__(self, kernel_graph: KernelGraph, predictor: Predictor, rules: Mapping[str, WidthRule]) -> None:
        self.kernel_graph, self.predictor = kernel_graph, predictor
        self._cost = CostModel(kernel_graph, predictor, rules=rules)
        self.dense = predictor.network_ms(kernel_graph.at({}))

    def candidates(self, choice: Choice) -> tuple[int, ...]:
        """See `Prices.candidates`: the edges of the predicted staircase."""
        return _thinned(tuple(width for width in choice.candidates(self._cost) if width))

    def narrow(self, many: Sequence[Widths]) -> Floats:
        """See `Prices.narrow`."""
        return np.array([self.predictor.network_ms(self._cost.kernels(widths)) for widths in many])

    def tiled(self, plan: PruningPlan, widths: Widths, removed: float) -> float:
        """See `Prices.tiled`: a plan takes what its kernels are predicted to."""
        del widths, removed
        return self.predictor.network_ms(self.kernel_graph.of_plan(plan))


def _thinned(widths: tuple[int, ...]) -> tuple[int, ...]:
    ascending = np.array(widths[::-1], dtype=np.float64)
    return tuple(int(ascending[at]) for at in thinned(ascending, MOST_WIDTHS)[::-1])
