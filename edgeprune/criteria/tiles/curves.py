"""Damage of a layer as a function of the tiles that it keeps: what a search over layers minimizes.

Source: K. Xu et al., "LPViT: Low-Power Semi-structured Pruning for Vision Transformers", ECCV 2024, section 3, and K. Xu et
al., "Efficient Joint Optimization of Layer-Adaptive Weight Pruning in Deep Neural Networks", ICCV 2023 (damage adds up over
layers). Here the Fisher matrix is that of the gradients of batches by default, curves have one point per tile, and they are
made convex.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from edgeprune.criteria.tiles.scores import EPSILON, Curvature, Ranking, checked, required, tile_damage, tile_scores
from edgeprune.criteria.tiles.sums import Floats, TileSums
from edgeprune.errors import ConfigError, ModelError
from edgeprune.surgery.tiles import TileGrid


@dataclass(frozen=True)
class TileCurve:
    """Damage of one layer by the number of tiles that it keeps.

    Attributes:
        grid: How the weight is cut.
        order: The tiles by the position in the flattened grid, the first to go first, shape (tiles,).
        estimate: Estimated damage when `k` tiles are kept, the best ones, shape (tiles + 1,); 0 when all are.
        damage: The lower convex hull of it over the weights that are left: convex in them, and it never falls where tiles go.
        sizes: Weights that each tile holds where those are not all of the grid's, since channels are gone, shape
            [block rows, block columns].
    """

    grid: TileGrid
    order: npt.NDArray[np.int64]
    estimate: Floats
    damage: Floats
    sizes: Floats | None = None

    @property
    def tiles(self) -> int:
        """How many tiles there are."""
        return len(self.order)

    @property
    def weights(self) -> Floats:
        """Weights that are left when `k` tiles are kept, shape (tiles + 1,)."""
        held = self.grid.weights() if self.sizes is None else self.sizes
        sizes = held.ravel()[self.order][::-1]
        return np.concatenate([[0.0], np.cumsum(sizes, dtype=np.float64)])

    def kept(self, count: int) -> npt.NDArray[np.bool_]:
        """Which tiles stay when so many do, shape [block rows, block columns].

        Raises:
            ConfigError: The number lies outside 0..tiles.
        """
        if not 0 <= count <= self.tiles:
            raise ConfigError(f"kept tiles of {self.grid.parameter!r} must be 0..{self.tiles}, found {count}.")
        found = np.ones(self.tiles, dtype=bool)
        found[self.order[: self.tiles - count]] = False
        return found.reshape(self.grid.shape)

    def kept_at(self, pruned: float) -> int:
        """How many tiles stay when a share of them goes: ``floor((1 - pruned) * tiles)``."""
        # A share such as 0.3 is no binary fraction: what is a whole number of tiles but for rounding, is one.
        return min(self.tiles, math.floor((1.0 - pruned) * self.tiles + 1e-9))


def tile_curves(
    sums: Mapping[str, TileSums],
    ranking: Ranking = "damage",
    *,
    curvature: Curvature = "batches",
    eps: float = EPSILON,
    convex: bool = True,
) -> dict[str, TileCurve]:
    """Damage curves of all layers.

    Args:
        sums: Of `edgeprune.criteria.tiles.sums.gradient_sums`.
        ranking: Which tiles go first, see `tile_scores`.
        curvature: See `damage`.
        eps: See `damage`.
        convex: False leaves `TileCurve.damage` as it was estimated.

    Returns:
        Name of the weight to its curve.

    Raises:
        ModelError: A score is NaN or infinite, or there are no layers.
        TaskError: The sums have no gradients.
    """
    if not sums:
        raise ModelError("damage curves must be of at least one layer that is cut into tiles, found none.")
    scores = tile_scores(sums, ranking, curvature=curvature, eps=eps)
    found = {}
    for name, one in sums.items():
        order = np.argsort(scores[name], axis=None, kind="stable").astype(np.int64)
        estimate = checked(name, damage(one, order, curvature=curvature, eps=eps))
        curve = TileCurve(one.grid, order, estimate, estimate)
        found[name] = replace(curve, damage=lower_hull(curve.weights, estimate)) if convex else curve
    return found


def narrow_curve(sums: TileSums, sizes: Floats) -> TileCurve:
    """The damage curve of a layer that channels are gone from; its tiles are ranked by what is left of them.

    Args:
        sums: Of `edgeprune.criteria.tiles.sums.narrow_sums`.
        sizes: Weights that are left in each tile, shape [block rows, block columns]; tiles without any go first, for nothing.

    Raises:
        ModelError: A score is NaN or infinite.
    """
    alone = checked(sums.grid.parameter, tile_damage(sums))
    scores = np.where(sizes > 0, alone / np.maximum(sizes, 1), -1.0)
    order = np.argsort(scores, axis=None, kind="stable").astype(np.int64)
    # More tiles gone are not less damage, whatever terms that cancel say.
    estimate = np.maximum.accumulate(damage(sums, order)[::-1])[::-1]
    curve = TileCurve(sums.grid, order, estimate, estimate, sizes)
    return replace(curve, damage=lower_hull(curve.weights, estimate))


def reranked(curves: Mapping[str, TileCurve], scores: Mapping[str, Floats]) -> dict[str, TileCurve]:
    """The same curves, with other tiles kept: those with the best scores.

    The published code of LPViT chooses how many tiles each layer keeps by damage, and then which by their magnitude.

    Args:
        curves: Name of the weight to its curve.
        scores: Name of the weight to scores, shape [block rows, block columns].

    Raises:
        ModelError: A score is missing, NaN or infinite.
    """
    missing = sorted(curves.keys() - scores.keys())
    if missing:
        raise ModelError(f"every curve must have scores to be ranked by, found none for {missing[0]!r}.")
    orders = {name: np.argsort(checked(name, scores[name]), axis=None, kind="stable") for name in curves}
    return {name: replace(curve, order=orders[name].astype(np.int64)) for name, curve in curves.items()}


def damage(
    sums: TileSums, order: npt.NDArray[np.int64], *, curvature: Curvature = "batches", eps: float = EPSILON
) -> Floats:
    """First plus second-order damage when the tiles of an order go one after the other.

    With `d` the change of the weights (minus the weight where a tile is gone, else 0), `g_i` the gradient of batch `i`, `g` their
    mean::

        mean over weights of (d * g) ** 2  +  1/2 * (mean over i of (g_i . d) ** 2 + eps * |d| ** 2)

    ``"mean"`` has ``(g . d) ** 2`` in the second part, as published; ``"none"`` has no second part. In closed form: all of it
    follows from the sums over tiles.

    Args:
        sums: Sums over the tiles.
        order: Positions of the tiles in the flattened grid, the first to go first.
        curvature: Of the second part.
        eps: What the Fisher matrix is damped with.

    Returns:
        Damage by tiles that are kept, shape (tiles + 1,): the last is 0.

    Raises:
        TaskError: The sums have no gradients.
    """
    name = sums.grid.parameter
    gone: Floats = np.cumsum(required(sums.squares, name).ravel()[order]) / sums.weights.sum()
    if curvature != "none":
        gates = required(sums.gates, name) if curvature == "batches" else required(sums.mean_gate, name)[None]
        along = np.cumsum(gates.reshape(len(gates), -1)[:, order], axis=1)
        gone = gone + ((along**2).sum(0) + eps * np.cumsum(sums.norms.ravel()[order])) / 2
    found: Floats = np.concatenate([[0.0], gone])[::-1].copy()
    return found


def lower_hull(at: Floats, values: Floats) -> Floats:
    """The largest convex function that is nowhere above some values.

    Args:
        at: Where, ascending, shape (points,).
        values: Shape (points,).

    Returns:
        Its values at the same points.
    """
    hull: list[int] = []
    for point in range(len(at)):
        while len(hull) > 1 and _above(at, values, hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    found: Floats = np.minimum(np.interp(at, at[hull], values[hull]), values)
    return found


def _above(at: Floats, values: Floats, left: int, middle: int, right: int) -> bool:
    """Whether the middle point lies on or above the line between the others."""
    run, rise = at[right] - at[left], values[right] - values[left]
    return bool((values[middle] - values[left]) * run >= rise * (at[middle] - at[left]))
