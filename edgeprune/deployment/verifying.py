"""Whether a board still holds what was deployed: hashes, the signature, and on request the golden outputs again."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from edgeprune.boards.board import Board
from edgeprune.deployment import agreement, gates, signing
from edgeprune.deployment.agreement import Parity
from edgeprune.deployment.manifest import Manifest
from edgeprune.errors import InconsistentBoardError, ParityError

_TIMEOUT_S = 3600.0


@dataclass(frozen=True)
class Verification:
    """A release that is what its manifest says.

    Attributes:
        board: The board's name.
        release: Folder of the release.
        name: What a person calls the model.
        files: Files whose hashes were compared, the manifest included.
        size_bytes: Their size.
        signer: Who signed it, by the board's list or by this machine's; None where neither has one.
        parity: What the golden inputs gave on the board, where that was asked for.
    """

    board: str
    release: str
    name: str
    files: int
    size_bytes: int
    signer: str | None
    parity: Parity | None


def verify(
    board: str | Board = "local",
    *,
    release: str = "current",
    parity: bool = False,
    threads: int = 1,
    signers: str | Path | None = None,
) -> Verification:
    """Check a release on a board against its manifest; nothing of it is changed.

    With `parity` the board is held, which ends a trial that a run which is gone left there, as every run does that holds it.

    Args:
        board: As in `Board.open`.
        release: ``"current"``, ``"previous"``, or the folder of a release.
        parity: Also run its golden inputs on the board and compare.
        threads: Threads inside one operation, for that.
        signers: List of those who may have signed it; by default the board's, as it was added.

    Raises:
        DeployError: The board holds no such release.
        InconsistentBoardError: A file is missing, altered or extra.
        SignatureError: It is not signed as the board's list, or this machine's, demands.
        ParityError: The outputs are not the golden ones.
        BoardBusyError: Another run holds the board (with `parity` only).
    """
    # Held from the start where it runs too: "current" must not become another release between the two.
    with Board.open(board) as opened, opened.hold("verify") if parity else nullcontext():
        found = opened.call("verify", {"release": release}, timeout_s=_TIMEOUT_S)
        folder = found["folder"]
        if found["damaged"]:
            raise InconsistentBoardError(
                f"release {folder} on board {opened.name} must be what its manifest says, found {', '.join(found['damaged'])} "
                "missing, altered or extra.",
                hint="edgeprune deploy of the same artifact puts a whole copy there",
            )
        text = found["manifest"].encode()
        manifest = Manifest.parse(text, f"the manifest of release {folder} on board {opened.name}")
        listed = opened.signers if signers is None else Path(signers)
        signer = found["signer"]
        if listed is not None:
            signer = signing.require_signer(
                text, found["signature"], listed, what=f"release {folder} on board {opened.name}"
            )
        compared = None
        if parity:
            request = {"release": folder, **agreement.request(manifest, threads=threads)}
            answer = opened.call("parity", request, timeout_s=gates.PARITY_TIMEOUT_S)
            compared = Parity.from_result(answer, manifest)
            if not compared.passed:
                raise ParityError(
                    f"release {folder} ({manifest.name}) on board {opened.name} {compared.complaint()}.",
                    hint="edgeprune rollback, and edgeprune doctor: did the board's runtime change?",
                )
    return Verification(
        board=opened.name,
        release=folder,
        name=manifest.name,
        files=len(manifest.files) + 1,
        size_bytes=len(text) + sum(entry.size_bytes for entry in manifest.files.values()),
        signer=signer,
        parity=compared,
    )
