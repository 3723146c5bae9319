"""Taking away from a board what edgeprune put there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from edgeprune.boards.board import Board

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
