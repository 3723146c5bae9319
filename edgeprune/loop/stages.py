"""The stages of one pruning: plan, rounds on the board, cut, tune, last measurement; each can go on from an earlier run."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.allocation._base import Allocation
from edgeprune.errors import ConfigError, TaskError
from edgeprune.loop.closing import Closed, ClosedLoop
from edgeprune.loop.concluding import concluded, told_serving
from edgeprune.loop.dense import DenseLatency, dense_latency
from edgeprune.loop.interruption import Begun, Interruption, identity_of
from edgeprune.loop.planning import ALLOCATOR, Planner, Progress, Proposal
from edgeprune.loop.realizing import Realized, cut, tuned
from edgeprune.loop.result import LatencyCheck, Result
from edgeprune.loop.taken import Taken
from edgeprune.recovery.evaluation import evaluate
from edgeprune.recovery.generators import Generators
from edgeprune.recovery.taps import require_places
from edgeprune.tasks.batches import device_of

if TYPE_CHECKING:
    from edgeprune.boards.board import Board
    from edgeprune.loop.settings import Settings

_WITHOUT_SEARCH = (
    "The board asked for another plan when the run went on; it was made from the dense model, without the search."
)

_log = logging.getLogger("edgeprune.loop")


class Stages:
    """One pruning.

    Args:
        planner: Of the dense model, with predictor and task.
        settings: See `Settings`.
        example_inputs: As the model was traced with.
        board: Where plans are measured, or None.
        earlier: A finished run whose last plan was not measured, to go on from.
        interruption: Folder for what an interrupted tuning goes on from.
        plan_path: Where plans are written.
        progress: Called with (step, done, in all).

    Raises:
        ConfigError: The earlier result is of another model or budget, or has nothing left to measure; a search has not as many
            epochs as it needs, or cannot be made; features cannot be compared at a tap.
        ModelError: Features are to be compared, and there is no place for it.
        TaskError: A search, or tuning, cannot train the model.
    """

    def __init__(
        self,
        planner: Planner,
        settings: Settings,
        example_inputs: Any,
        *,
        board: Board | None,
        earlier: Result | None,
        interruption: Interruption | None,
        plan_path: Path | None,
        progress: Progress | None,
    ) -> None:
        self._planner, self._settings, self._example_inputs = planner, settings, example_inputs
        self._model, self._task = planner.model, planner.task
        self._board, self._earlier, self._plan_path, self._progress = board, earlier, plan_path, progress
        # Without a task nothing is tuned, and nothing can be interrupted that takes long.
        self._interruption = None if self._task is None else interruption
        self._dense = dense_latency(planner.predictor, planner.kernel_graph)
        self._budget_ms = settings.budget.resolve_ms(self._dense.ms)
        self._searches = settings.search if earlier is None else None
        self._left = settings.fine_tuning
        if settings.search is not None and self._task is not None:
            rest = settings.search.left(settings.fine_tuning, self._task)
            self._left = rest if earlier is None else settings.fine_tuning
        if earlier is not None:
            _require_unfinished(earlier, planner, self._dense, self._budget_ms)
        if not self._dense_suffices:
            self._require_steps()

    @property
    def _dense_suffices(self) -> bool:
        """Whether the dense model keeps all budgets, so that nothing is cut."""
        return self._dense.ms <= self._budget_ms and self._planner.keeps_limits(self._planner.graph.widths())

    def _require_steps(self) -> None:
        """Refuse what searching and tuning would refuse, before scores, rounds on the board and damage take their time."""
        if self._searches is not None:
            self._searches.require(self._planner, self._budget_ms)
        tunes = self._task is not None and self._left.epochs > 0 and self._left.steps != 0
        if tunes and not any(parameter.requires_grad for parameter in self._model.parameters()):
            raise TaskError(
                "fine-tuning needs parameters that require gradients, found none.",
                hint="requires_grad_(True) in the factory, or --epochs 0; FineTuning(epochs=0) in Python",
            )
        by_features = any(one.reads == "features" for one in self._settings.distillations)
        if by_features and tunes:
            require_places(self._planner.graph, self._settings.taps)

    def run(self) -> Result:
        """All stages; raises what `edgeprune.prune` does."""
        identity = self._identity()
        begun, replaced = self._begun(identity)
        if begun is not None:
            metrics_before: Mapping[str, float] = begun.metrics_before
            taken = self._taken_again(begun)
        else:
            metrics_before = {}
            search = self._search_folder(identity)
            if self._task is not None:
                metrics_before = evaluate(self._model, self._task)
                self._task.require_kept_by(metrics_before)
            taken = self._taken(search)
        unchanged = taken.proposal.plan.widths() == self._planner.graph.widths()
        realized = (
            Realized(copy.deepcopy(self._model), 0.0, ())
            if unchanged
            else self._realized(taken, dict(metrics_before), identity)
        )
        metrics_after = metrics_before
        if realized.recovery:
            metrics_after = realized.recovery[-1].after
        measured, lost = self._measured(taken, realized, unchanged=unchanged)
        return concluded(
            taken,
            realized,
            budget=self._settings.budget,
            dense=self._dense,
            metrics=(metrics_before, metrics_after),
            measured=measured,
            lost=lost,
            unchanged=unchanged,
            serves=told_serving(self._task, self._model, self._planner),
            notes=(*([replaced] if replaced else ()), *realized.notes),
        )

    def _identity(self) -> dict[str, Any]:
        """What makes a run the same as an interrupted one."""
        if self._interruption is None:
            return {}
        settings = self._settings
        return {
            **identity_of(self._planner, settings.budget, settings.fine_tuning, settings.distillations),
            "blocks": settings.blocks,
            "refit": settings.refit,
            "margin": settings.margin,
            "taps": list(settings.taps),
            "search": repr(settings.search),
            "calibration batches": settings.calibration_batches,
            "most rounds": settings.most_rounds,
            "measuring rounds": settings.measuring_rounds,
            "board": self._board is not None,
        }

    def _begun(self, identity: Mapping[str, Any]) -> tuple[Begun | None, str]:
        if self._interruption is None:
            return None, ""
        begun, replaced = self._interruption.load(self._model, identity)
        if replaced:
            _log.warning("%s", replaced)
        return begun, replaced

    def _search_folder(self, identity: Mapping[str, Any]) -> Path | None:
        """Where a search keeps what it goes on from; asked for before anything is drawn."""
        kept, search = self._interruption, self._searches
        if kept is None or search is None or self._task is None or not search.resumes or self._dense_suffices:
            return None
        return kept.searching(identity, Generators.of(self._task, device_of(self._model)))

    def _taken_again(self, begun: Begun) -> Taken:
        """The plan of an interrupted run."""
        assert self._interruption is not None
        _log.info("going on with the interrupted run in %s", self._interruption.folder)
        turn = begun.rounds[begun.chosen]
        allocation = Allocation(dict(turn.widths), turn.certificate)
        proposal = self._planner.proposal(allocation, turn.aim_ms, begun.plan)
        self._write(proposal)
        closed = None
        if self._board is not None:
            closed = Closed(begun.rounds, begun.chosen, proposal, None, begun.lost, begun.ended)
        return Taken(self._planner, proposal, closed, begun=begun)

    def _taken(self, search: Path | None) -> Taken:
        """The plan by the predictor, by a search where one is asked for, and by the board where there is one."""
        settings, planner, earlier = self._settings, self._planner, self._earlier
        settle_ms = None
        exact = planner.allocator.name == ALLOCATOR
        refit = settings.refit is True
        if settings.blocks and exact and not self._dense_suffices:
            # What blocks are worth hangs on which others go, and on whether layers are refitted (docs/pruning.md, whole blocks).
            settle_ms = _aimed(self._dense, settings.margin) * self._budget_ms
        if settle_ms is not None and earlier is None:
            planner, settle_ms = planner.settled(settle_ms, refitting=self._example_inputs if refit else None), None
        proposal = self._first(planner)
        self._write(proposal)
        searched = None
        if self._searches is not None and proposal.allocation.widths != planner.graph.widths():
            # The first plan has shown that the budget can be reached; from here on its place is taken.
            searched = self._searches.search(
                planner,
                proposal,
                fine_tuning=settings.fine_tuning,
                distill=[one for one in settings.distillations if one.reads == "outputs"],
                checkpoint=search,
                progress=self._progress,
            )
            planner, proposal = searched.planner, searched.proposal
            self._write(proposal)
        if self._board is None:
            return Taken(planner, proposal, None, searched)
        loop = ClosedLoop(
            planner,
            self._dense,
            self._budget_ms,
            self._board,
            # What is only counted holds as planned: there is nothing to correct.
            most_rounds=settings.most_rounds if settings.budget.bounds_latency else 1,
            measuring_rounds=settings.measuring_rounds,
            # The plan that an earlier run left is there already; it may be the last one.
            settle_ms=None if refit else settle_ms,
            progress=self._progress,
        )
        if earlier is None:
            closed = loop.run(proposal)
        else:
            closed = loop.run(proposal, earlier.rounds[:-1], {earlier.chosen: earlier.plan})
        if closed.proposal.plan.hash != proposal.plan.hash:
            self._write(closed.proposal)
        return Taken(planner, closed.proposal, closed, searched)

    def _first(self, planner: Planner) -> Proposal:
        """The plan to begin with: the one that an earlier run left unmeasured, or the best by the predictor."""
        earlier, dense, budget_ms = self._earlier, self._dense, self._budget_ms
        if earlier is not None:
            turn = earlier.rounds[-1]
            plan = earlier.plan if earlier.chosen == len(earlier.rounds) - 1 else None
            return planner.proposal(Allocation(dict(turn.widths), turn.certificate), turn.aim_ms, plan)
        if self._dense_suffices:
            return planner.dense(budget_ms)
        if dense.ms <= budget_ms:
            return planner.propose(max(budget_ms, planner.dense_ms))
        return planner.propose(budget_ms, margin=1 - _aimed(dense, self._settings.margin))

    def _write(self, proposal: Proposal) -> None:
        if self._plan_path is not None:
            proposal.plan.save(self._plan_path)
            _log.info("plan written to %s", self._plan_path)

    def _realized(self, taken: Taken, metrics_before: dict[str, float], identity: dict[str, Any]) -> Realized:
        """The plan's model, cut and tuned."""
        settings, earlier, kept = self._settings, self._earlier, self._interruption
        if earlier is not None and earlier.plan.hash == taken.proposal.plan.hash:
            return Realized(earlier.module, earlier.check_max_abs, earlier.recovery)
        # A run that goes on with an earlier result tunes other plans for longer than one that searches.
        left = self._left if taken.begun is None else taken.begun.left
        generators = None if self._task is None else Generators.of(self._task, device_of(self._model))
        if taken.begun is not None:
            realized = taken.begun.realized
            assert generators is not None
            # Scores and statistics, which drew from them on the way, are there already.
            generators.restore(taken.begun.generators)
        else:
            realized = cut(
                taken.planner,
                taken.proposal,
                self._example_inputs,
                module=None if taken.closed is None else taken.closed.module,
                refit=settings.refit,
                calibration_batches=settings.calibration_batches,
                progress=self._progress,
            )
            if taken.searched is not None:
                recovery = (taken.searched.record, *realized.recovery)
                realized = replace(realized, recovery=recovery, notes=(*realized.notes, *taken.searched.notes))
            elif settings.search is not None and earlier is not None:
                realized = replace(realized, notes=(*realized.notes, _WITHOUT_SEARCH))
            if kept is not None and generators is not None:
                lost, ended = ("", "") if taken.closed is None else (taken.closed.lost, taken.closed.ended)
                about = (taken.proposal.plan, taken.rounds, taken.chosen, lost, ended)
                kept.save(Begun(*about, metrics_before, realized, left, generators.states()), identity)
        return tuned(
            taken.planner,
            taken.proposal.plan,
            realized,
            teacher=self._model,
            fine_tuning=left,
            distill=settings.distillations,
            taps=settings.taps,
            checkpoint=None if kept is None else kept.checkpoint,
            progress=self._progress,
        )

    def _measured(self, taken: Taken, realized: Realized, *, unchanged: bool) -> tuple[LatencyCheck | None, str]:
        """What is handed over is the tuned model, so that one has the last word; and a clause on why it has not."""
        measured = taken.rounds[taken.chosen].measured
        lost = taken.closed.lost if taken.closed is not None and measured is None else ""
        if self._board is None or measured is None or self._task is None or unchanged:
            return measured, lost
        from edgeprune.loop.verification import measured_or_lost

        again, lost = measured_or_lost(
            self._board,
            taken.planner,
            realized.module,
            rounds=self._settings.measuring_rounds,
            level_ms=None if taken.closed is None else taken.closed.level_ms,
            progress=self._progress,
        )
        return again or measured, lost


def _aimed(dense: DenseLatency, margin: float) -> float:
    """Share of the budget that the first plan aims at.

    Where the predictor has the dense model faster than it was measured, the aim is lowered in the same proportion: otherwise
    dense widths could pass for meeting a budget that they were measured not to meet.
    """
    return (1 - margin) * min(1.0, dense.predicted_ms / dense.ms)


def _require_unfinished(earlier: Result, planner: Planner, dense: DenseLatency, budget_ms: float) -> None:
    pairs = ((earlier.budget_ms, budget_ms), (earlier.dense_predicted_ms, dense.predicted_ms))
    same = all(math.isclose(*pair, rel_tol=1e-6) for pair in pairs)
    if earlier.plan.signature != planner.graph.signature or not same:
        raise ConfigError(
            f"an earlier result must be of the same model, predictor and budget, found one for {earlier.budget_ms:.4g} ms "
            f"instead of {budget_ms:.4g} ms, or of another model or predictor."
        )
    if earlier.rounds[-1].measured is not None:
        raise ConfigError("an earlier result must have a plan that was not measured, found that all its rounds were.")
