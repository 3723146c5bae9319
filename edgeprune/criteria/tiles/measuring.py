"""Damage curves put on the scale of what happens: the outputs' change, measured with some tiles of one layer gone.

Gradients say what small changes do. Where half of a layer goes, and layers differ in how soon their estimate fails, a few forward
passes per layer say more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from edgeprune.criteria.tiles.curves import TileCurve, lower_hull
from edgeprune.criteria.tiles.sums import Floats, over_weights, tiled_weights
from edgeprune.errors import ConfigError, TaskError
from edgeprune.tasks.batches import batches as unpacked
from edgeprune.tasks.batches import call, device_of, mode

if TYPE_CHECKING:
    from torch import nn

    from edgeprune.tasks.task import Batches

KEPT = (0.75, 0.5, 0.25)
"""Shares of the tiles of a layer that are kept where it is measured."""


def measured_curves(
    model: nn.Module,
    curves: Mapping[str, TileCurve],
    loader: Batches,
    *,
    kept: Sequence[float] = KEPT,
    batches: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, TileCurve]:
    """Curves through measured points: half of the mean over samples of the squared change of the output.

    Per layer the worst tiles are zero at a few numbers of kept tiles, all other layers whole. Estimated damage is mapped to what
    was measured by straight lines through the origin and these points, made monotone; behind the last point the line goes on in
    proportion. The order of tiles stays. How layers act together is still taken to add up.

    Costs (layers * shares + 1) forward passes over the batches.

    Args:
        model: The dense model, whose output is one tensor, samples first; on return it is as it was.
        curves: Of `edgeprune.criteria.tiles.curves.tile_curves`.
        loader: Batches; targets are not used.
        kept: Shares of the tiles that are kept at the measured points, each in [0, 1).
        batches: Most batches; all of them, and the dense outputs, are in memory together.
        progress: Called with (measured, in all).

    Returns:
        Name of the weight to its curve; `estimate` is on the measured scale, `damage` its lower convex hull.

    Raises:
        ConfigError: A share is out of range, or there are none.
        ModelError: A weight is not in the model.
        TaskError: The outputs are no tensor of finite floats, or the loader cannot be used.
    """
    if not kept or not all(0 <= share < 1 for share in kept):
        raise ConfigError(f"damage must be measured at shares of kept tiles in [0, 1), found {tuple(kept)}.")
    weights = tiled_weights(model, {name: curve.grid for name, curve in curves.items()})
    # Read once: a loader that shuffles would give every measurement other samples.
    inputs = [given for given, _ in unpacked(loader, "calibration data", device_of(model), batches)]
    found: dict[str, TileCurve] = {}
    with mode(model, training=False), torch.no_grad():
        dense = [_output(model, given) for given in inputs]
        for name, curve in curves.items():
            points: dict[int, float] = {}
            for share in kept:
                count = curve.kept_at(1.0 - share)
                if count < curve.tiles and count not in points:
                    with without_tiles(weights[name], curve, count):
                        points[count] = _change(model, inputs, dense)
                if progress is not None:
                    progress(len(found) * len(kept) + kept.index(share) + 1, len(curves) * len(kept))
            estimate = through(curve.estimate, points)
            found[name] = replace(curve, estimate=estimate, damage=lower_hull(curve.weights, estimate))
    return found


def through(estimate: Floats, points: Mapping[int, float]) -> Floats:
    """An estimate by kept tiles, mapped so that it passes through points.

    Args:
        estimate: Shape (tiles + 1,), 0 at the end.
        points: Kept tiles to what was measured, at least 0.
    """
    # More tiles gone are not less damage, whatever an estimate with terms that cancel says.
    rising = np.maximum.accumulate(estimate[::-1])[::-1]
    ordered = sorted(points, reverse=True)
    predicted = np.concatenate([[0.0], rising[ordered]])
    wanted = np.maximum.accumulate(np.concatenate([[0.0], [points[count] for count in ordered]]))
    if predicted[-1] <= 0:
        # An estimate that says nothing: straight lines over the tiles that go.
        gone = len(estimate) - 1 - np.arange(len(estimate))
        at = np.concatenate([[0], [len(estimate) - 1 - count for count in ordered]])
        return line_through(gone.astype(np.float64), at.astype(np.float64), wanted)
    return line_through(rising, predicted, wanted)


def line_through(values: Floats, at: Floats, wanted: Floats) -> Floats:
    """Straight lines through points, the first of which is the origin; behind the last one in proportion to it.

    Args:
        values: Where, any shape.
        at: The points, ascending from 0, the last above it.
        wanted: Their values.
    """
    found: Floats = np.where(values > at[-1], values * (wanted[-1] / at[-1]), np.interp(values, at, wanted))
    return found


@contextmanager
def without_tiles(weight: nn.Parameter, curve: TileCurve, count: int) -> Iterator[None]:
    """All but the best tiles are zero, for a block."""
    before = weight.detach().clone()
    mask = torch.from_numpy(over_weights(curve.grid, curve.kept(count))).to(weight.device)
    try:
        weight.mul_(mask.to(weight.dtype))
        yield
    finally:
        weight.copy_(before)


def _change(model: nn.Module, inputs: Sequence[Any], dense: Sequence[torch.Tensor]) -> float:
    changes = [
        ((_output(model, given) - before) ** 2).flatten(1).sum(1) for given, before in zip(inputs, dense, strict=True)
    ]
    return float(torch.cat(changes).mean()) / 2


def _output(model: nn.Module, given: Any) -> torch.Tensor:
    output = call(model, given)
    if not isinstance(output, torch.Tensor) or output.ndim < 2 or not output.is_floating_point():
        found = f"shape {tuple(output.shape)}" if isinstance(output, torch.Tensor) else type(output).__name__
        raise TaskError(
            f"outputs must be one tensor of floats, samples first, for a change to be measured, found {found}."
        )
    if not torch.isfinite(output).all():
        raise TaskError("outputs must be finite for a change to be measured, found NaN or infinity.")
    return output.double()
