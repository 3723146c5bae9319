"""From the sum of kernel times to the latency of a network: they do not add up.

Each kernel was timed alone, with warm caches and without the cost of the call; a network pays the call once, something for
each kernel that it starts, and finds its weights no longer where the last inference left them: between two uses of a weight lie
all the others. So ``network_ms = a * sum + b * kernels + c + sum over operations (d * bytes of weights)``, fitted to networks
that were measured as a whole. What a byte costs depends on how an operation walks through its weights: on one server CPU
convolutions of blocked layout paid 0.06 ms for each megabyte in networks of 4 to 18 MB, those by a matrix product 0.02.

A cache that others use too forgets: how much of the weights is still there the next time depends on how long that is away,
which is as long as the network takes, what its weights cost included. So the price of a byte is d times
``1 - exp(-(network_ms / kept) ** 3)``, where ``kept`` is found with the rest where the networks tell it: on that CPU networks of
1.5 ms paid a fifth of d, those of 4 ms nearly all. The exponent makes it a matter of almost all or nothing, as in a cache
that forgets what was not used for longest.

Where a table holds networks of several models, each model with enough of them has a calibration of its own, drawn towards
that of all: what models have in common (the call, the caches) is learned together, the rest apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from edgeprune.latency.arrays import Floats
from edgeprune.latency.features import weight_bytes
from edgeprune.spec import Kernel

TOLERANCE = 0.02
"""Relative error that one network is expected to keep; larger ones count less (Huber)."""

PRIOR_SPREADS = (0.3, 0.15, 0.05, 0.15)
"""Prior standard deviations: of a around 1; of b around 0, in mean kernel times; of c, and of what all weights would cost at
each operation's d, around 0, in median sums."""

_NO_WEIGHTS = (*PRIOR_SPREADS[:3], 1e-9)
"""Of what models have in common as a prior of each: models differ in weights and in what they pay besides, so that the one would
pass for the other."""

OWN_NETWORKS = 3
"""A model with fewer networks than this shares the calibration of all."""

KEPT_NETWORKS = 6
"""A model with fewer networks than this does not tell for how long weights are kept."""

KEPT_GAIN = 6.6
"""By how much twice the logarithm of the likelihood must rise for it: the 1 % point of chi-square with one degree."""

_KEPT_SHAPE, _KEPT_TRIALS, _AGREEING = 3, 20, 200
_REPEATS_TO = 0.005
"""What a network is off by at least, whatever explains it. Above that the networks say themselves how large errors are."""

SMALLEST_SHARE = 0.1
"""A calibrated latency is at least this share of the sum."""


@dataclass(frozen=True)
class Totals:
    """What the latency of a network follows from.

    Attributes:
        sum_ms: Sum of its kernels' times, milliseconds.
        kernels: Their number, repeats included.
        weight_bytes: Bytes of weights that they read, by operation.
    """

    sum_ms: float
    kernels: int
    weight_bytes: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, kernels: Sequence[Kernel], kernel_ms: Iterable[float]) -> Totals:
        """Of a network, or of a part of one, that runs these kernels and of the time of each, milliseconds."""
        read: dict[str, float] = {}
        for kernel in kernels:
            if found := weight_bytes(kernel):
                read[kernel.op] = read.get(kernel.op, 0.0) + found
        return cls(float(sum(kernel_ms)), len(kernels), read)


@dataclass(frozen=True)
class Calibration:
    """Affine map from kernels to network.

    Attributes:
        scale: a, factor of the sum; 1 without networks.
        per_kernel_ms: b, added for each kernel; negative where a kernel costs less among others than alone.
        fixed_ms: c, added once; never negative.
        per_byte_ms: d, added for each byte of weights that an operation reads, in a network that takes long; never negative.
        kept_ms: For about how long weights are still in a cache, milliseconds; 0 where every network pays all of d.
        networks: How many measured networks it was fitted to.
    """

    scale: float = 1.0
    per_kernel_ms: float = 0.0
    fixed_ms: float = 0.0
    per_byte_ms: Mapping[str, float] = field(default_factory=dict)
    networks: int = 0
    kept_ms: float = 0.0

    def at(self, taken_ms: float) -> Calibration:
        """The same for networks that take so long, with prices that do not depend on that: parts add up."""
        if not self.kept_ms:
            return self
        paid = float(_paid(taken_ms, self.kept_ms))
        return replace(self, per_byte_ms={op: paid * ms for op, ms in self.per_byte_ms.items()}, kept_ms=0.0)

    def ms(self, totals: Totals) -> float:
        """Latency of a network, milliseconds."""
        weights_ms = self._weights_ms(totals)
        least_ms = self.part_ms(totals) - weights_ms + self.fixed_ms
        found = least_ms + (0.0 if self.kept_ms else weights_ms)
        # The longer it takes the more it pays, and the longer it takes: up to where both agree, from below.
        for _ in range(_AGREEING if self.kept_ms else 0):
            before, found = found, least_ms + weights_ms * float(_paid(max(found, 0.0), self.kept_ms))
            if found - before <= 1e-12 * abs(found):
                break
        return max(found, SMALLEST_SHARE * totals.sum_ms)

    def part_ms(self, totals: Totals) -> float:
        """What some kernels add to the latency of a network that runs them among others, milliseconds; see `at`."""
        return self.scale * totals.sum_ms + self.per_kernel_ms * totals.kernels + self._weights_ms(totals)

    def _weights_ms(self, totals: Totals) -> float:
        return sum(self.per_byte_ms.get(op, 0.0) * read for op, read in totals.weight_bytes.items())


