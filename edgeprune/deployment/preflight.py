"""What an artifact needs, and whether a board has it: asked before a byte is sent."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.backends import registry
from edgeprune.boards import cores
from edgeprune.boards.installing import for_board
from edgeprune.budget import Budget
from edgeprune.deployment.manifest import Manifest
from edgeprune.errors import BoardFullError, EmulatedProcessorError, IncompatibleTargetError
from edgeprune.spec import Fingerprint, Requirement, TensorSpec

if TYPE_CHECKING:
    from edgeprune.backends._base import Backend

RESERVE_BYTES = 16 << 20
"""Disk space that stays free on a board."""

_log = logging.getLogger("edgeprune.deployment.preflight")


def needs_of(backend: Backend, engine: Path, tensors: Sequence[TensorSpec]) -> dict[str, Any]:
    """The ``requires`` block of a manifest.

    What the engine itself needs its backend tells; a portable file is bound neither to an architecture nor to an instruction
    set and names none.

    Args:
        backend: What made the engine.
        engine: The engine file.
        tensors: Inputs and outputs.
    """
    import numpy as np

    size = engine.stat().st_size
    moved = sum(int(np.prod(tensor.shape)) * np.dtype(tensor.dtype).itemsize for tensor in tensors)
    needs: dict[str, Any] = {
        "runtime": backend.name,
        # Weights as stored and as the runtime packs them; activations are not known before it runs.
        "memory_bytes": 2 * size + moved,
    }
    return {**needs, **backend.needs(engine)}


def requirements(manifest: Manifest, fingerprint: Fingerprint, threads: int | None = None) -> list[Requirement]:
    """Everything that the artifact needs, with so many threads where they are known, each with whether the board has it."""
    needs = manifest.requires
    found = registry.get(manifest.backend).requirements(fingerprint, needs)
    architecture = needs.get("architecture")
    if architecture is not None:
        found.append(
            Requirement(
                "architecture",
                str(architecture),
                fingerprint.architecture,
                architecture == fingerprint.architecture,
                "compile the artifact for this board",
            )
        )
    missing = sorted(set(needs.get("isa", ())) - set(fingerprint.isa))
    if "isa" in needs:
        found.append(
            Requirement(
                "instruction sets",
                " ".join(needs["isa"]),
                f"none of {' '.join(missing)}" if missing else "all of them",
                not missing,
                "compile the artifact for this board",
            )
        )
    if threads is not None:
        found.append(cores.requirement(fingerprint, threads))
    memory = int(needs.get("memory_bytes", 0))
    # What other programs have taken is not there for the engine; a board that tells neither may have enough.
    free = fingerprint.facts.get("memory_available_bytes") or fingerprint.memory_bytes
    if free:
        found.append(
            Requirement(
                "memory",
                f"{memory / 1e6:.1f} MB",
                f"{free / 1e6:.1f} MB",
                memory <= free,
                "end other programs on the board, or a smaller budget",
            )
        )
    return found


def require_real(fingerprint: Fingerprint, budget: Budget | None, *, board: str) -> None:
    """Refuse to hold an emulated processor to a budget.

    Raises:
        EmulatedProcessorError: Nothing that is timed there means anything.
    """
    if budget is not None and fingerprint.facts.get("emulated"):
        raise EmulatedProcessorError(
            f"board {board} must have a real processor to be held to a budget of {budget}, its"
            f" {fingerprint.architecture} is emulated.",
            hint="deploy without a budget: numbers are checked there, nothing is timed",
        )


def check(
    manifest: Manifest, fingerprint: Fingerprint, *, board: str, new_bytes: int = 0, threads: int | None = None
) -> None:
    """Refuse a board that cannot run an artifact.

    Args:
        manifest: Of what is to be deployed.
        fingerprint: The board as probed now.
        board: What errors call it.
        new_bytes: Bytes that a deployment would write: twice the artifact's size when it is new there, because the store and
            the release hold a copy each.
        threads: Threads that the engine is to run with: the board must have a core for each.

    Raises:
        IncompatibleTargetError: Names the field, what is needed and what was found.
        BoardFullError: Less free disk than `new_bytes` and a reserve.
    """
    for requirement in requirements(manifest, fingerprint, threads):
        _log.debug("%s: %s needs %s", board, requirement.field, requirement.needed)
        if not requirement.met:
            raise IncompatibleTargetError(
                requirement.field, requirement.needed, requirement.found, hint=for_board(requirement.hint, board)
            )
    needed = new_bytes + RESERVE_BYTES if new_bytes else 0
    if fingerprint.free_disk_bytes < needed:
        raise BoardFullError(
            f"board {board} must have {needed / 1e6:.1f} MB free for the artifact, "
            f"found {fingerprint.free_disk_bytes / 1e6:.1f} MB.",
            hint="free space there, or give the board another root folder",
        )
