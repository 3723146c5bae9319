"""How much of a core the measuring process got, from which it follows how much fits into the time."""

from __future__ import annotations

from edgeprune.profiling.measured import MeasuredRun

_OWN_CORE, _LEAST_SHARE = 0.85, 0.2
"""Above the first, a core counts as one's own; below the second, what is measured would be too little to fit anything to."""


def core_share(quick: MeasuredRun, threads: int) -> float:
    """Share of a core that the measuring process got; 1 where it is about all of it, or cannot be told (several threads).

    A core whose units somebody else uses is shared too: what was lost to waiting for it, will be lost again.

    Args:
        quick: What was measured on the board just now.
        threads: Threads inside one operation.
    """
    timed = [
        pair for found in quick.measurements.values() for pair in zip(found.times_ms, found.cpu_share, strict=True)
    ]
    whole_ms = sum(ms for ms, _ in timed)
    if threads > 1 or not whole_ms:
        return 1.0
    share = sum(ms * share for ms, share in timed) / whole_ms
    own = (1.0 if share > _OWN_CORE else share) * (1 - min(1.0, quick.lost_s / quick.spent_s))
    return max(own, _LEAST_SHARE)
