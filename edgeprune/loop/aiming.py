"""Where to aim next: what the rounds so far say about how far measured latencies lie from predicted ones.

A predictor misses the plans of one model and one budget in much the same way, so a measured plan corrects the prediction of
its neighbors. The correction at a predicted latency is the mean of the log errors that were seen, weighted by how close (in
log latency) they were seen; the dense model, whose latency is known, is one of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

NEAR = 0.03
"""Distance in log latency over which two plans are taken to be mispredicted alike."""

_HALVINGS = 60


class Seen(NamedTuple):
    """A latency that was predicted, and the upper end of the interval of what was measured, milliseconds."""

    predicted_ms: float
    high_ms: float


def corrected_ms(predicted_ms: float, seen: Sequence[Seen]) -> float:
    """Upper confidence bound of what a plan with this prediction would be measured to take, milliseconds.

    Args:
        predicted_ms: Its predicted latency, milliseconds.
        seen: What was measured so far; nothing leaves the prediction as it is.
    """
    if not seen:
        return predicted_ms
    distances = [(math.log(one.predicted_ms / predicted_ms) / NEAR) ** 2 / 2 for one in seen]
    nearest = min(distances)  # far from all, the nearest counts
    weights = [math.exp(nearest - distance) for distance in distances]
    errors = [math.log(one.high_ms / one.predicted_ms) for one in seen]
    error = math.fsum(weight * one for weight, one in zip(weights, errors, strict=True)) / math.fsum(weights)
    return predicted_ms * math.exp(error)


def aim_ms(target_ms: float, seen: Sequence[Seen]) -> float:
    """Predicted latency at which a plan's upper confidence bound is the target, milliseconds; the inverse of `corrected_ms`."""
    errors = [math.log(one.high_ms / one.predicted_ms) for one in seen] or [0.0]
    low, high = math.log(target_ms) - max(errors), math.log(target_ms) - min(errors)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if corrected_ms(math.exp(middle), seen) > target_ms:
            high = middle
        else:
            low = middle
    return math.exp(low)
