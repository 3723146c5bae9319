"""How many threads an engine is timed and checked with, beside those that its artifact was made for."""

from __future__ import annotations

from edgeprune.boards.cores import counted, quota_note
from edgeprune.deployment.manifest import Manifest
from edgeprune.spec import Fingerprint

_MUCH_SLOWER = 2.0


def threads_for(manifest: Manifest, asked: int | None) -> int:
    """Threads to time and check with: what was asked for, else those that the artifact's latency is of, else 1."""
    return asked or manifest.threads or 1


def thread_notes(manifest: Manifest, fingerprint: Fingerprint, threads: int, *, board: str) -> tuple[str, ...]:
    """Sentences on threads that a person must know beside a verdict; none where all is as the artifact was made for."""
    found = []
    made_for = manifest.threads
    if made_for is not None and made_for != threads:
        was = "measured" if manifest.measured is not None and manifest.measured.threads is not None else "predicted"
        found.append(
            f"{counted(threads, 'thread')} asked for, but the latency of this artifact was {was} with "
            f"{counted(made_for, 'thread')}: its widths were chosen for that, and only what was timed now holds for {threads}; "
            f"deploy with --threads {made_for}, or profile with --threads {threads} and prune with that table."
        )
    held_up = quota_note(fingerprint, threads, board=board)
    return tuple(found) if held_up is None else (*found, held_up)


def slower_note(manifest: Manifest, timed_ms: float, threads: int) -> str | None:
    """A sentence where an engine takes a multiple of what its artifact says; a share of dense does not see that."""
    cost = manifest.measured or manifest.predicted
    if cost is None or cost.threads not in (None, threads) or timed_ms <= _MUCH_SLOWER * cost.latency_ms:
        return None
    was = "measured" if manifest.measured is not None else "predicted"
    return (
        f"the engine took {timed_ms:.4g} ms with {counted(threads, 'thread')}, {timed_ms / cost.latency_ms:.1f} times the "
        f"{cost.latency_ms:.4g} ms that were {was} for this artifact: the board is busy, slower than the one that was meant, or "
        "has fewer cores to itself than threads; edgeprune doctor --board BOARD, then deploy again."
    )
