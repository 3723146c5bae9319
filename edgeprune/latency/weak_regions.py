"""Where a predictor is weak: kinds of kernels that it misses by more than the rest of their family.

A region is what kernels have in common that a person can name: operation, grouping, window, stride, channel counts that are no
multiple of 8, the quarter with the shortest times. Of a family's regions those are told whose held-out errors are significantly
above the family's median error: a one-sided sign test, at 1 % over all regions of the family together (Bonferroni).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeprune.latency.arrays import Floats
from edgeprune.latency.features import channels_of
from edgeprune.latency.intervals import repeatability
from edgeprune.spec import Kernel, Measurement

LEAST = 8
"""Kernels of a region, and of what is beside it."""
SIGNIFICANCE = 0.01
NOTABLE = 1.25
"""A region's median error over that of the rest of its family, from which on it is told."""
_ALIGNED = 8


def weak_regions(
    family: str, kernels: Sequence[Kernel], errors: Floats, timed: Mapping[str, Measurement]
) -> list[dict[str, Any]]:
    """The weak regions of one family, the weakest first.

    Args:
        family: As in `Kernel.family`.
        kernels: Measured ones.
        errors: Relative held-out error of each, shape (kernels,).
        timed: Key of each kernel to what was measured.

    Returns:
        Rows with ``family``, ``region``, ``n``, ``median_error_percent``, ``within_10_percent``,
        ``elsewhere_median_percent`` (the rest of the family) and ``noise_median_percent`` (what measurements of the region
        repeat to; None where they were not repeated).
    """
    from scipy.stats import binomtest

    if len(kernels) < 2 * LEAST:
        return []
    regions = {
        name: inside
        for name, inside in _regions(kernels, timed).items()
        if inside.sum() >= LEAST and (~inside).sum() >= LEAST
    }
    usual = float(np.median(errors))
    found = []
    for name, inside in regions.items():
        here, elsewhere = errors[inside], float(np.median(errors[~inside]))
        chance = binomtest(int((here > usual).sum()), len(here), 0.5, alternative="greater").pvalue
        if chance * len(regions) >= SIGNIFICANCE or np.median(here) < NOTABLE * elsewhere:
            continue
        noise = repeatability(
            timed[kernel.key].rounds_ms for kernel, within in zip(kernels, inside, strict=True) if within
        )
        found.append(
            {
                "family": family,
                "region": name,
                "n": len(here),
                "median_error_percent": 100 * float(np.median(here)),
                "within_10_percent": 100 * float(np.mean(here <= 0.10)),
                "elsewhere_median_percent": 100 * elsewhere,
                "noise_median_percent": 100 * float(np.median(noise)) if len(noise) else None,
            }
        )
    return sorted(found, key=lambda row: (-row["median_error_percent"], row["region"]))


def _regions(kernels: Sequence[Kernel], timed: Mapping[str, Measurement]) -> dict[str, NDArray[np.bool_]]:
    """Name of each region to which kernels lie in it, shape (kernels,)."""
    names = [set(_names(kernel)) for kernel in kernels]
    regions = {
        name: np.array([name in mine for mine in names]) for name in sorted({name for mine in names for name in mine})
    }
    times = np.array([timed[kernel.key].median_ms for kernel in kernels])
    quarter = float(np.quantile(times, 0.25))
    return {**regions, f"shorter than {quarter:.3g} ms": times < quarter}


def _names(kernel: Kernel) -> list[str]:
    found = [kernel.op, *(text for name in ("kernel", "stride") if (text := _window(kernel, name)))]
    groups = kernel.attribute("groups")
    channels = [channels_of(kernel.family, shape) for shape in (*kernel.inputs[:1], kernel.output)]
    if isinstance(groups, int) and groups > 1:
        found.append("depthwise" if groups == channels[0] == channels[1] else "grouped")
    if any(count % _ALIGNED for count in channels):
        found.append(f"channels no multiple of {_ALIGNED}")
    return found


def _window(kernel: Kernel, name: str) -> str:
    sizes = kernel.attribute(name)
    if not isinstance(sizes, tuple):
        return ""
    return f"{'stride ' if name == 'stride' else ''}{'x'.join(str(size) for size in sizes)}"
