"""From scores of units to damage as a function of width: what the allocation minimizes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from edgeprune.criteria._base import Normalization, Scores
from edgeprune.errors import ModelError

DamageCurves = dict[str, npt.NDArray[np.float64]]
"""Group name to damage by units kept, shape (size + 1,): falls with the width, 0 at the full size."""


def damage_curves(scores: Scores, normalization: Normalization = "none") -> DamageCurves:
    """Damage of keeping the best `w` units of each group: the sum of the scores of all others.

    Args:
        scores: Group name to one score per unit, finite and at least 0.
        normalization: How groups compare. ``"none"``: the sums as they are, right where scores estimate a loss change
            (taylor). ``"share"``: divided by the group's total, so that removing everything costs 1 in each group, right
            where scores only rank the units of one group (norms). A group whose scores are all 0 costs nothing.

    Returns:
        Damage curves, convex in the width.

    Raises:
        ModelError: A score is negative, NaN or infinite.
    """
    curves: DamageCurves = {}
    for name, values in scores.items():
        array = _checked(name, values)
        ascending = np.sort(array)
        removed = np.concatenate([[0.0], np.cumsum(ascending)])
        total = removed[-1]
        if normalization == "share" and total > 0:
            removed = removed / total
        curves[name] = removed[::-1].copy()
    return curves


def best_units(values: npt.NDArray[np.float64], width: int) -> tuple[int, ...]:
    """Indices of the `width` units with the largest scores, ascending; of equal ones the first.

    Raises:
        ModelError: The width lies outside 0..size, or a score is negative, NaN or infinite.
    """
    array = _checked("of this group", values)
    if not 0 <= width <= array.size:
        raise ModelError(f"a width must lie in 0..{array.size}, found {width}.")
    order = np.argsort(-array, kind="stable")
    return tuple(sorted(int(unit) for unit in order[:width]))


def _checked(name: str, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not np.isfinite(array).all() or (array < 0).any():
        raise ModelError(f"scores must be finite, at least 0 and one per unit, found others in group {name!r}.")
    return array
