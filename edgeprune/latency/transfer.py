"""Few-shot transfer: a few kernels of a new device correct what another device's predictor says.

Two devices that run the same operations rank them alike and step at similar places, so ten kernels are enough to learn how
one device's times map to another's, where they would not do for a regression of their own. What the map is (a factor, a
line in log space, a monotone curve, a regression of what these miss) and whether there is one at all is decided by
cross-validation on the new device's kernels, family by family.

Source: correcting another platform's predictor with few samples, Lee, Lee, Chong and Hwang, "HELP: hardware-adaptive
efficient latency prediction for NAS via meta-learning", NeurIPS 2021, and Feng, Zhang, Li et al., "LitePred: transferable
and scalable latency prediction for hardware-aware neural architecture search", NSDI 2024; the maps here are simpler.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from edgeprune.errors import UnsupportedKernelError
from edgeprune.latency.arrays import Floats
from edgeprune.spec import Kernel

if TYPE_CHECKING:
    from edgeprune.latency.predictor import Predictor

SourceTimes = Callable[[Sequence[Kernel]], Floats]
"""Kernels to the log milliseconds that another device's predictor says, shape (kernels,)."""

TRANSFER = "transfer"
"""What names of candidates begin with that stand on another device's predictor."""

FEW_ROWS, SOME_ROWS, MANY_ROWS = 8, 20, 40


PREFERRED = f"{TRANSFER}_blend"
"""Mean of a regression on top of the other device and one without it: the safe choice where there is little to choose by."""

PREFERENCE = 0.9
"""Another candidate must come below this share of the preferred one's cross-validated error to be taken instead.

Tried on convolutions of four accelerators with a fifth as the source, 10, 20 and 40 rows, five draws: the least error alone
picks candidates that turn out worse than this mean, most of all from 10 rows.
"""


def candidates(rows: int) -> tuple[str, ...]:
    """Names of the corrections worth trying on that many rows, in addition to those without another device."""
    simple = (TRANSFER, f"{TRANSFER}_line")
    if rows < FEW_ROWS:
        return simple
    if rows < SOME_ROWS:
        return (*simple, f"{TRANSFER}_ridge", PREFERRED)
    trees = (f"{TRANSFER}_monotone", f"{TRANSFER}_trees", f"{TRANSFER}_trees_blend")
    forests = () if rows < MANY_ROWS else (f"{TRANSFER}_forests",)
    return (*simple, f"{TRANSFER}_ridge", PREFERRED, *trees, *forests)


def chosen(scores: Mapping[str, float]) -> str:
    """The candidate to take, from cross-validated errors; on equal ones what the other device says."""
    best = min(scores, key=lambda name: (scores[name], not name.startswith(TRANSFER)))
    # With enough rows for trees the errors can be told apart.
    few = PREFERRED in scores and f"{TRANSFER}_forests" not in scores
    return PREFERRED if few and scores[best] > PREFERENCE * scores[PREFERRED] else best


def source_times(source: Predictor, kernels: Sequence[Kernel]) -> SourceTimes | None:
    """What a predictor of another device says of kernels of one family; None where it cannot judge them.

    A precision that the other device's table lacks is judged by the one that it has.
    """
    for precision in (kernels[0].precision, *sorted({kernel.precision for kernel in source.table.kernels})):

        def times(asked: Sequence[Kernel], precision: str = precision) -> Floats:
            return np.log(source.kernel_ms([replace(kernel, precision=precision) for kernel in asked]))  # type: ignore[arg-type]

        try:
            times(kernels)
        except UnsupportedKernelError:
            continue
        return times
    return None


class Line:
    """What the source misses as a line over what it says, drawn towards no slope while there are few rows."""

    PRIOR_ROWS = 2.0

    def fit(self, X: Floats, y: Floats) -> Line:
        said = X[:, -1]
        self._center = float(np.mean(said))
        spread = float(np.sum((said - self._center) ** 2))
        # As if so many rows, one log unit away, had said that there is no slope.
        self._slope = float(np.sum((said - self._center) * (y - np.median(y)))) / (spread + self.PRIOR_ROWS)
        self._offset = float(np.median(y - self._slope * (said - self._center)))
        return self

    def predict(self, X: Floats) -> Floats:
        return self._offset + self._slope * (X[:, -1] - self._center)


class Monotone:
    """A monotone curve from what the source says to what was measured; outside of it, the line goes on."""

    def fit(self, X: Floats, y: Floats) -> Monotone:
        from sklearn.isotonic import IsotonicRegression

        said = X[:, -1]
        self._line = Line().fit(X, y)
        self._curve = IsotonicRegression(out_of_bounds="clip").fit(said, said + y)
        self._ends = float(said.min()), float(said.max())
        return self

    def predict(self, X: Floats) -> Floats:
        said = X[:, -1]
        inside = np.clip(said, *self._ends)
        curve = self._curve.predict(inside) - inside
        # Half of each: the curve alone is a staircase of its own.
        line = self._line.predict(X)
        return np.where(said == inside, 0.5 * (curve + line), line)
