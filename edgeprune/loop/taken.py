"""The plan that a pruning goes on with: by the predictor, by a search, by a board, or by an earlier run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgeprune.loop.closing import unmeasured

if TYPE_CHECKING:
    from edgeprune.loop.closing import Closed
    from edgeprune.loop.interruption import Begun
    from edgeprune.loop.planning import Planner, Proposal
    from edgeprune.loop.result import PruningRound
    from edgeprune.loop.searched import Searched


@dataclass(frozen=True)
class Taken:
    """The plan that is gone on with.

    Attributes:
        planner: That made it; its model has the weights that are cut.
        proposal: The plan.
        closed: What the rounds on the board came to, or None without a board.
        searched: What a search that trains came to, or None.
        begun: What an interrupted run came to, or None.
    """

    planner: Planner
    proposal: Proposal
    closed: Closed | None
    searched: Searched | None = None
    begun: Begun | None = None

    @property
    def rounds(self) -> tuple[PruningRound, ...]:
        """Of the board; without one that of the plan, unmeasured."""
        return (unmeasured(self.proposal),) if self.closed is None else self.closed.rounds

    @property
    def chosen(self) -> int:
        """Index of the round of the plan."""
        return 0 if self.closed is None else self.closed.chosen
