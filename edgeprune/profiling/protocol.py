"""How the items of a measuring run are timed."""

from __future__ import annotations

from dataclasses import dataclass

from edgeprune.profiling.levels import PATIENCE


@dataclass(frozen=True)
class Protocol:
    """How items are timed; part of a journal's and of a table's header.

    Attributes:
        samples: Samples per item and round.
        sample_ms: Least length of one sample, milliseconds.
        warmup_ms: Least warm-up before each item, milliseconds.
        every: Most items between two sentinels.
        drift_limit: Relative distance of a sentinel from its usual level beyond which its stretch is repeated, once all
            rounds are done.
        max_repeats: How often a stretch is repeated at most.
        per_call: Most items per call to the board.
        passes: How often a round measures each network that is not the sentinel.
        patience: As many times its time may an item wait for the core to be its own, see the board's ``pace``; less where
            the budget would not last.
    """

    samples: int = 5
    sample_ms: float = 5.0
    warmup_ms: float = 20.0
    every: int = 20
    drift_limit: float = 0.03
    max_repeats: int = 3
    per_call: int = 256
    passes: int = 1
    patience: float = PATIENCE
