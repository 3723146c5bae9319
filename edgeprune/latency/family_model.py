"""One regression per kernel family and precision, chosen by cross-validation over groups of channel counts.

A regression is of what a prior misses: the roofline, or what another device's predictor says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from edgeprune.latency import transfer
from edgeprune.latency.arrays import Floats
from edgeprune.latency.features import FeatureMatrix, Machine, channels_of, features
from edgeprune.latency.intervals import MOST_HALF_WIDTH, conformal_half_width, median_noise, round_noise
from edgeprune.latency.regressors import BLENDS, BOOSTING_ROWS, Constant, Regressor, candidates, regressor
from edgeprune.latency.roofline import Roofline
from edgeprune.latency.transfer import TRANSFER, SourceTimes
from edgeprune.spec import Kernel, Measurement

FOLDS, FOLDS_OF_MANY = 5, 3
"""Of cross-validation; three tell candidates apart where there are thousands of rows."""

UNKNOWN_OP_FACTOR = 2.0
"""An operation that the table lacks, in a family that it has, gets an interval this much wider, in log space."""

EXTRAPOLATION_SLOPE = 0.3
"""Half-width added per unit of log work or log bytes outside of what was measured."""

CLIPPED_ERROR = 0.5
"""Candidates are compared by mean absolute log error; one larger than this counts as this (it is an outlier)."""


@dataclass(frozen=True)
class Regression:
    """A prior, and a regressor of what the prior misses.

    Attributes:
        roofline: The prior; None where it is what another device's predictor says.
        inner: Of the log error of the prior.
    """

    roofline: Roofline | None
    inner: Regressor

    def log_ms(self, matrix: FeatureMatrix, ops: NDArray[np.str_]) -> Floats:
        """Log milliseconds, shape (kernels,)."""
        seen = matrix if self.roofline is None else matrix.without_source()
        return _prior(self.roofline, seen, ops) + self.inner.predict(seen.values)


@dataclass(frozen=True)
class Blend:
    """The mean of regressions with different priors."""

    parts: tuple[Regression | Blend, ...]

    def log_ms(self, matrix: FeatureMatrix, ops: NDArray[np.str_]) -> Floats:
        """Log milliseconds, shape (kernels,)."""
        total = np.zeros(len(matrix.work))
        for part in self.parts:
            total += part.log_ms(matrix, ops)
        return total / len(self.parts)


def _prior(roofline: Roofline | None, matrix: FeatureMatrix, ops: NDArray[np.str_]) -> Floats:
    if roofline is not None:
        return np.log(roofline.ms(matrix, ops))
    if matrix.source is None:
        raise ValueError("a regression on top of another device's predictor must be given what that one says.")
    return matrix.source


@dataclass(frozen=True)
class FamilyModel:
    """What was learned about one family in one precision.

    Attributes:
        family: As in `Kernel.family`.
        precision: As in `Kernel.precision`.
        ops: Operations that the table holds.
        chosen: Name of the regressor that cross-validation chose.
        regression: Fitted to all rows.
        scores: Candidate to its cross-validated mean absolute log error (clipped).
        residuals: Out-of-fold log errors (predicted over measured), shape (rows,); empty when there is one row.
        folds: Fold of each row, shape (rows,).
        half_width: Of the interval, in log space.
        held: Measured kernel to (log ms, half-width in log space).
        lowest: Least log work and log bytes that were measured.
        highest: Greatest of the same.
        source: What another device's predictor says, where it was asked.
    """

    family: str
    precision: str
    ops: tuple[str, ...]
    chosen: str
    regression: Regression | Blend
    scores: dict[str, float]
    residuals: Floats
    folds: NDArray[np.intp]
    half_width: float
    held: dict[Kernel, tuple[float, float]]
    lowest: Floats
    highest: Floats
    source: SourceTimes | None = None

    @property
    def transferred(self) -> bool:
        """Whether it stands on another device's predictor."""
        return self.chosen.startswith(TRANSFER)

    def predict(self, kernels: Sequence[Kernel], machine: Machine) -> tuple[Floats, Floats]:
        """Log milliseconds and half-widths in log space of kernels, by regression alone."""
        matrix = features(kernels, machine, self.ops)
        if self.transferred and self.source is not None:
            matrix = matrix.with_source(self.source(kernels))
        ops = np.array([kernel.op for kernel in kernels])
        extent = _extent(matrix)
        outside = np.maximum(self.lowest - extent, 0) + np.maximum(extent - self.highest, 0)
        half_widths = self.half_width + EXTRAPOLATION_SLOPE * outside.sum(axis=1)
        half_widths = np.where(np.isin(ops, self.ops), half_widths, half_widths * UNKNOWN_OP_FACTOR)
        return self.regression.log_ms(matrix, ops), np.minimum(half_widths, MOST_HALF_WIDTH)


