"""What a board measured and could not tell, because the link or the host was gone: found in the journal, asked for, taken over.

Before each call to the board the journal says what is asked for. The board keeps its own copy of what it tells, line by line in
the same order (`edgeprune.boards.onboard.kept`); so of a call without an end the host lacks what lies behind the records that it
has.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgeprune.profiling.rounds import Slot

if TYPE_CHECKING:
    from edgeprune.boards.board import Board

_TOLD = ("call", "unusable", "sample")
"""Records that stand for one line of the board's copy each."""


@dataclass(frozen=True)
class Asked:
    """One call to the board.

    Attributes:
        name: Of the board's copy.
        number: Round.
        attempt: At that round's stretches.
        order: What is measured, in order.
        have: Lines of it that the host has.
    """

    name: str
    number: int
    attempt: int
    order: tuple[Slot, ...]
    have: int = 0

    @classmethod
    def anew(cls, number: int, attempt: int, order: Sequence[Slot]) -> Asked:
        """A call that is about to be made."""
        return cls(secrets.token_hex(8), number, attempt, tuple(order))

    def record(self) -> dict[str, Any]:
        """As a journal's record."""
        order = [[slot.name, slot.stretch, slot.opens, slot.closes] for slot in self.order]
        return {"kind": "asked", "name": self.name, "round": self.number, "attempt": self.attempt, "order": order}

    def lines(self, board: Board) -> list[dict[str, Any]]:
        """The events that the host lacks, oldest first; none where the board kept nothing.

        Raises:
            RemoteError: The board was lost.
        """
        found: list[dict[str, Any]] = []
        request = {"name": self.name, "from": self.have}
        board.call("kept", request, on_event=lambda event: found.append(event["line"]))
        return found


def unsettled(records: Iterable[Mapping[str, Any]]) -> Asked | None:
    """The call of a journal that never ended; None where all did, or where it is not known what was asked for.

    Args:
        records: Of the journal, in order.
    """
    asked: Mapping[str, Any] | None = None
    have = 0
    for record in records:
        kind = record["kind"]
        if kind == "asked":
            asked, have = record, 0
        elif kind in ("end", "fetched"):
            asked = None
        elif kind in _TOLD:
            have += 1
    if asked is None:
        return None
    order = tuple(Slot(*slot) for slot in asked["order"])
    return Asked(asked["name"], asked["round"], asked["attempt"], order, have)
