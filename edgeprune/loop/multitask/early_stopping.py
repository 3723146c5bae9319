"""Whether the mean of many losses is above a bound, said before all were looked at; seldom wrongly, however often one asks.

The samples are finitely many and come in random order, without replacement. Under the hypothesis that their mean is at most a
bound, a gambler who bets before each sample on its being above what is left of that bound cannot expect to win; where the stake
has grown by ``1 / alpha`` all the same, the hypothesis is given up. By Ville's inequality that happens wrongly with probability
`alpha` at most, over all the times at which one may look.

It holds for values that are what they are whatever the order; what goes up and down together must be one value. So samples of a
batch that batch norms normalize are none, and whole batches are (`edgeprune.loop.multitask.stops`).

Source: I. Waudby-Smith, A. Ramdas, "Estimating means of bounded random variables by betting", JRSSB 86(1), 2024: the capital
process without replacement (section 5), with the predictable plug-in bets of the empirical-Bernstein kind.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

_MOST_STAKED = 0.75
"""Of what could be lost at most."""
_WINDOW = 2.0
"""Values above the bound by more than so many times the distance from the lowest value to the bound count as that."""


class MeanAbove:
    """Asks of finitely many values, one after another, whether their mean is above a bound.

    Args:
        count: How many there are in all.
        bound: Of the mean.
        lowest: None of them is below; most of them should be nearer to the bound.
        alpha: How likely it may be said wrongly, at most.

    Attributes:
        certain: Whether it has been said.
    """

    def __init__(self, count: int, bound: float, lowest: float, alpha: float) -> None:
        self._count, self._lowest, self._alpha = count, lowest, alpha
        # What is clipped from above has a smaller mean: the answer stays true without an upper limit of the values.
        self._width = (1 + _WINDOW) * (bound - lowest)
        self._bound = (bound - lowest) / self._width if self._width > 0 else math.inf
        self._seen, self._sum, self._mean, self._squares = 0, 0.0, 0.5, 0.25
        self._log_capital = 0.0
        # A bound that no mean can keep is exceeded, whatever comes.
        self.certain = bound < lowest

    def add(self, values: Iterable[float]) -> bool:
        """Look at further values; returns `certain`."""
        for value in values:
            if self.certain or not math.isfinite(self._bound) or self._seen >= self._count:
                break
            self._bet(min(1.0, max(0.0, (value - self._lowest) / self._width)))
        return self.certain

    def _bet(self, value: float) -> None:
        left = self._count - self._seen
        # What the mean of those that are left is at most, if that of all is at most the bound.
        bound = (self._count * self._bound - self._sum) / left
        if bound < 0:
            self.certain = True
            return
        self._seen += 1
        variance = self._squares / self._seen
        stake = math.sqrt(2 * math.log(1 / self._alpha) / (variance * self._seen * math.log(1 + self._seen)))
        stake = min(stake, _MOST_STAKED / bound) if bound > 0 else stake
        self._log_capital += math.log1p(stake * (value - bound))
        self._sum += value
        mean = (0.5 + self._sum) / (self._seen + 1)
        self._squares += (value - mean) ** 2
        if self._log_capital >= -math.log(self._alpha) or self._sum > self._count * self._bound * (1 + 1e-12):
            self.certain = True
