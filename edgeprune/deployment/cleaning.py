"""Taking away from a board what edgeprune put there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from edgeprune.boards.board import Board
from edgeprune.deployment.status import remember_status
from edgeprune.errors import ConfigError

_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Removal:
    """What `clean` removed from a board, or would.

    Attributes:
        board: Its name.
        removed: Path on the board to bytes.
        current: Release that the board still has as its current one, or None.
    """

    board: str
    removed: Mapping[str, int] = field(default_factory=dict)
    current: str | None = None


def clean(board: str | Board = "local", *, releases: bool = False, dry_run: bool = False) -> Removal:
    """Remove what `edgeprune.deployment.environment.set_up` made on a board, and uploads that nothing needs.

    Args:
        board: As in `Board.open`.
        releases: Remove the releases too, the current one with them, and the folder of edgeprune itself.
        dry_run: Only tell.

    Raises:
        BoardBusyError: Another run holds the board.
    """
    with Board.open(board) as opened:
        with opened.using(opened.base_python), opened.hold("device clean"):
            result = opened.call("clean", {"releases": releases, "dry_run": dry_run}, timeout_s=_TIMEOUT_S)
        if not dry_run:
            opened.greet()
    return Removal(opened.name, {entry["what"]: entry["bytes"] for entry in result["removed"]}, result["current"])


@dataclass(frozen=True)
class Shortened:
    """What `clean_releases` left.

    Attributes:
        removed: Folders of the releases that went.
        freed_bytes: What that freed, with uploads that nothing needed.
        kept: Folders of the releases that the board holds.
    """

    removed: tuple[str, ...]
    freed_bytes: int
    kept: tuple[str, ...]


def clean_releases(board: str | Board = "local", *, keep: int = 3) -> Shortened:
    """Remove all but the last releases from a board, and uploads, engines and runners of which nobody has asked for a day.

    Args:
        board: As in `Board.open`.
        keep: How many stay; the current and the previous one always do.

    Raises:
        ConfigError: `keep` is below 1.
        BoardBusyError: Another run holds the board.
    """
    if keep < 1:
        raise ConfigError(f"a board must keep at least 1 release, found {keep}.")
    known_as = board if isinstance(board, str) else board.name
    with Board.open(board) as opened, opened.hold("clean"):
        left = opened.call("gc", {"keep": keep}, timeout_s=_TIMEOUT_S)
        now = remember_status(opened, left["status"], known_as=known_as)
    return Shortened(tuple(left["removed"]), left["freed_bytes"], tuple(release.folder for release in now.releases))
