"""What a deployment brings to a board: the artifact's files by their hashes, and a dense engine to time beside it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from edgeprune.deployment.artifact import Artifact, describe_file
from edgeprune.deployment.manifest import MANIFEST_NAME, SIGNATURE_NAME
from edgeprune.errors import ConfigError

if TYPE_CHECKING:
    from edgeprune.boards.board import Board
    from edgeprune.deployment.status import BoardStatus

_TIMEOUT_S = 60.0


class Lack(NamedTuple):
    """What a board lacks of the files.

    Attributes:
        sizes: sha256 to size of each, bytes.
        begun_bytes: Of them what an upload that broke off left on the board, and is not sent again.
    """

    sizes: dict[str, int]
    begun_bytes: int

    @property
    def total_bytes(self) -> int:
        """Of all of them."""
        return sum(self.sizes.values())


class Cargo:
    """The files.

    Args:
        artifact: What is to be released.
        dense: Engine file that the release is timed against, or None; it is never released.

    Attributes:
        files: Of the release, by name.
        paths: Every file on this machine, by sha256.
        sizes: Their sizes, bytes, by sha256.
    """

    def __init__(self, artifact: Artifact, dense: Path | None) -> None:
        self._artifact = artifact
        self.files = dict(artifact.manifest.files)
        for name in (MANIFEST_NAME, SIGNATURE_NAME):
            if (artifact.folder / name).is_file():
                self.files[name] = describe_file(artifact.folder / name)
        self.paths = {entry.sha256: artifact.folder / name for name, entry in self.files.items()}
        self.sizes = {entry.sha256: entry.size_bytes for entry in self.files.values()}
        if dense is not None:
            entry = describe_file(dense)
            self.paths[entry.sha256], self.sizes[entry.sha256] = dense, entry.size_bytes

    def missing(self, board: Board) -> Lack:
        """What the board's store lacks of them."""
        answer = board.call("store", {"action": "missing", "blobs": self.sizes}, timeout_s=_TIMEOUT_S)
        return Lack({sha256: self.sizes[sha256] for sha256 in answer["missing"]}, answer["incoming_bytes"])

    def new_bytes(self, lack: Lack, before: BoardStatus) -> int:
        """Bytes that a deployment writes on a board: the store and the release hold a copy each.

        Args:
            lack: Of `missing`.
            before: What the board holds.
        """
        there = any(release.folder[:16] == self._artifact.release for release in before.releases)
        return lack.total_bytes + (0 if there else self._artifact.size_bytes)


def engine_of(reference: Artifact | str | Path | None) -> Path | None:
    """Engine file of the dense model; an artifact's is verified.

    Raises:
        ConfigError: There is no such file.
    """
    if reference is None:
        return None
    if isinstance(reference, Artifact):
        return Artifact.load(reference.folder).engine
    path = Path(reference)
    if path.is_dir():
        return Artifact.load(path).engine
    if not path.is_file():
        raise ConfigError(f"the reference must be an artifact or an engine file, found none at {path}.")
    return path
