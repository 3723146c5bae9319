"""Whether times can be those of any device: what they would make it compute in a second."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from edgeprune.latency.features import Machine, features
from edgeprune.spec import Kernel

HIGHEST_RATE = 2e16
"""Multiply-accumulates per second that no single device reaches: some four times the peak of the fastest accelerator of
2025 at its lowest precision. A time in seconds that is taken for milliseconds is a thousand times too short."""

LOWEST_RATE = 1e4
"""Median multiply-accumulates per second below which a table cannot be in the stated unit: a hundredth of a slow
microcontroller's rate."""


class ImpossibleRate(NamedTuple):
    """Times that no device can have.

    Attributes:
        text: What they must be and what was found, after "times that a device can".
        unit: What they are likely to be in, ``s`` or ``us``, where they are taken for milliseconds.
    """

    text: str
    unit: str


def impossible_rate(times_ms: Mapping[Kernel, float]) -> ImpossibleRate | None:
    """What is impossible about times of convolutions and matrix products; None where they can be.

    Args:
        times_ms: Kernel to its shortest time, milliseconds; other kernels do not multiply, and are not looked at.
    """
    kernels = [kernel for kernel in times_ms if kernel.family in ("conv", "gemm")]
    if not kernels:
        return None
    macs = [float(value) for value in map(math.exp, features(kernels, Machine()).column("log_macs"))]
    rates = [work / (times_ms[kernel] * 1e-3) for work, kernel in zip(macs, kernels, strict=True)]
    fastest = max(range(len(rates)), key=rates.__getitem__)
    if rates[fastest] > HIGHEST_RATE:
        return ImpossibleRate(
            f"reach, found {times_ms[kernels[fastest]]:g} ms for {macs[fastest]:.3g} multiply-accumulates "
            f"({rates[fastest]:.1e} per second)",
            "s",
        )
    middle = sorted(rates)[len(rates) // 2]
    if middle < LOWEST_RATE:
        return ImpossibleRate(
            f"have, found {middle:.1e} multiply-accumulates per second in the middle of its rows", "us"
        )
    return None
