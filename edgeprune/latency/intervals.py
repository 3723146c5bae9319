"""Intervals of predicted latencies, in log space: relative errors are what stays alike from small kernels to large ones.

Kernels: cross-conformal. Each row's residual comes from a regression that has not seen the row's channels; the
half-width is the residuals' finite-sample quantile. Source: Vovk, "Cross-conformal predictors", Annals of Mathematics and
Artificial Intelligence 74, 2015, and Barber, Candès, Ramdas and Tibshirani, "Predictive inference with the jackknife+",
Annals of Statistics 49(1), 2021.

Networks: there are few of them, so a quantile of their residuals would be infinite or a lottery. Their leave-one-out
residuals give the scale of a Student distribution, mixed with a weak prior that counts as one more network. They come from
sums that hold predicted kernels already: what these explain is told apart, so that it is not counted twice. A residual
beyond three robust standard deviations counts as three: one network that was measured while the board was busy must not
widen the intervals of all. A dozen residuals may be small by luck, but no prediction is nearer to a measurement than measurements
are to each other; and what shifts a whole run shows in none of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgeprune.latency.arrays import Floats

FEW_ROWS_FLOOR = math.log(1.25)
"""Least half-width of a family with too few rows for a quantile."""

UNKNOWN_ROUND_NOISE = 0.03
"""Relative standard deviation of one round, assumed where a table has a single round."""

PRIOR_NETWORKS, PRIOR_NETWORK_SPREAD = 1.0, 0.05
"""What is known of end-to-end errors before any network was measured: one network, 5 % off."""

RUN_SPREAD = 0.01
"""Relative standard deviation between a run and the next, of all networks together: residuals of one run do not show it.
Networks measured minutes after the run that the predictor was fitted to were off by 0 to 1.9 % on average, root mean square
1.2 % (measured: `benchmarks/predictor_board.py`, two models of each of five families)."""

MOST_HALF_WIDTH = math.log(1000)
"""An interval from a thousandth to a thousand times says that nothing is known; wider ones say no more, and would overflow."""

UNSTEADY_SHARE = 0.7
"""Of the standard deviation of one round: what shifts a later measurement of some seconds. What neighbors leave of a shared cache
changes within seconds and within minutes, so the rounds of a later measurement have that in common (measured on a virtual x86-64
server: first networks of MobileNetV2, ResNet and DenseNet, single rounds 0.8, 3.1 and 2.5 % apart, predictions off by a standard
deviation of 1.4, 2.8 and 4.7 %). Where rounds agree it adds next to nothing."""

_MOST_LEVERAGE = 0.75

ROBUST_NETWORKS = 6
"""From this many networks on, outliers among their residuals can be told."""


class NetworkNoise(NamedTuple):
    """Relative standard deviations of measurements of networks.

    Attributes:
        median: Of a network's latency, the median of its rounds.
        single: Of one round.
    """

    median: float = 0.0
    single: float = 0.0


NO_NOISE = NetworkNoise()


def conformal_half_width(residuals: Floats, level: float) -> float:
    """Half-width that covers a new residual with probability `level`.

    Args:
        residuals: Out-of-fold log errors, shape (rows,).
        level: In (0, 1).

    Returns:
        The k-th smallest absolute residual, k = ceil((rows + 1) level); with fewer rows than that needs, a Student
        quantile of their root mean square, at least `FEW_ROWS_FLOOR`. At most `MOST_HALF_WIDTH`.
    """
    count = len(residuals)
    rank = math.ceil((count + 1) * level)
    if 0 < rank <= count:
        return min(float(np.sort(np.abs(residuals))[rank - 1]), MOST_HALF_WIDTH)
    spread = math.sqrt(float(np.mean(np.square(residuals)))) if count else FEW_ROWS_FLOOR
    width = student_quantile(level, max(count, 1)) * spread * math.sqrt(1 + 1 / max(count, 1))
    return min(max(width, FEW_ROWS_FLOOR), MOST_HALF_WIDTH)


def cross_coverage(residuals: Floats, folds: NDArray[np.intp], level: float) -> float:
    """Share of rows inside the interval that the other folds' residuals give."""
    inside = [
        np.abs(residuals[folds == fold]) <= conformal_half_width(residuals[folds != fold], level)
        for fold in np.unique(folds)
    ]
    return float(np.mean(np.concatenate(inside)))


def among(fitted: Sequence[float], left_out: Sequence[float]) -> tuple[float, ...]:
    """Errors as of networks that lie among those that a calibration was fitted to, per network.

    Left out of a linear fit, a network is missed by r / (1 - h), where r is what the fit with it misses and h its leverage
    (Hoaglin and Welsch 1978, "The Hat Matrix in Regression and ANOVA"): by its noise and by what the others tell wrongly of it.
    The networks that are timed lie at the edges of what is asked for, where the others tell least. The geometric mean of both
    errors has the variance of the noise; to that a network that is asked for adds the mean leverage.

    Args:
        fitted: Log errors of the networks with the calibration that was fitted to all.
        left_out: With those that were fitted to the others.
    """
    inner, outer = np.abs(np.asarray(fitted)), np.abs(np.asarray(left_out))
    # What a few networks are fitted to exactly says nothing of their noise.
    inner = np.clip(inner, (1 - _MOST_LEVERAGE) * outer, outer)
    total = float((outer**2).sum())
    leverage = 1 - math.sqrt(float((inner**2).sum()) / total) if total else 0.0
    return tuple((np.sign(left_out) * np.sqrt(inner * outer * (1 + leverage))).tolist())


