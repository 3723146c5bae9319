"""Arrays that the files of this package share."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def padded(count: Floats, step: float) -> Floats:
    """Counts rounded up to whole steps."""
    return np.ceil(count / step) * step