def fit_calibration(
    totals: Sequence[Totals],
    measured_ms: Floats,
    smallest_kernel_ms: float,
    prior: Calibration | None = None,
    spreads: Sequence[float] = PRIOR_SPREADS,
    kept_ms: float = 0.0,
) -> Calibration:
    """Robust regularised least squares of relative errors; few networks leave it near the plain sum, or near `prior`.

    Args:
        totals: Of each network.
        measured_ms: Measured latency per network, shape (networks,).
        smallest_kernel_ms: Time of the quickest kernel; no kernel may come to cost less than nothing.
        prior: What is known from other networks; the plain sum by default.
        spreads: How far from it the terms may be, as `PRIOR_SPREADS`.
        kept_ms: As in `Calibration`; see `kept_time`.
    """
    from scipy.optimize import lsq_linear

    start = Calibration() if prior is None else prior
    if not len(totals):
        return start
    ops = sorted({op for one in totals for op in one.weight_bytes})
    paid = _paid(measured_ms, kept_ms)
    table = np.array(
        [
            (one.sum_ms, one.kernels, 1.0, *(share * one.weight_bytes.get(op, 0.0) for op in ops))
            for one, share in zip(totals, paid.tolist(), strict=True)
        ]
    )
    middle = float(np.median(table[:, 0]))
    # Of all weights, also where hardly any are paid for: what little quick networks tell must not become a price for long ones.
    byte_ms = middle / max(float(np.median([sum(one.weight_bytes.values()) for one in totals])), 1.0)
    units = np.array([1.0, float(np.median(table[:, 0] / table[:, 1])), middle, *(byte_ms for _ in ops)])
    relative = table * units / measured_ms[:, None]
    pull = np.diag(1 / np.array([*spreads[:3], *(spreads[3] for _ in ops)]))
    known = (start.per_byte_ms.get(op, 0.0) for op in ops)
    mean = np.array([start.scale, start.per_kernel_ms, start.fixed_ms, *known]) / units
    lower = np.array([0.2, -0.9 * smallest_kernel_ms / units[1], 0.0, *(0.0 for _ in ops)])
    weights, solution = np.ones(len(totals)), mean
    for _ in range(20):
        row_weights = np.sqrt(weights) / TOLERANCE
        left = np.concatenate([relative * row_weights[:, None], pull])
        right = np.concatenate([row_weights, pull @ mean])
        found = lsq_linear(left, right, bounds=(lower, np.full(len(lower), np.inf)), method="bvls", max_iter=100).x
        misses = np.abs(relative @ found - 1)
        weights = np.minimum(1.0, 2 * TOLERANCE / np.maximum(misses, 1e-12))
        done, solution = bool(np.allclose(found, solution, rtol=1e-6, atol=1e-9)), found
        if done:
            break
    scale, per_kernel, fixed, *per_byte = (float(value) for value in solution * units)
    return Calibration(scale, per_kernel, fixed, dict(zip(ops, per_byte, strict=True)), len(totals), kept_ms)


def kept_time(
    totals: Sequence[Totals], measured_ms: Floats, smallest_kernel_ms: float, models: Sequence[Sequence[int]] = ()
) -> float:
    """For how long weights are kept, as `Calibration.kept_ms`: the best of some times, where it is clearly better than 0.

    Models differ in what they pay besides, which must not pass for it: each is judged by a calibration of its own.
    """
    return _KeptTimes(totals, measured_ms, smallest_kernel_ms, models).best()


