"""How much each layer may add to a loss, so that all of them together add no more than a bound allows.

Source: H. Ye et al., "Performance-aware Approximation of Global Channel Pruning for Multitask CNNs" (PAGCP), IEEE TPAMI 45(8),
2023: layer `i` of `n` may multiply the loss by ``1 + initial * factor ** i``, where the factor makes the product of all of
these the global tolerance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from edgeprune.errors import ConfigError

_EARLY = 2.0
"""The first layer may add at most so many times what each might if all might add the same; the factor is at most 1 then."""
_HALVINGS = 200
_LEAST = 1e-9
"""A tolerance that is no larger is rounding."""


@dataclass(frozen=True)
class Tolerances:
    """A geometric sequence of tolerances.

    Attributes:
        initial: What the first layer may add, as a share of the loss.
        factor: What each may add, over what the one before may.
        count: Number of layers.
    """

    initial: float
    factor: float
    count: int

    def __getitem__(self, place: int) -> float:
        """Share of the loss that a layer may add, by its place in the order, from 0."""
        return self.initial * self.factor**place

    @property
    def product(self) -> float:
        """What all layers together may multiply the loss by."""
        return math.prod(1 + self[place] for place in range(self.count))


def factor_of(initial: float, total: float, count: int) -> float:
    """The factor of a geometric sequence whose product is a global tolerance, by bisection of its logarithm.

    Args:
        initial: What the first layer may add, as a share of the loss, above 0.
        total: What all layers together may multiply the loss by.
        count: Number of layers, at least 2.

    Raises:
        ConfigError: No factor above 0 does: the first layer alone may add as much as all together.
    """
    if not (count > 1 and initial > 0 and math.isfinite(total) and total > 1 + initial):
        raise ConfigError(
            f"a global tolerance must leave something to more than one layer, found {total:g} for {count} layers of which the "
            f"first may add {initial:g}.",
            hint="a smaller initial rate",
        )
    places = np.arange(count)

    def surplus(log_factor: float) -> float:
        # log(1 + exp(x)), also where exp(x) overflows.
        return float(np.logaddexp(0.0, math.log(initial) + places * log_factor).sum()) - math.log(total)

    low, high = -1.0, 1.0
    while surplus(low) > 0:
        low *= 2
    while surplus(high) < 0:
        high *= 2
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        low, high = (middle, high) if surplus(middle) < 0 else (low, middle)
    return math.exp((low + high) / 2)


def tolerances(total: float, count: int, initial_rate: float) -> Tolerances:
    """The sequence for a global tolerance of any size.

    The first layer may add `initial_rate`, or where the tolerance is small for so many layers, twice what each might if all might
    add the same.

    Args:
        total: What all layers together may multiply the loss by; below 1 counts as 1.
        count: Number of layers, at least 1.
        initial_rate: What the first layer may add at most, as a share of the loss.
    """
    if total <= 1 + _LEAST:
        return Tolerances(0.0, 1.0, count)
    if count == 1:
        return Tolerances(total - 1, 1.0, count)
    if math.isinf(total):
        return Tolerances(math.inf, 1.0, count)
    initial = min(initial_rate, _EARLY * math.expm1(math.log(total) / count))
    return Tolerances(initial, factor_of(initial, total, count), count)
