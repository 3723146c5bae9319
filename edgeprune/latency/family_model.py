"""One regression per kernel family and precision, chosen by cross-validation over groups of channel counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeprune.latency.features import FeatureMatrix, Floats, Machine, channels_of, features
from edgeprune.latency.intervals import conformal_half_width, median_noise, round_noise
from edgeprune.latency.regressors import Regressor, candidates, regressor
from edgeprune.latency.roofline import Roofline
from edgeprune.spec import Kernel, Measurement

FOLDS = 5

UNKNOWN_OP_FACTOR = 2.0
"""An operation that the table lacks, in a family that it has, gets an interval this much wider, in log space."""

EXTRAPOLATION_SLOPE = 0.3
"""Half-width added per unit of log work or log bytes outside of what was measured."""

CLIPPED_ERROR = 0.5
"""Candidates are compared by mean absolute log error; one larger than this counts as this (it is an outlier)."""


@dataclass(frozen=True)
class Regression:
    """A roofline, and a regressor of what the roofline misses."""

    roofline: Roofline
    inner: Regressor

    def log_ms(self, matrix: FeatureMatrix, ops: NDArray[np.str_]) -> Floats:
        """Log milliseconds, shape (kernels,)."""
        return np.log(self.roofline.ms(matrix, ops)) + self.inner.predict(matrix.values)


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
    """

    family: str
    precision: str
    ops: tuple[str, ...]
    chosen: str
    regression: Regression
    scores: dict[str, float]
    residuals: Floats
    folds: NDArray[np.intp]
    half_width: float
    held: dict[Kernel, tuple[float, float]]
    lowest: Floats
    highest: Floats

    def predict(self, kernels: Sequence[Kernel], machine: Machine) -> tuple[Floats, Floats]:
        """Log milliseconds and half-widths in log space of kernels, by regression alone."""
        matrix = features(kernels, machine, self.ops)
        ops = np.array([kernel.op for kernel in kernels])
        extent = _extent(matrix)
        outside = np.maximum(self.lowest - extent, 0) + np.maximum(extent - self.highest, 0)
        half_widths = self.half_width + EXTRAPOLATION_SLOPE * outside.sum(axis=1)
        half_widths = np.where(np.isin(ops, self.ops), half_widths, half_widths * UNKNOWN_OP_FACTOR)
        return self.regression.log_ms(matrix, ops), half_widths


def fit_family(
    kernels: Sequence[Kernel],
    measurements: Sequence[Measurement],
    machine: Machine,
    *,
    seed: int,
    level: float,
    names: Sequence[str] | None = None,
) -> FamilyModel:
    """Choose and fit the regression of one family.

    Args:
        kernels: All of one family and precision, distinct.
        measurements: One per kernel.
        machine: Vector width and caches of the device.
        seed: Of folds and regressors.
        level: Of the intervals.
        names: Candidates to choose from; by default those that the number of rows allows.
    """
    ops = np.array([kernel.op for kernel in kernels])
    matrix = features(kernels, machine, sorted(set(ops.tolist())))
    ms = np.array([measurement.median_ms for measurement in measurements])
    folds = _folds(kernels, seed)
    scores: dict[str, float] = {}
    predicted: dict[str, Floats] = {}
    for name in names or candidates(len(kernels)):
        predicted[name] = _out_of_fold(name, matrix, ops, ms, folds, seed)
        errors = np.abs(predicted[name] - np.log(ms)) if len(predicted[name]) else np.array([np.inf])
        scores[name] = float(np.mean(np.minimum(errors, CLIPPED_ERROR)))
    chosen = min(scores, key=lambda name: scores[name])
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
    )


def _fitted(name: str, matrix: FeatureMatrix, ops: NDArray[np.str_], ms: Floats, seed: int) -> Regression:
    roofline = Roofline.fit(matrix, ops, ms)
    target = np.log(ms) - np.log(roofline.ms(matrix, ops))
    return Regression(roofline, regressor(name, seed).fit(matrix.values, target))


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


def _folds(kernels: Sequence[Kernel], seed: int) -> NDArray[np.intp]:
    # Kernels of the same channels are near duplicates: apart, they would flatter the error.
    groups = [_channels(kernel) for kernel in kernels]
    distinct = sorted(set(groups))
    if len(distinct) < 2:
        groups = [(row,) for row in range(len(kernels))]
        distinct = sorted(set(groups))
    shuffled = np.random.default_rng(seed).permutation(len(distinct))
    fold_of = {group: int(place) % FOLDS for group, place in zip(distinct, shuffled, strict=True)}
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