class _KeptTimes:
    """How well each of some times explains what networks took, model by model."""

    def __init__(
        self,
        totals: Sequence[Totals],
        measured_ms: Floats,
        smallest_kernel_ms: float,
        models: Sequence[Sequence[int]],
    ) -> None:
        self.totals, self.measured_ms, self.smallest_kernel_ms = totals, measured_ms, smallest_kernel_ms
        every = [rows for rows in models if len(rows) < len(totals)] or [range(len(totals))]
        self.told = [list(rows) for rows in every if len(rows) >= KEPT_NETWORKS]
        # About what networks take; the sums, since what is tried must not hang on the one network that is left out.
        sums = [totals[row].sum_ms for rows in self.told for row in rows]
        self.trials = [0.0, *np.geomspace(min(sums) / 2, 1.25 * max(sums), _KEPT_TRIALS).tolist()] if sums else [0.0]
        self.misses = [self._misses(rows) for rows in self.told]

    def best(self, without: int | None = None) -> float:
        """The time that explains most, also of all rows but one; 0 where none is clearly better."""
        found = np.zeros(len(self.trials))
        for rows, misses in zip(self.told, self.misses, strict=True):
            if without not in rows:
                found += misses
            elif len(rows) > KEPT_NETWORKS:
                found += self._misses([row for row in rows if row != without])
        best = int(np.argmin(found))
        return self.trials[best] if found[best] < found[0] - KEPT_GAIN else 0.0

    def _misses(self, rows: Sequence[int]) -> Floats:
        """Minus twice the logarithm of the likelihood by time, errors being as large as they are (Huber), shape (trials,)."""
        known, times = _of(self.totals, rows), self.measured_ms[list(rows)]
        found = []
        for kept_ms in self.trials:
            calibration = fit_calibration(known, times, self.smallest_kernel_ms, kept_ms=kept_ms)
            off = np.abs(np.array([calibration.ms(one) for one in known]) / times - 1) / TOLERANCE
            mean = float(np.where(off < 2, off**2, 4 * off - 4).mean())
            found.append(len(rows) * math.log(mean + (_REPEATS_TO / TOLERANCE) ** 2))
        return np.array(found)


def _paid(taken_ms: Floats | float, kept_ms: float) -> Floats:
    """Share of the price of weights that networks pay which take so long."""
    taken = np.asarray(taken_ms, dtype=np.float64)
    return np.asarray(-np.expm1(-((taken / kept_ms) ** _KEPT_SHAPE))) if kept_ms else np.ones_like(taken)


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
    kept_ms = kept_time(totals, measured_ms, smallest_kernel_ms, models)
    common = fit_calibration(totals, measured_ms, smallest_kernel_ms, kept_ms=kept_ms)
    prior = fit_calibration(totals, measured_ms, smallest_kernel_ms, spreads=_NO_WEIGHTS)
    own: list[Calibration | None] = []
    for model in models:
        if OWN_NETWORKS <= len(model) < len(totals):
            mine = measured_ms[list(model)]
            fitted = fit_calibration(_of(totals, model), mine, smallest_kernel_ms, prior, kept_ms=kept_ms)
            own.append(_with_prices(fitted, common))
        else:
            own.append(None)
    return common, own


def leave_one_out(
    totals: Sequence[Totals], measured_ms: Floats, smallest_kernel_ms: float, models: Sequence[Sequence[int]] = ()
) -> Sequence[Calibration]:
    """For each network the calibration, of its model where that has its own, that the others alone would give."""
    model_of = {row: model for model in models for row in model if OWN_NETWORKS <= len(model) < len(totals)}
    times = _KeptTimes(totals, measured_ms, smallest_kernel_ms, models)
    found = []
    for index in range(len(totals)):
        rest = [row for row in range(len(totals)) if row != index]
        kept_ms = times.best(without=index)
        known, others = _of(totals, rest), measured_ms[rest]
        fitted = fit_calibration(known, others, smallest_kernel_ms, kept_ms=kept_ms)
        if index in model_of:
            prior = fit_calibration(known, others, smallest_kernel_ms, spreads=_NO_WEIGHTS, kept_ms=kept_ms)
            rows = [row for row in model_of[index] if row != index]
            own = fit_calibration(_of(totals, rows), measured_ms[rows], smallest_kernel_ms, prior, kept_ms=kept_ms)
            fitted = _with_prices(own, fitted)
        found.append(fitted)
    return found


def _with_prices(own: Calibration, common: Calibration) -> Calibration:
    """A model's calibration; weights of operations that none of its networks has cost what they do in others."""
    return replace(own, per_byte_ms={**common.per_byte_ms, **own.per_byte_ms})


def _of(totals: Sequence[Totals], rows: Sequence[int]) -> list[Totals]:
    return [totals[row] for row in rows]
