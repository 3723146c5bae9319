"""Whether a board has a core for each thread of a runtime.

Threads of one operation wait for each other by spinning. Where two of them share a core, each burns the time that the other
waits for: dense and pruned engine both become slower by multiples, and a budget that is a share of dense does not see it.
"""

from __future__ import annotations

import re

from edgeprune.errors import ConfigError
from edgeprune.spec import Fingerprint, Requirement


def requirement(fingerprint: Fingerprint, threads: int) -> Requirement:
    """A core for each thread, of those that the board lets its user have."""
    there = int(fingerprint.facts.get("cores_there") or fingerprint.cores)
    ours = str(fingerprint.cores)
    return Requirement(
        "cores",
        f"{threads} (one for each thread)",
        f"{ours} of its {there} that we may use" if there > fingerprint.cores else ours,
        threads <= fingerprint.cores,
        f"--threads {fingerprint.cores}, or let its user have more cores (taskset, cpuset)",
    )


def require_cores(fingerprint: Fingerprint, threads: int, *, board: str, hint: str | None = None) -> None:
    """Refuse to measure with more threads than a board has cores for.

    Raises:
        ConfigError: Says how many it has; `hint` is the next step, by default fewer threads.
    """
    needed = requirement(fingerprint, threads)
    if not needed.met:
        wanted = f"{counted(threads, 'core')} for {counted(threads, 'thread')}"
        raise ConfigError(f"board {board} must have {wanted}, found {needed.found}.", hint=hint or needed.hint)


def quota_note(fingerprint: Fingerprint, threads: int, *, board: str) -> str | None:
    """A sentence where a control group leaves less time than so many threads use, else None."""
    quota = fingerprint.facts.get("cores_quota")
    if quota is None or float(quota) >= threads:
        return None
    return (
        f"a control group bounds board {board} to the time of {float(quota):.3g} cores, fewer than "
        f"{counted(threads, 'thread')}: under load an engine is held up longer than a few timed inferences show; raise the "
        "quota, or fewer --threads."
    )


def core_list(text: str) -> tuple[int, ...]:
    """Numbers of cores as ``taskset -c`` takes them, ``4-7`` or ``0,2-3``; ascending, each once.

    Raises:
        ValueError: It is no such list.
    """
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,4})(?:-([0-9]{1,4}))?\s*", part)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise ValueError("cores are written as taskset takes them, 4-7 or 0,2-3")
        found.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return tuple(sorted(found))


def counted(number: int, noun: str) -> str:
    """``"1 core"``, ``"2 cores"``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