def fit_family(
    kernels: Sequence[Kernel],
    measurements: Sequence[Measurement],
    machine: Machine,
    *,
    seed: int,
    level: float,
    names: Sequence[str] | None = None,
    source: SourceTimes | None = None,
) -> FamilyModel:
    """Choose and fit the regression of one family.

    Args:
        kernels: All of one family and precision, distinct.
        measurements: One per kernel.
        machine: Vector width and caches of the device.
        seed: Of folds and regressors.
        level: Of the intervals.
        names: Candidates to choose from; by default those that the number of rows allows.
        source: What another device's predictor says of kernels of this family.
    """
    ops = np.array([kernel.op for kernel in kernels])
    matrix = features(kernels, machine, sorted(set(ops.tolist())))
    tried = tuple(names or candidates(len(kernels)))
    if source is not None:
        matrix = matrix.with_source(source(kernels))
        tried = (*tried, *transfer.candidates(len(kernels)))
    ms = np.array([measurement.median_ms for measurement in measurements])
    # A few rows say little about a fold of a fifth of them, and what is tried on them takes no time; thousands take some.
    few = source is not None and len(kernels) < transfer.SOME_ROWS
    count = len(kernels) if few else FOLDS if len(kernels) <= BOOSTING_ROWS else FOLDS_OF_MANY
    folds = _folds(kernels, seed, count)
    scores: dict[str, float] = {}
    predicted: dict[str, Floats] = {}
    for name in tried:
        if name in BLENDS:
            predicted[name] = np.mean([predicted[part] for part in BLENDS[name]], axis=0)
        else:
            predicted[name] = _out_of_fold(name, matrix, ops, ms, folds, seed)
        errors = np.abs(predicted[name] - np.log(ms)) if len(predicted[name]) else np.array([np.inf])
        scores[name] = float(np.mean(np.minimum(errors, CLIPPED_ERROR)))
    chosen = transfer.chosen(scores) if source is not None else min(scores, key=lambda name: scores[name])
    residuals = predicted[chosen] - np.log(ms) if len(predicted[chosen]) else predicted[chosen]
    half_width = conformal_half_width(residuals, level)
    extent = _extent(matrix)
    return FamilyModel(
        family=kernels[0].family,
        precision=kernels[0].precision,
        ops=matrix.ops,
        chosen=chosen,
        regression=_fitted(chosen, matrix, ops, ms, seed),
        scores=scores,
        residuals=residuals,
        folds=folds,
        half_width=half_width,
        held=_held(kernels, measurements, half_width, level),
        lowest=extent.min(axis=0),
        highest=extent.max(axis=0),
        source=source,
    )


def _fitted(name: str, matrix: FeatureMatrix, ops: NDArray[np.str_], ms: Floats, seed: int) -> Regression | Blend:
    if name in BLENDS:
        return Blend(tuple(_fitted(part, matrix, ops, ms, seed) for part in BLENDS[name]))
    informed = name.startswith(TRANSFER)
    seen = matrix if informed else matrix.without_source()
    roofline = None if informed else Roofline.fit(seen, ops, ms)
    target = np.log(ms) - _prior(roofline, seen, ops)
    return Regression(roofline, regressor(name, seed).fit(seen.values, target))


def _out_of_fold(
    name: str, matrix: FeatureMatrix, ops: NDArray[np.str_], ms: Floats, folds: NDArray[np.intp], seed: int
) -> Floats:
    if folds.max() == 0:
        return np.empty(0)
    predicted = np.empty(len(ms))
    for fold in range(int(folds.max()) + 1):
        rest, rows = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
        regression = _fitted(name, matrix.take(rest), ops[rest], ms[rest], seed)
        predicted[rows] = regression.log_ms(matrix.take(rows), ops[rows])
    return predicted


def _folds(kernels: Sequence[Kernel], seed: int, count: int) -> NDArray[np.intp]:
    # Kernels of the same channels are near duplicates: apart, they would flatter the error.
    groups = [_channels(kernel) for kernel in kernels]
    distinct = sorted(set(groups))
    if len(distinct) < 2:
        groups = [(row,) for row in range(len(kernels))]
        distinct = sorted(set(groups))
    shuffled = np.random.default_rng(seed).permutation(len(distinct))
    fold_of = {group: int(place) % count for group, place in zip(distinct, shuffled, strict=True)}
    return np.array([fold_of[group] for group in groups], dtype=np.intp)


def _channels(kernel: Kernel) -> tuple[int, ...]:
    shapes = (kernel.inputs[0] if kernel.inputs else kernel.output, kernel.output)
    return tuple(channels_of(kernel.family, shape) for shape in shapes)


def _held(
    kernels: Sequence[Kernel], measurements: Sequence[Measurement], half_width: float, level: float
) -> dict[Kernel, tuple[float, float]]:
    """What is known of measured kernels: the measurement as it is, and how far a fresh one may be from it.

    Drawing noisy measurements towards the regression was tried and left out: it made them worse (one round of 420
    convolutions against the median of four others: mean error 1.8 % as measured, 2.0 % drawn).
    """
    from scipy.stats import norm

    pooled = round_noise([measurement.rounds_ms for measurement in measurements])
    two_sided = float(norm.ppf((1 + level) / 2))
    held = {}
    for kernel, measurement in zip(kernels, measurements, strict=True):
        # A fresh measurement has noise of its own: one round's, and what this row has.
        noise = float(np.hypot(median_noise(measurement.rounds_ms, pooled), pooled))
        held[kernel] = (float(np.log(measurement.median_ms)), min(two_sided * noise, half_width))
    return held


def _extent(matrix: FeatureMatrix) -> Floats:
    return np.stack([np.log(matrix.work), np.log(matrix.traffic)], axis=1)


def borrowed_family(lent: FamilyModel, source: SourceTimes, log_ratio: float, half_width: float) -> FamilyModel:
    """A family that the new device has no kernel of: what the other device's predictor says, times a ratio.

    Args:
        lent: The other device's model of it.
        source: What its predictor says.
        log_ratio: Log of new over other device, as other families have it.
        half_width: Least half-width in log space.
    """
    return replace(
        lent,
        chosen=TRANSFER,
        regression=Regression(None, Constant(log_ratio)),
        scores={},
        residuals=np.empty(0),
        folds=np.empty(0, dtype=np.intp),
        half_width=max(lent.half_width, half_width),
        held={},
        source=source,
    )
