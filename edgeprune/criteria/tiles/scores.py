"""Which tiles of a layer go first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np

from edgeprune.criteria.tiles.sums import Floats, TileSums
from edgeprune.errors import ConfigError, ModelError, TaskError

Ranking = Literal["l1", "taylor", "damage"]
Curvature = Literal["batches", "mean", "none"]
"""Second-order part of a damage: none, of the Fisher matrix of the gradients of batches, or of that of the mean gradient."""

EPSILON = 1e-7
"""What the Fisher matrix is damped with, the paper's number."""


def tile_scores(
    sums: Mapping[str, TileSums], ranking: Ranking = "damage", *, curvature: Curvature = "batches", eps: float = EPSILON
) -> dict[str, Floats]:
    """One score per tile and weight, so that tiles of several sizes compare; the smallest goes first.

    Args:
        sums: Of `edgeprune.criteria.tiles.sums`.
        ranking: With `w` the weights and `g` their mean gradient:

            - ``"l1"``: the mean of ``abs(w)`` over the tile; needs no data.
            - ``"taylor"``: the mean of ``abs(w * g)``, the block Taylor score of LPViT.
            - ``"damage"``: what removing this tile alone costs (`tile_damage`), divided by its weights.
        curvature: See `tile_damage`.
        eps: See `tile_damage`.

    Returns:
        Name of the weight to scores, shape [block rows, block columns], finite and at least 0.

    Raises:
        ConfigError: There is no such ranking.
        TaskError: It needs gradients, and the sums have none.
        ModelError: A score is NaN or infinite.

    Source: K. Xu et al., "LPViT: Low-Power Semi-structured Pruning for Vision Transformers", ECCV 2024, section 3; the ranking
    by damage is ours.
    """
    found = {}
    for name, one in sums.items():
        if ranking == "l1":
            scores = one.magnitudes / one.weights
        elif ranking == "taylor":
            scores = required(one.products, name) / one.weights
        elif ranking == "damage":
            scores = tile_damage(one, curvature, eps) / one.weights
        else:
            raise ConfigError(f"tiles must be ranked by l1, taylor or damage, found {ranking!r}.")
        found[name] = checked(name, scores)
    return found


def tile_damage(sums: TileSums, curvature: Curvature = "batches", eps: float = EPSILON) -> Floats:
    """Damage of removing each tile alone: `edgeprune.criteria.tiles.curves.damage` of one tile.

    Returns:
        Shape [block rows, block columns].

    Raises:
        TaskError: The sums have no gradients.
    """
    first: Floats = required(sums.squares, sums.grid.parameter) / sums.weights.sum()
    if curvature == "none":
        return first
    if curvature == "mean":
        curved = required(sums.mean_gate, sums.grid.parameter) ** 2
    else:
        curved = (required(sums.gates, sums.grid.parameter) ** 2).sum(0)
    found: Floats = first + (curved + eps * sums.norms) / 2
    return found


def required(values: Floats | None, name: str) -> Floats:
    """Sums that were made from gradients.

    Raises:
        TaskError: They were not.
    """
    if values is None:
        raise TaskError(
            f"the damage of the tiles of {name!r} must be made from gradients, found sums of weights alone.",
            hint="gradient_sums with a task, or the ranking l1",
        )
    return values


def checked(name: str, scores: Floats) -> Floats:
    """Scores, none of them NaN, infinite or negative.

    Raises:
        ModelError: Some are.
    """
    array = np.asarray(scores, dtype=np.float64)
    if not np.isfinite(array).all() or (array < 0).any():
        bad = np.argwhere(~(array >= 0) | ~np.isfinite(array))[0].tolist()
        raise ModelError(
            f"scores of tiles must be finite and at least 0, found {array[tuple(bad)]} at {tuple(bad)} of {name!r}."
        )
    return array
