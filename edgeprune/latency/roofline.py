"""Time of a kernel as padded work over a rate, plus traffic over a bandwidth, plus a fixed cost.

Source: the roofline model, Williams, Waterman and Patterson, "Roofline: an insightful visual performance model for
multicore architectures", Communications of the ACM 52(4), 2009; here with a sum in place of the maximum, which is smooth
and linear in its unknowns. It is what a regression falls back to where it has seen nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from edgeprune.latency.arrays import Floats
from edgeprune.latency.features import FeatureMatrix

OWN_RATES_ROWS = 8
"""An operation with fewer rows gets its family's rates, scaled."""

SCALE_SHRINKAGE_ROWS = 2
"""The scale of such an operation is drawn towards 1 as if this many rows had said 1."""


@dataclass(frozen=True)
class Roofline:
    """Non-negative rates; milliseconds per multiply-accumulate, per byte, per byte of slow traffic, per call.

    Attributes:
        shared: Rates of the whole family, shape (4,).
        own: Operation to its rates.
        floor_ms: No kernel is predicted to be quicker.
    """

    shared: Floats
    own: Mapping[str, Floats]
    floor_ms: float

    @classmethod
    def fit(cls, matrix: FeatureMatrix, ops: np.ndarray, ms: Floats) -> Roofline:
        """Least squares of relative errors under non-negative rates, per operation where there are enough rows."""
        terms = _terms(matrix)
        shared = _rates(terms, ms)
        own = {}
        for op in sorted(set(ops.tolist())):
            rows = ops == op
            if rows.sum() >= OWN_RATES_ROWS:
                own[op] = _rates(terms[rows], ms[rows])
            else:
                offset = np.median(np.log(ms[rows]) - np.log(np.maximum(terms[rows] @ shared, 1e-12)))
                own[op] = shared * np.exp(offset * rows.sum() / (rows.sum() + SCALE_SHRINKAGE_ROWS))
        return cls(shared, own, floor_ms=0.5 * float(ms.min()))

    def ms(self, matrix: FeatureMatrix, ops: np.ndarray) -> Floats:
        """Milliseconds, shape (kernels,)."""
        terms = _terms(matrix)
        times = terms @ self.shared
        for op, rates in self.own.items():
            rows = ops == op
            times[rows] = terms[rows] @ rates
        return np.maximum(times, self.floor_ms)


def _terms(matrix: FeatureMatrix) -> Floats:
    return np.stack([matrix.work, matrix.traffic, matrix.slow_traffic, np.ones(len(matrix.work))], axis=1)


def _rates(terms: Floats, ms: Floats) -> Floats:
    from scipy.optimize import nnls

    relative = terms / ms[:, None]
    scale = np.maximum(relative.max(axis=0), 1e-300)  # The columns differ by ten orders of magnitude.
    rates, _ = nnls(relative / scale, np.ones(len(ms)))
    return np.asarray(rates / scale, dtype=np.float64)