def network_half_width(
    residuals: Sequence[float],
    shares: Sequence[float],
    share: float,
    level: float,
    noise: NetworkNoise = NO_NOISE,
) -> float:
    """Half-width of a network's calibrated latency, for a measurement in another run.

    Args:
        residuals: Log errors of the measured networks, each left out or as `among` says; may be empty.
        shares: Relative standard deviation of each of their sums that comes from predicted kernels.
        share: The same of the network in question.
        level: In (0, 1).
        noise: Of their measurements; the errors cannot be less than that of a median, and what rounds differ by tells how
            much another run may.
    """
    degrees = PRIOR_NETWORKS + len(residuals)
    own, factor, least = _of_their_own(tuple(residuals), tuple(shares), noise.median)
    # Networks that missed less than the noise must not take it back by way of the ratios.
    variance = max(factor * (own + share * share), least + share * share)
    spread = math.hypot(math.sqrt(variance), RUN_SPREAD, UNSTEADY_SHARE * noise.single)
    return min(student_quantile(level, degrees) * spread, MOST_HALF_WIDTH)


@lru_cache(maxsize=256)
def _of_their_own(residuals: tuple[float, ...], shares: tuple[float, ...], noise: float) -> tuple[float, float, float]:
    """What a predictor asks again for every network: variance that is theirs, how the residuals compare with it, its least.

    For the arguments see `network_half_width`.
    """
    count = len(residuals)
    most = 3 * 1.4826 * float(np.median(np.abs(residuals))) if count >= ROBUST_NETWORKS else math.inf
    squares = np.array([min(abs(value), most) ** 2 for value in residuals])
    variances = np.square(np.array(shares, dtype=np.float64))
    least = max(noise**2, 1e-12)
    own = _variance_of_their_own(squares, variances, least)
    # The prior tells the size of `own`; how the residuals compare with it is theirs alone to say.
    ratios = PRIOR_NETWORKS + float(np.sum(squares / (own + variances)))
    return own, ratios / (PRIOR_NETWORKS + count), least


def _variance_of_their_own(squares: Floats, variances: Floats, least: float) -> float:
    """What networks miss besides the error of their predicted kernels: a variance, at least `least`.

    The one with which the squared residuals, each over its whole variance, come to as many as there are. Sums alone
    (residuals less shares) would let a network with large shares hide what another one misses without any.

    Source: Paule and Mandel, "Consensus values and weighting factors", Journal of Research of the National Bureau of
    Standards 87(5), 1982, with the prior as one more network.
    """
    from scipy.optimize import brentq

    degrees = PRIOR_NETWORKS + len(squares)
    prior = PRIOR_NETWORKS * PRIOR_NETWORK_SPREAD**2

    def excess(own: float) -> float:
        return prior / own + float(np.sum(squares / (own + variances))) - degrees

    highest = (prior + float(np.sum(squares))) / degrees  # What it is without shares: with any, it is less.
    if highest <= least or excess(least) <= 0:
        return least
    return float(brentq(excess, least, highest, xtol=1e-12)) if excess(highest) < 0 else highest


def network_noise(all_rounds_ms: Sequence[Sequence[float]]) -> NetworkNoise:
    """Of networks that were measured in these rounds; 0 where no network has two."""
    several = [rounds for rounds in all_rounds_ms if len(rounds) > 1]
    if not several:
        return NO_NOISE
    single = round_noise(several)
    medians = [(single * _of_median(len(rounds))) ** 2 for rounds in several]
    return NetworkNoise(math.sqrt(float(np.mean(medians))), single)


@lru_cache(maxsize=256)
def student_quantile(level: float, degrees: float) -> float:
    """Half-width of the central interval of Student's distribution."""
    from scipy.stats import t

    return float(t.ppf((1 + level) / 2, degrees))


def round_deviations(rounds_ms: Sequence[float]) -> list[float]:
    """Log of each round over the median of the other rounds; empty for a single round."""
    if len(rounds_ms) < 2:
        return []
    logs = np.log(rounds_ms)
    return [float(logs[index] - np.median(np.delete(logs, index))) for index in range(len(logs))]


def round_noise(all_rounds_ms: Sequence[Sequence[float]]) -> float:
    """Relative standard deviation of one round, robust and pooled; `UNKNOWN_ROUND_NOISE` where no row has two rounds."""
    deviations = [
        value * math.sqrt((len(rounds) - 1) / len(rounds))  # The others' median is noisy too.
        for rounds in all_rounds_ms
        for value in round_deviations(rounds)
    ]
    return 1.4826 * float(np.median(np.abs(deviations))) if deviations else UNKNOWN_ROUND_NOISE


def repeatability(all_rounds_ms: Iterable[Sequence[float]]) -> Floats:
    """Relative errors that a perfect prediction would show, beside which those of a real one stand.

    Predictions are held against the median of a row's rounds; it is noisy, though less than a single round is. Each round's
    deviation from the others is scaled to that.

    Args:
        all_rounds_ms: Per row the median of each round, milliseconds.

    Returns:
        Absolute errors, one per round of each row that has several; empty when none has.
    """
    logs = [
        value * math.sqrt((len(rounds) - 1) / len(rounds)) * _of_median(len(rounds))
        for rounds in all_rounds_ms
        for value in round_deviations(rounds)
    ]
    return np.abs(np.expm1(np.array(logs, dtype=np.float64)))


def _of_median(rounds: int) -> float:
    """Standard deviation of the median of so many rounds, in that of one (of two it is the mean)."""
    return math.sqrt((math.pi / 2 if rounds > 2 else 1.0) / rounds)


def median_noise(rounds_ms: Sequence[float], pooled: float) -> float:
    """Relative standard deviation of the median of a row's rounds, never below what its family's noise implies."""
    logs = np.log(rounds_ms)
    own = 1.4826 * float(np.median(np.abs(logs - np.median(logs))))
    return max(own, pooled) * _of_median(len(rounds_ms)) if len(rounds_ms) > 1 else pooled
