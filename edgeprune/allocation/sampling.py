"""Planned states: orthogonal arrays, and who may share a column of one."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from edgeprune.allocation.terms import Floats, Ints


def prime_at_least(number: int) -> int:
    """The smallest prime that is not below `number`, at least 2."""
    candidate = max(2, number)
    while any(candidate % divisor == 0 for divisor in range(2, int(candidate**0.5) + 1)):
        candidate += 1
    return candidate


def orthogonal(q: int) -> Ints:
    """An orthogonal array of strength two: shape (q * q, q + 1), in any two columns every pair of levels 0..q-1 once.

    Args:
        q: A prime.
    """
    first, second = (part.ravel() for part in np.indices((q, q)))
    return np.stack([first, *((second + slope * first) % q for slope in range(q))], axis=1).astype(np.int64)


def color(count: int, pairs: Iterable[tuple[int, int]]) -> list[int]:
    """A number per vertex such that the two of each pair differ, greedily, those with most neighbors first."""
    near: list[set[int]] = [set() for _ in range(count)]
    for first, second in pairs:
        near[first].add(second)
        near[second].add(first)
    colors = [-1] * count
    for vertex in sorted(range(count), key=lambda vertex: (-len(near[vertex]), vertex)):
        taken = {colors[other] for other in near[vertex]}
        colors[vertex] = next(number for number in range(count + 1) if number not in taken)
    return colors


def levels(shares: Floats, count: int, dice: np.random.Generator) -> Ints:
    """Options near shares of the way through `count` of them, up to one aside, shape as `shares`."""
    options = np.rint(shares * (count - 1)).astype(np.int64) + dice.integers(-1, 2, len(shares))
    clipped: Ints = np.clip(options, 0, count - 1)
    return clipped
