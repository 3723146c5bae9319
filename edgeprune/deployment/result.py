"""What a deployment tells."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgeprune.deployment.agreement import Parity


@dataclass(frozen=True)
class Deployment:
    """A deployment that went through.

    Attributes:
        board: The board's name.
        artifact: The artifact's id.
        release: Folder of the release on the board.
        previous: Folder of the release that ran before and is kept, or None.
        changed: False when the board ran this release already.
        parity: What the parity check on the board found.
        measured_ms: Median latency on the board, milliseconds; None where nothing was timed, because its processor is emulated.
        dense_ms: Median of the dense engine in the same rounds; None without a reference.
        ratio: Release over dense, interleaved; None without a reference.
        ratio_low: Lower end of its 95 % confidence interval.
        ratio_high: Upper end.
        latency_ms: What the budget was held against, milliseconds; None where nothing was timed.
        conditions: State of the board before and after the measurement.
        bytes_sent: Bytes of files that the board did not have.
        seconds: How long it all took.
        threads: Threads that it was timed and checked with.
        made_for_threads: Those that the artifact's own latency is of; None where nothing says so.
        disturbance: Where rounds of the measurement were disturbed, a clause on how many; else empty.
        notes: Sentences that a person must know beside the verdict.
    """

    board: str
    artifact: str
    release: str
    previous: str | None
    changed: bool
    parity: Parity
    measured_ms: float | None
    dense_ms: float | None
    ratio: float | None
    ratio_low: float | None
    ratio_high: float | None
    latency_ms: float | None
    conditions: Mapping[str, Any]
    bytes_sent: int
    seconds: float
    threads: int = 1
    made_for_threads: int | None = None
    disturbance: str = ""
    notes: tuple[str, ...] = ()
