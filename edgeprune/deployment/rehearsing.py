"""What a deployment would do on a board, found without leaving anything there: probe, preflight, and the bytes it would send."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edgeprune.boards.board import Board
from edgeprune.budget import Budget
from edgeprune.deployment import preflight
from edgeprune.deployment.artifact import Artifact
from edgeprune.deployment.cargo import Cargo, engine_of
from edgeprune.deployment.signing import require_signed
from edgeprune.deployment.status import read_status
from edgeprune.deployment.threads import thread_notes, threads_for
from edgeprune.spec import Requirement


@dataclass(frozen=True)
class Rehearsal:
    """What `edgeprune.deployment.deploying.deploy` would do.

    Attributes:
        board: The board's name.
        artifact: The artifact's id.
        release: Name of its release on the board.
        runs: Folder of the release that the board runs now, or None.
        again: Whether that is this release already; its checks would run again, and nothing would be switched.
        requirements: What the artifact needs; the board has all of it.
        missing: Name to bytes of the files that the board lacks; ``"reference"`` is the dense engine.
        bytes_to_send: What would be sent of them: without what an upload that broke off left there.
        new_bytes: What the deployment would write on the board's disk.
        free_bytes: What is free there.
        notes: Sentences on threads that a person must know.
    """

    board: str
    artifact: str
    release: str
    runs: str | None
    again: bool
    requirements: tuple[Requirement, ...]
    missing: Mapping[str, int]
    bytes_to_send: int
    new_bytes: int
    free_bytes: int
    notes: tuple[str, ...] = ()


def rehearse(
    artifact: Artifact | str | Path,
    board: str | Board = "local",
    *,
    reference: Artifact | str | Path | None = None,
    signers: str | Path | None = None,
    threads: int | None = None,
    budget: Budget | None = None,
) -> Rehearsal:
    """Say what a deployment would do. No file is written on the board, its lock is not taken, and nothing is switched.

    What needs the artifact there is not found out: parity, latency, and the board's own list of signers.

    Args:
        artifact: The artifact, or its folder.
        board: As in `Board.open`.
        reference: The dense model that would be sent too, to be timed.
        signers: See `edgeprune.deployment.deploying.deploy`, as for `threads`.
        threads: Threads that it would be timed and checked with.
        budget: That it would be held to.

    Raises:
        ManifestError: The artifact is damaged.
        SignatureError: None of the signers has signed it.
        RemoteError: The board cannot be reached.
        EmulatedProcessorError: There is a budget, and the board's processor is emulated.
        IncompatibleTargetError: The board cannot run it; names the field, what is needed and what was found.
        BoardFullError: It does not fit.
    """
    loaded = Artifact.load(artifact.folder if isinstance(artifact, Artifact) else artifact)
    cargo = Cargo(loaded, engine_of(reference))
    threads = threads_for(loaded.manifest, threads)
    known_as = board if isinstance(board, str) else board.name
    with Board.open(board) as opened, opened.untouched():
        require_signed(loaded, opened.signers if signers is None else Path(signers))
        fingerprint = opened.probe()
        preflight.require_real(fingerprint, budget, board=opened.name)
        before = read_status(opened, known_as=known_as)
        lack = cargo.missing(opened)
        new_bytes = cargo.new_bytes(lack, before)
        preflight.check(loaded.manifest, fingerprint, board=opened.name, new_bytes=new_bytes, threads=threads)
    names = {entry.sha256: name for name, entry in cargo.files.items()}
    return Rehearsal(
        board=opened.name,
        artifact=loaded.id,
        release=loaded.release,
        runs=None if before.current is None else before.current.folder,
        again=before.current is not None and before.current.folder[:16] == loaded.release,
        requirements=tuple(preflight.requirements(loaded.manifest, fingerprint, threads)),
        missing={names.get(sha256, "reference"): size for sha256, size in lack.sizes.items()},
        bytes_to_send=lack.total_bytes - lack.begun_bytes,
        new_bytes=new_bytes,
        free_bytes=fingerprint.free_disk_bytes,
        notes=thread_notes(loaded.manifest, fingerprint, threads, board=opened.name),
    )
