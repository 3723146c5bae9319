"""From a limit on a metric to a bound on the loss: how both were seen to go together, made monotone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def loss_bound(
    seen: Sequence[tuple[float, float]], dense: tuple[float, float], worst: float, *, higher_is_better: bool
) -> float:
    """The largest loss at which a monotone fit of the metric is still acceptable.

    The fit is the isotonic regression of the metrics that were seen at losses above the dense one, through the dense model's own
    point, with straight lines between. Behind the largest loss that was seen nothing is promised: where the metric was
    acceptable everywhere, that loss is the bound.

    Args:
        seen: Pairs (loss, metric) of models that were cut more or less.
        dense: The same of the dense model.
        worst: Worst acceptable metric.
        higher_is_better: Direction of the metric.
    """
    from sklearn.isotonic import IsotonicRegression

    sign = -1.0 if higher_is_better else 1.0
    losses, metrics = (np.array(values, dtype=np.float64) for values in zip(dense, *seen, strict=True))
    # Badness grows with the loss; cut models cannot be better than the dense one here, or nothing would be monotone.
    badness = np.maximum(sign * metrics, sign * dense[1])
    there = losses >= dense[0]
    knots = np.unique(losses[there])
    weights = np.ones(len(losses))
    weights[0] = 1e6  # the dense point is no observation among others
    fitted = IsotonicRegression().fit(losses[there], badness[there], weights[there]).predict(knots)
    acceptable = fitted <= sign * worst + 1e-6 * abs(worst)
    if acceptable.all():
        return float(knots[-1])
    first = int(np.argmin(acceptable))
    if first == 0:
        return float(dense[0])
    rise = fitted[first] - fitted[first - 1]
    share = np.clip((sign * worst - fitted[first - 1]) / rise, 0.0, 1.0)
    return float(knots[first - 1] + share * (knots[first] - knots[first - 1]))
