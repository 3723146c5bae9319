"""Which level a machine keeps coming back to, where others slow it down now and then.

A virtual machine shares its cores with neighbors that it cannot see: one that computes on the other hardware thread of a core
makes arithmetic up to 1.8 times slower and passes over memory 1.3 times (measured on a virtual x86-64 server), for
milliseconds or for seconds, again and again. Kernels are not all slowed alike, so a table that mixes both states is right in
neither. The median of a run is no guide: it lies in the slow state, or between the two, as soon as that takes half of the time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

WITHIN = 0.05
"""Relative distance up to which times are of one level: a neighbor costs more than that, noise less."""

SLOWED = 1.12
"""What arithmetic on the board takes, over its usual time, beyond which a sample beside it was slowed by somebody else."""

PATIENCE = 8.0
"""As many times its own time may an item wait on the board for the core to be its own, and take samples anew."""

COMPARED_PATIENCE = 4.0
"""The same in comparisons, which time rounds again that were slowed all the same."""

_PARTS, _LEAST_IN_PART = 8, 10


def usual(times_ms: Sequence[float], low: float = 0.2) -> float:
    """The fastest level that a run comes back to all along.

    The times are cut into up to eight parts in their order. A part's level is the median of what lies within `WITHIN` of its
    20th percentile (`low`), and the run's is the median of its parts. So others may slow the machine down most of the time,
    as long as they leave a fifth of half of the parts alone; a board that grows slower as it grows warm is taken as it is in
    the middle of the run, and not as it was when it was cold.

    Args:
        times_ms: What the same thing took, in the order of measuring; at least one.
        low: Share of the times of a part that are in its fastest state at least.

    Returns:
        In the unit of the times.
    """
    values = np.asarray(times_ms, dtype=np.float64)
    count = max(1, min(_PARTS, len(values) // _LEAST_IN_PART))
    levels = []
    for part in np.array_split(values, count):
        fast = np.quantile(part, low)
        levels.append(float(np.median(part[part <= fast * (1 + WITHIN)])))
    return sorted(levels)[(count - 1) // 2]


def slowest_pace(paces_ns: Sequence[float]) -> float:
    """What the board's arithmetic may take beside a sample that counts, nanoseconds; infinite where it was not looked at.

    Args:
        paces_ns: ``pace_ns`` of all samples of a run, in order.
    """
    return SLOWED * usual(paces_ns, low=0.1) if paces_ns else math.inf
