"""Plans with tiles in the rounds of the closed loop: measured on the board, corrected, aimed again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgeprune.allocation._base import Allocation, Certificate
from edgeprune.loop.closing import ClosedLoop
from edgeprune.loop.dense import dense_latency
from edgeprune.loop.notes import missed_notes, round_notes
from edgeprune.loop.planning import Proposal

if TYPE_CHECKING:
    from torch import nn

    from edgeprune.boards.board import Board
    from edgeprune.budget import Budget
    from edgeprune.latency.predictor import Predictor
    from edgeprune.loop.closing import Closed
    from edgeprune.loop.dense import DenseLatency
    from edgeprune.loop.planning import Progress
    from edgeprune.loop.result import LatencyCheck
    from edgeprune.loop.tile_choosing import Choosing, Chosen
    from edgeprune.lowering.kernel_graph import KernelGraph
    from edgeprune.surgery.plan import PruningPlan

_BELOW_DENSE = 0.999
"""No plan is aimed nearer to the dense latency than this share of it."""


@dataclass(frozen=True)
class TriedPlans:
    """What the rounds on a board came to.

    Attributes:
        chosen: The choice to go on with.
        closed: The rounds.
        dense: Dense latency, which the budget refers to.
        budget: As it was asked for.
    """

    chosen: Chosen
    closed: Closed
    dense: DenseLatency
    budget: Budget

    def notes(self, measured: LatencyCheck | None) -> Iterator[str]:
        """What a person should know of the rounds, and of a budget that is not met by what was measured in the end."""
        yield from round_notes(self.closed, self.dense, self.budget.resolve_ms(self.dense.ms))
        if measured is not None:
            yield from missed_notes(self.budget, self.dense, measured, self.chosen.cost)


def tried_on(
    board: Board,
    plans: TilePlans,
    first: Chosen,
    budget: Budget,
    *,
    most_rounds: int,
    measuring_rounds: int,
    progress: Progress | None = None,
) -> TriedPlans:
    """Measure a choice on a board, and others after it, until one meets the budget.

    Args:
        board: Where.
        plans: Makes further ones.
        first: The choice to begin with.
        budget: Of latency; a share is one of the measured dense latency where the table holds it.
        most_rounds: Most choices.
        measuring_rounds: Rounds of each comparison with the dense engine.
        progress: Called with (step, done, in all).

    Raises:
        ExportError: A cut model cannot be exported.
    """
    dense = dense_latency(plans.predictor, plans.kernel_graph)
    loop = ClosedLoop(
        plans,
        dense,
        budget.resolve_ms(dense.ms),
        board,
        most_rounds=most_rounds,
        measuring_rounds=measuring_rounds,
        progress=progress,
    )
    closed = loop.run(plans.proposed(first))
    return TriedPlans(plans.chosen[closed.proposal.plan.hash], closed, dense, budget)


class TilePlans:
    """What `edgeprune.loop.closing.ClosedLoop` needs to know of plans with tiles.

    Args:
        model: The dense model.
        choosing: Makes the plans; its budgets are latencies.
        predictor: The one that it prices with.
    """

    def __init__(self, model: nn.Module, choosing: Choosing, predictor: Predictor) -> None:
        self.model, self.predictor, self.choosing = model, predictor, choosing
        self.kernel_graph: KernelGraph = choosing.kernel_graph
        self.chosen: dict[str, Chosen] = {}

    @property
    def whole(self) -> dict[str, int]:
        """Units of every group and tiles of every weight."""
        tiles = {name: curve.tiles for name, curve in self.choosing.curves.items()}
        return {**self.kernel_graph.graph.widths(), **tiles}

    def propose(self, budget_ms: float, *, margin: float = 0.0) -> Proposal:
        """A plan within a predicted latency.

        Raises:
            BudgetInfeasibleError: It is out of reach.
        """
        aim_ms = min(budget_ms * (1 - margin), _BELOW_DENSE * self.choosing.dense)
        return self.proposed(self.choosing.choose(aim_ms))

    def proposed(self, chosen: Chosen) -> Proposal:
        """A choice that was made already, as a proposal."""
        self.chosen[chosen.plan.hash] = chosen
        allocation = chosen.allocation
        certificate = Certificate(
            method=allocation.method,
            budget_ms=chosen.aim,
            predicted_ms=chosen.cost,
            damage=allocation.damage,
            bound=allocation.bound,
            note=allocation.note,
        )
        return self.proposal(Allocation(self._widths(chosen.plan), certificate), chosen.aim, chosen.plan)

    def proposal(self, allocation: Allocation, aim_ms: float, plan: PruningPlan | None = None) -> Proposal:
        """A proposal with what its plan is predicted to take."""
        if plan is None:
            plan = next(one.plan for one in self.chosen.values() if self._widths(one.plan) == allocation.widths)
        ms, low_ms, high_ms = self.predictor.network(self.kernel_graph.of_plan(plan))
        return Proposal(plan, allocation, aim_ms, ms, low_ms, high_ms)

    def settled(self, budget_ms: float) -> TilePlans:
        """Itself: damage beside a plan is measured when it is chosen, where it is."""
        del budget_ms
        return self

    def _widths(self, plan: PruningPlan) -> dict[str, int]:
        gone = {name for branch in plan.removed for name in branch["tensors"]}
        tiles: Mapping[str, int] = {
            name: 0
            if name in gone
            else int(plan.kept_tiles[name].array().sum())
            if name in plan.kept_tiles
            else curve.tiles
            for name, curve in self.choosing.curves.items()
        }
        return {**self.kernel_graph.graph.widths(), **plan.widths(), **tiles}
