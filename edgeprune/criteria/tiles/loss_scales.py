"""Estimated damage of tiles on the scale of the loss, where the damage of channels is measured too: so that both compare."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from edgeprune.criteria.tiles.curves import TileCurve
from edgeprune.criteria.tiles.measuring import KEPT, line_through, without_tiles
from edgeprune.criteria.tiles.sums import Floats, tiled_weights
from edgeprune.tasks.batches import call, device_of, labeled_batches, loss_of, mode

if TYPE_CHECKING:
    from torch import nn

    from edgeprune.tasks.task import Task

_LEAST_SLOPE = 1e-3
"""Of the median slope: what harmless removals cost, so that the order of points stays."""


@dataclass(frozen=True)
class LossScale:
    """Estimated damage of one layer to increase of the loss: straight lines through the origin and what was measured.

    Attributes:
        at: Estimates, ascending from 0.
        wanted: Increases of the loss there, never falling.
        slope: What is added per estimate.
    """

    at: Floats
    wanted: Floats
    slope: float = 0.0

    def __call__(self, estimate: Floats) -> Floats:
        """The increase of the loss at estimates of any shape; behind the last point the line goes on in proportion."""
        if len(self.at) < 2:
            return self.slope * estimate
        return line_through(estimate, self.at, self.wanted) + _LEAST_SLOPE * self.slope * estimate


def loss_scales(
    model: nn.Module,
    curves: Mapping[str, TileCurve],
    task: Task,
    *,
    kept: Sequence[float] = KEPT,
    batches: int = 4,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, LossScale]:
    """Measure the loss with the worst tiles of one layer at zero, at a few numbers of kept tiles, all other layers whole.

    Costs (layers * shares + 1) forward passes over the batches. An increase below 0 counts as 0; a layer whose estimate is 0
    throughout has the median scale of the others.

    Args:
        model: The dense model; on return it is as it was.
        curves: Of `edgeprune.criteria.tiles.curves`.
        task: Training batches and losses; objectives count by their weight.
        kept: Shares of the tiles that are kept at the measured points, each in [0, 1).
        batches: Most batches of each objective; all of them are in memory together.
        progress: Called with (measured, in all).

    Raises:
        ModelError: A weight is not in the model.
        TaskError: The task cannot be used.
    """
    weights = tiled_weights(model, {name: curve.grid for name, curve in curves.items()})
    data = [(one, list(labeled_batches(one, "train", device_of(model), batches))) for one in task.objectives]

    def loss() -> float:
        found = [
            (one.weight, [float(loss_of(one, call(model, inputs), targets)) for inputs, targets in read])
            for one, read in data
        ]
        return sum(weight * float(np.mean(values)) for weight, values in found)

    lines: dict[str, tuple[Floats, Floats]] = {}
    with mode(model, training=False), torch.no_grad():
        dense = loss()
        for done, (name, curve) in enumerate(curves.items()):
            points = {}
            for count in {curve.kept_at(1.0 - share) for share in kept}:
                if curve.estimate[count] > 0:
                    with without_tiles(weights[name], curve, count):
                        points[float(curve.estimate[count])] = max(0.0, loss() - dense)
            at = np.array([0.0, *sorted(points)])
            lines[name] = at, np.maximum.accumulate([0.0, *(points[one] for one in sorted(points))])
            if progress is not None:
                progress(done + 1, len(curves))
    slopes = [float(wanted[-1] / at[-1]) for at, wanted in lines.values() if len(at) > 1]
    median = float(np.median(slopes) or max(slopes) or 1.0) if slopes else 1.0
    return {name: LossScale(at, wanted, median) for name, (at, wanted) in lines.items()}
