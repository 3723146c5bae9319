"""The search in the form that LPViT was published in: the slope of a damage curve by the share of the layer that goes.

For comparison. It differs from what the paper says: slopes are per share of a layer, whatever that costs; curves are not
convex, so the share with the closest slope may jump; and the search ends when it is near the budget, above it or below.

Source: K. Xu et al., "LPViT: Low-Power Semi-structured Pruning for Vision Transformers", ECCV 2024, official code.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgeprune.allocation.tiles.problem import Counts, TileLayer, TileProblem
from edgeprune.criteria.tiles.sums import Floats
from edgeprune.errors import ConfigError

_POINTS = 101
_EXPONENTS = (-100.0, 100.0)


@dataclass(frozen=True)
class Published:
    """Settings of the published form.

    Attributes:
        step: Half the window of the slope, in points of the grid of 101 shares.
        smooth: Weight of the former value in the moving average over the damage; 0 leaves it out.
        tolerance: How far from the target the share of the cost may be.
        halvings: Most steps of the bisection.
        keep: Share of its tiles that each layer keeps at least; ``min(0.05, (1 - target) / 2)`` when None.
    """

    step: int = 4
    smooth: float = 0.0
    tolerance: float = 0.02
    halvings: int = 40
    keep: float | None = None

    def __post_init__(self) -> None:
        if self.step < 1 or not 0 <= self.smooth < 1 or not 0 < self.tolerance < 1 or self.halvings < 1:
            raise ConfigError(
                "the published search needs step >= 1, smooth in [0, 1), tolerance in (0, 1) and halvings >= 1, found "
                f"{self.step}, {self.smooth}, {self.tolerance} and {self.halvings}."
            )


def published_counts(problem: TileProblem, budget: float, settings: Published) -> Counts:
    """Kept tiles per layer; the cost is near the budget, not always within it.

    Args:
        problem: Layers; their damage is read as it was estimated, before it was made convex.
        budget: Total cost.
        settings: See `Published`.
    """
    target = budget / problem.dense
    keep = min(0.05, max(0.0, (1 - target) / 2)) if settings.keep is None else settings.keep
    shares = np.linspace(0.0, 1.0, _POINTS)
    slopes = []
    for layer in problem.layers.values():
        values = on_grid(layer, layer.curve.estimate, shares)
        values = smoothed(values, settings.smooth)
        if layer.power is not None:
            values = values + problem.beta * on_grid(layer, layer.power, shares)
        slopes.append(five_point_slopes(shares, values, settings.step))
    low, high = _EXPONENTS
    counts = problem.every()
    for _ in range(settings.halvings):
        middle = (low + high) / 2
        price = float(np.exp2(middle))
        counts = np.array(
            [
                layer.curve.kept_at(min(1.0 - keep, float(shares[nearest(slope, price)])))
                for layer, slope in zip(problem.layers.values(), slopes, strict=True)
            ],
            dtype=np.int64,
        )
        ratio = problem.cost(counts) / problem.dense
        if abs(ratio - target) <= settings.tolerance:
            break
        # A steeper slope is that of more tiles gone.
        low, high = (middle, high) if ratio > target else (low, middle)
    return counts


def nearest(slopes: Floats, price: float) -> int:
    """The point whose slope is closest to a price; of equals the first."""
    # Beside a price far above all slopes their differences would be lost to rounding.
    return int(np.argmax(slopes) if price >= slopes.max() else np.argmin(np.abs(slopes - price)))


def on_grid(layer: TileLayer, values: Floats, shares: Floats) -> Floats:
    """What is known by kept tiles, at shares of tiles that go."""
    return values[[layer.curve.kept_at(float(share)) for share in shares]]


def smoothed(values: Floats, weight: float) -> Floats:
    """De-biased exponential moving average.

    Args:
        values: Shape (points,).
        weight: Of the former average, in [0, 1).
    """
    if weight == 0:
        return values
    found, average = np.empty_like(values), 0.0
    for point, value in enumerate(values):
        average = weight * average + (1 - weight) * float(value)
        found[point] = average / (1 - weight ** (point + 1))
    return found


def five_point_slopes(at: Floats, values: Floats, step: int) -> Floats:
    """Derivative by the five-point rule with half a window as step; narrower towards the ends, where it is a difference.

    Args:
        at: Evenly spaced, shape (points,), at least 2.
        values: Shape (points,).
        step: Half the window, in points.
    """
    last = len(at) - 1
    found = np.empty(len(at))
    for point in range(len(at)):
        half = min(step, point, last - point)
        if half < 2:
            low, high = (point, min(point + 1, last)) if point < 2 else (point - 1, min(point + 1, last))
            if low == high:
                low -= 1
            found[point] = (values[high] - values[low]) / (at[high] - at[low])
            continue
        # The rule needs the middle of each half: an odd window is one point narrower.
        near, half = half // 2, half // 2 * 2
        rise = 8 * (values[point + near] - values[point - near]) - (values[point + half] - values[point - half])
        found[point] = rise / (6 * (at[point + half] - at[point]))
    return found


def balanced_beta(problem: TileProblem, step: int = 10) -> float:
    """The paper's scale between damage and power: the mean over layers of the steepest damage over that of the power.

    Args:
        problem: Layers, all with a power; its own beta does not count.
        step: Of `five_point_slopes`.

    Raises:
        ConfigError: A layer has no power, or no layer's power changes with its tiles.
    """
    shares = np.linspace(0.0, 1.0, _POINTS)
    damages, powers = [], []
    for name, layer in problem.layers.items():
        if layer.power is None:
            raise ConfigError(f"beta must be balanced between damage and power, found no power of {name!r}.")
        damages.append(float(five_point_slopes(shares, on_grid(layer, layer.curve.damage, shares), step).max()))
        powers.append(float(np.abs(five_point_slopes(shares, on_grid(layer, layer.power, shares), step)).max()))
    if not any(powers):
        raise ConfigError("beta must be balanced between damage and power, found powers that do not change.")
    return float(np.mean(damages) / np.mean(powers))
