"""From scores of units to damage as a function of width: what the allocation minimizes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from edgeprune.criteria._base import Normalization, Scores
from edgeprune.errors import ModelError

DamageCurves = dict[str, npt.NDArray[np.float64]]
"""Group name to damage by units kept, shape (size + 1,): falls with the width, 0 at the full size."""


LEAST_SHARE = 1e-9
"""Kept shares are not taken to be smaller, so that removing everything has a finite damage."""


def damage_curves(scores: Scores, normalization: Normalization = "none", ranking: Scores | None = None) -> DamageCurves:
    """Damage of keeping the best `w` units of each group, from the scores of all others.

    Args:
        scores: Group name to one score per unit, finite and at least 0.
        normalization: How removed scores become damage, and how groups compare. A group whose scores are all 0 costs nothing.

            - ``"none"``: their sum, right where scores have one unit in all groups (taylor: squared loss changes, one unit at a
              time; how units act together is left out).
            - ``"share"``: their sum over the group's total: removing everything costs 1 in each group.
            - ``"log_share"``: minus the logarithm of the share that is kept. About ``"share"`` while little is removed, but
              it grows without bound, and summed over groups it is minus the logarithm of the product of kept shares: what
              passes through one layer after another multiplies. Right where scores only rank the units of one group
              (norms): with plain shares an allocation may empty one group nearly entirely, because its latency is worth it.
        ranking: Other scores by which units are kept, of the same groups, where these are those of one objective among several:
            the curves are what that one loses then, and need not be convex.

    Returns:
        Damage curves, convex in the width without `ranking`.

    Raises:
        ModelError: A score is negative, NaN or infinite.
    """
    curves: DamageCurves = {}
    for name, values in scores.items():
        array = _checked(name, values)
        ascending = np.sort(array) if ranking is None else array[_order(_checked(name, ranking[name]))[::-1]]
        removed = np.concatenate([[0.0], np.cumsum(ascending)])
        total = removed[-1]
        if normalization != "none" and total > 0:
            removed = removed / total
            if normalization == "log_share":
                removed = -np.log(np.maximum(1.0 - removed, LEAST_SHARE))
        curves[name] = np.abs(removed[::-1])
    return curves


def best_units(values: npt.NDArray[np.float64], width: int) -> tuple[int, ...]:
    """Indices of the `width` units with the largest scores, ascending; of equal ones the first.

    Raises:
        ModelError: The width lies outside 0..size, or a score is negative, NaN or infinite.
    """
    array = _checked("of this group", values)
    if not 0 <= width <= array.size:
        raise ModelError(f"a width must lie in 0..{array.size}, found {width}.")
    return tuple(sorted(int(unit) for unit in _order(array)[:width]))


def _order(array: npt.NDArray[np.float64]) -> npt.NDArray[np.intp]:
    """Units from the largest score to the smallest; of equal ones the first comes first."""
    return np.argsort(-array, kind="stable")


def _checked(name: str, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not np.isfinite(array).all() or (array < 0).any():
        raise ModelError(f"scores must be finite, at least 0 and one per unit, found others in group {name!r}.")
    return array
