"""The rounds of the closed loop: cut as planned, measure on the board, correct the predictions, aim again."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from edgeprune.allocation._base import Allocation
from edgeprune.errors import BudgetInfeasibleError
from edgeprune.loop.aiming import Seen, aim_ms
from edgeprune.loop.result import PruningRound

if TYPE_CHECKING:
    from torch import nn

    from edgeprune.boards.board import Board
    from edgeprune.latency.predictor import Predictor
    from edgeprune.loop.dense import DenseLatency
    from edgeprune.loop.planning import Progress, Proposal
    from edgeprune.lowering.kernel_graph import KernelGraph
    from edgeprune.surgery.plan import PruningPlan

MOST_ROUNDS = 3
NEXT_MARGIN = 0.01
"""Share of the budget that the aim of a corrected round stays below it: what is left of the scatter between plans."""
UNUSED = 0.03
"""Share of the budget that a plan may leave unused, by the lower end of what was measured, before a further round tries to
use it: whoever measures it again is not to find more of it left."""

_log = logging.getLogger("edgeprune.loop")


class MakesPlans(Protocol):
    """What the rounds need of a planner; `edgeprune.loop.planning.Planner` is one, plans with tiles have another."""

    @property
    def model(self) -> nn.Module:
        """The dense model."""

    @property
    def kernel_graph(self) -> KernelGraph:
        """The same, lowered."""

    @property
    def predictor(self) -> Predictor:
        """Of the board."""

    @property
    def whole(self) -> Mapping[str, int]:
        """The widths of the dense model."""

    def propose(self, budget_ms: float, *, margin: float = 0.0) -> Proposal:
        """A plan within a predicted latency."""

    def proposal(self, allocation: Allocation, aim_ms: float, plan: PruningPlan | None = None) -> Proposal:
        """The plan of an allocation."""

    def settled(self, budget_ms: float) -> MakesPlans:
        """One whose damage was measured beside the plan for a budget."""


@dataclass(frozen=True)
class Closed:
    """What the rounds came to.

    Attributes:
        rounds: All of them, in order; only the last may be unmeasured.
        chosen: Index of the one to go on with.
        proposal: Its plan.
        module: Its cut model, not yet tuned; None where it was not cut here (an earlier run's, or the dense one).
        lost: A clause on why the last round was not measured, or empty.
        ended: A clause on why there was no further round, or empty where the budget was met.
        level_ms: What the dense engine usually took, milliseconds, for what is measured next; None where nothing was.
    """

    rounds: tuple[PruningRound, ...]
    chosen: int
    proposal: Proposal
    module: nn.Module | None
    lost: str
    ended: str
    level_ms: float | None = None


def unmeasured(proposal: Proposal) -> PruningRound:
    """A round of which only the prediction is known."""
    return PruningRound(
        aim_ms=proposal.aim_ms,
        widths=proposal.allocation.widths,
        predicted_ms=proposal.predicted_ms,
        predicted_low_ms=proposal.low_ms,
        predicted_high_ms=proposal.high_ms,
        certificate=proposal.allocation.certificate,
    )


class ClosedLoop:
    """Rounds on one board, for one budget.

    Args:
        planner: Of the model.
        dense: Its dense latency: the scale of all others.
        budget_ms: What has to be met, milliseconds.
        board: Where it is measured.
        most_rounds: Most rounds, those of an earlier run included.
        measuring_rounds: Rounds of each comparison with the dense engine.
        settle_ms: Predicted latency near which damage is measured beside the plan before a further one is made
            (`Planner.settled`), milliseconds; None where the planner is to be taken as it is.
        progress: Called with (step, done, in all).
    """

    def __init__(
        self,
        planner: MakesPlans,
        dense: DenseLatency,
        budget_ms: float,
        board: Board,
        *,
        most_rounds: int = MOST_ROUNDS,
        measuring_rounds: int = 20,
        settle_ms: float | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.planner, self.dense, self.budget_ms, self.board = planner, dense, budget_ms, board
        self.most_rounds, self.measuring_rounds, self.progress = most_rounds, measuring_rounds, progress
        self.settle_ms = settle_ms
        self.level_ms: float | None = None

    def run(
        self, first: Proposal, begun: Sequence[PruningRound] = (), plans: Mapping[int, PruningPlan] | None = None
    ) -> Closed:
        """Measure `first`, and go on until a plan meets the budget, the rounds are used up, or the board is lost.

        Args:
            first: The plan to begin with.
            begun: Measured rounds of an earlier run; where there are any, `first` is the plan that comes after them.
            plans: Plans of those rounds by their index, where they are known; others are made again from their widths.

        Raises:
            ExportError: A cut model cannot be exported.
        """
        rounds = list(begun)
        tried: dict[int, tuple[Proposal, nn.Module | None]] = {}
        proposal: Proposal | None = first
        lost = ended = ""
        while proposal is not None and not lost:
            turn, module, lost = self.measure(proposal)
            tried[len(rounds)] = (proposal, module)
            rounds.append(turn)
            proposal, ended = (None, "") if lost else self._next(rounds)
        chosen = self._choose(rounds)
        if chosen not in tried:
            turn = rounds[chosen]
            allocation = Allocation(dict(turn.widths), turn.certificate)
            tried[chosen] = (self.planner.proposal(allocation, turn.aim_ms, (plans or {}).get(chosen)), None)
        return Closed(
            rounds=tuple(rounds),
            chosen=chosen,
            proposal=tried[chosen][0],
            module=tried[chosen][1],
            lost=lost,
            ended=ended,
            level_ms=self.level_ms,
        )

    def measure(self, proposal: Proposal) -> tuple[PruningRound, nn.Module | None, str]:
        """The round with what the board says, the cut model, and a clause on why the board says nothing."""
        from edgeprune.loop.verification import measured_or_lost
        from edgeprune.surgery.cutting import apply

        turn, planner = unmeasured(proposal), self.planner
        module = None
        if turn.widths != planner.whole:
            self._tell("cutting", 0)
            module = apply(planner.model, proposal.plan)
            self._tell("cutting", 1)
        found, lost = measured_or_lost(
            self.board,
            planner,
            module,
            rounds=self.measuring_rounds,
            level_ms=self.level_ms,
            progress=self.progress,
        )
        if found is not None:
            self.level_ms = found.level_ms
        return replace(turn, measured=found), module, lost

    def _next(self, rounds: Sequence[PruningRound]) -> tuple[Proposal | None, str]:
        """The plan of a further round; or None, with a clause on why there is none where one was wanted."""
        last = rounds[-1]
        if self._met_for_sure(last) and (
            last.low_ms(self.dense.ms) >= (1 - UNUSED) * self.budget_ms or last.widths == self.planner.whole
        ):
            return None, ""
        if len(rounds) >= self.most_rounds:
            return None, f"{len(rounds)} rounds were made"
        known: list[Mapping[str, int]] = [self.planner.whole, *(turn.widths for turn in rounds)]
        seen = [Seen(self.dense.predicted_ms, self.dense.ms)]
        seen += [Seen(turn.predicted_ms, turn.high_ms(self.dense.ms)) for turn in rounds]
        aim = aim_ms((1 - NEXT_MARGIN) * self.budget_ms, seen)
        if self._met_for_sure(last) and aim <= last.aim_ms:
            return None, "the upper end of what was measured leaves no room to aim higher"
        if self.settle_ms is not None:
            self.planner, self.settle_ms = self.planner.settled(self.settle_ms), None
        _log.info("round %d aims at %.4g ms predicted", len(rounds) + 1, aim)
        try:
            proposal = self.planner.propose(aim)
        except BudgetInfeasibleError as error:
            smallest = self._smallest(error)
            if smallest is None or smallest.allocation.widths in known:
                return None, f"no plan with a smaller predicted latency than {error.best_ms:.4g} ms was found"
            proposal = smallest
        if proposal.allocation.widths in known:
            return None, "no plan with less damage was found that is predicted to meet it"
        return proposal, ""

    def _smallest(self, error: BudgetInfeasibleError) -> Proposal | None:
        """The fastest plan that was found where an aim is out of reach."""
        try:
            return self.planner.propose(error.best_ms * (1 + 1e-9))
        except BudgetInfeasibleError:
            return None

    def _choose(self, rounds: Sequence[PruningRound]) -> int:
        """The round to go on with: of those that surely meet the budget, or else meet it, the one with the least damage.

        Where none does, the last one if it is still to be measured, and else the fastest.
        """
        measured = [place for place, turn in enumerate(rounds) if turn.measured is not None]
        sure = [place for place in measured if self._met_for_sure(rounds[place])]
        met = [place for place in measured if rounds[place].measured_ms(self.dense.ms) <= self.budget_ms]
        for places in (sure, met):
            if places:
                return min(places, key=lambda place: rounds[place].certificate.damage)
        if rounds[-1].measured is None:
            return len(rounds) - 1
        return min(measured, key=lambda place: rounds[place].measured_ms(self.dense.ms))

    def _met_for_sure(self, turn: PruningRound) -> bool:
        return turn.measured is not None and turn.high_ms(self.dense.ms) <= self.budget_ms

    def _tell(self, step: str, done: int) -> None:
        if self.progress is not None:
            self.progress(step, done, 1)
