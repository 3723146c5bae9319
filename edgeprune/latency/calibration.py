"""From the sum of kernel times to the latency of a network: they do not add up.

Each kernel was timed alone, with warm caches and without the cost of the call; a network pays the call once, something for
each kernel that it starts, and finds its weights no longer where the last inference left them: between two uses of a weight lie
all the others. So ``network_ms = a * sum + b * kernels + c + d * bytes of weights``, fitted to networks that were measured as a
whole.

Where a table holds networks of several models, each model with enough of them has a calibration of its own, drawn towards
that of all: what models have in common (the call, the caches) is learned together, the rest apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgeprune.latency.arrays import Floats

TOLERANCE = 0.02
"""Relative error that one network is expected to keep; larger ones count less (Huber)."""

PRIOR_SPREADS = (0.3, 0.15, 0.05, 0.05)
"""Prior standard deviations: of a around 1; of b around 0, in mean kernel times; of c and of what all weights cost around 0, in
median sums."""

_NO_WEIGHTS = (*PRIOR_SPREADS[:3], 1e-9)
"""Of what models have in common as a prior of each: models differ in weights and in what they pay besides, so that the one would
pass for the other."""

OWN_NETWORKS = 3
"""A model with fewer networks than this shares the calibration of all."""

SMALLEST_SHARE = 0.1
"""A calibrated latency is at least this share of the sum."""


@dataclass(frozen=True)
class Totals:
    """What the latency of a network follows from.

    Attributes:
        sum_ms: Sum of its kernels' times, milliseconds.
        kernels: Their number, repeats included.
        weight_bytes: Bytes of weights that they read.
    """

    sum_ms: float
    kernels: int
    weight_bytes: float


@dataclass(frozen=True)
class Calibration:
    """Affine map from kernels to network.

    Attributes:
        scale: a, factor of the sum; 1 without networks.
        per_kernel_ms: b, added for each kernel; negative where a kernel costs less among others than alone.
        fixed_ms: c, added once; never negative.
        per_byte_ms: d, added for each byte of weights; never negative.
        networks: How many measured networks it was fitted to.
    """

    scale: float = 1.0
    per_kernel_ms: float = 0.0
    fixed_ms: float = 0.0
    per_byte_ms: float = 0.0
    networks: int = 0

    def ms(self, totals: Totals) -> float:
        """Latency of a network, milliseconds."""
        return max(self.part_ms(totals) + self.fixed_ms, SMALLEST_SHARE * totals.sum_ms)

    def part_ms(self, totals: Totals) -> float:
        """What some kernels add to the latency of a network that runs them among others, milliseconds."""
        return self.scale * totals.sum_ms + self.per_kernel_ms * totals.kernels + self.per_byte_ms * totals.weight_bytes


def fit_calibration(
    totals: Sequence[Totals],
    measured_ms: Floats,
    smallest_kernel_ms: float,
    prior: Calibration | None = None,
    spreads: Sequence[float] = PRIOR_SPREADS,
) -> Calibration:
    """Robust regularised least squares of relative errors; few networks leave it near the plain sum, or near `prior`.

    Args:
        totals: Of each network.
        measured_ms: Measured latency per network, shape (networks,).
        smallest_kernel_ms: Time of the quickest kernel; no kernel may come to cost less than nothing.
        prior: What is known from other networks; the plain sum by default.
        spreads: How far from it the four terms may be, as `PRIOR_SPREADS`.
    """
    from scipy.optimize import lsq_linear

    start = Calibration() if prior is None else prior
    if not len(totals):
        return start
    table = np.array([(one.sum_ms, one.kernels, 1.0, one.weight_bytes) for one in totals])
    middle = float(np.median(table[:, 0]))
    units = np.array(
        [1.0, float(np.median(table[:, 0] / table[:, 1])), middle, middle / max(np.median(table[:, 3]), 1.0)]
    )
    relative = table * units / measured_ms[:, None]
    pull = np.diag(1 / np.array(spreads))
    mean = np.array([start.scale, start.per_kernel_ms, start.fixed_ms, start.per_byte_ms]) / units
    lower = np.array([0.2, -0.9 * smallest_kernel_ms / units[1], 0.0, 0.0])
    weights, solution = np.ones(len(totals)), mean
    for _ in range(20):
        row_weights = np.sqrt(weights) / TOLERANCE
        left = np.concatenate([relative * row_weights[:, None], pull])
        right = np.concatenate([row_weights, pull @ mean])
        found = lsq_linear(left, right, bounds=(lower, np.full(4, np.inf)), method="bvls").x
        misses = np.abs(relative @ found - 1)
        weights = np.minimum(1.0, 2 * TOLERANCE / np.maximum(misses, 1e-12))
        done, solution = bool(np.allclose(found, solution, rtol=1e-6, atol=1e-9)), found
        if done:
            break
    scale, per_kernel, fixed, per_byte = (float(value) for value in solution * units)
    return Calibration(scale, per_kernel, fixed, per_byte, len(totals))


def fit_calibrations(
    totals: Sequence[Totals], measured_ms: Floats, smallest_kernel_ms: float, models: Sequence[Sequence[int]] = ()
) -> tuple[Calibration, list[Calibration | None]]:
    """The calibration of all networks, and that of each model.

    Args:
        totals: As in `fit_calibration`.
        measured_ms: As there.
        smallest_kernel_ms: As there.
        models: Rows of the networks of each model.

    Returns:
        The calibration of all, and per model its own, or None where it has too few networks or all that there are.
    """
    common = fit_calibration(totals, measured_ms, smallest_kernel_ms)
    prior = fit_calibration(totals, measured_ms, smallest_kernel_ms, spreads=_NO_WEIGHTS)
    own: list[Calibration | None] = []
    for model in models:
        if OWN_NETWORKS <= len(model) < len(totals):
            own.append(fit_calibration(_of(totals, model), measured_ms[list(model)], smallest_kernel_ms, prior))
        else:
            own.append(None)
    return common, own


def leave_one_out(
    totals: Sequence[Totals], measured_ms: Floats, smallest_kernel_ms: float, models: Sequence[Sequence[int]] = ()
) -> Sequence[Calibration]:
    """For each network the calibration, of its model where that has its own, fitted to all others."""
    model_of = {row: model for model in models for row in model if OWN_NETWORKS <= len(model) < len(totals)}
    found = []
    for index in range(len(totals)):
        kept = [row for row in range(len(totals)) if row != index]
        spreads = _NO_WEIGHTS if index in model_of else PRIOR_SPREADS
        fitted = fit_calibration(_of(totals, kept), measured_ms[kept], smallest_kernel_ms, spreads=spreads)
        if index in model_of:
            rows = [row for row in model_of[index] if row != index]
            fitted = fit_calibration(_of(totals, rows), measured_ms[rows], smallest_kernel_ms, fitted)
        found.append(fitted)
    return found


def _of(totals: Sequence[Totals], rows: Sequence[int]) -> list[Totals]:
    return [totals[row] for row in rows]
