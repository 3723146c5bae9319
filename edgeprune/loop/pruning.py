"""`prune`: choose widths for a latency budget, cut, recover, and let the board have the last word."""

from __future__ import annotations

import copy
import logging
import math
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.allocation._base import Allocation
from edgeprune.errors import ConfigError, TableMissingError
from edgeprune.loop.closing import MOST_ROUNDS, Closed, ClosedLoop, unmeasured
from edgeprune.loop.dense import DenseLatency, dense_latency
from edgeprune.loop.interruption import Begun, Interruption, identity_of
from edgeprune.loop.limits import limits_of, spent
from edgeprune.loop.lowering import lowered, require_runtime
from edgeprune.loop.notes import accuracy_notes, latency_notes, round_notes, search_notes, table_notes
from edgeprune.loop.planning import ALLOCATOR, Planner, Progress, Proposal
from edgeprune.loop.realizing import CALIBRATION_BATCHES, Realized, cut, tuned
from edgeprune.loop.result import Result
from edgeprune.recovery.evaluation import evaluate
from edgeprune.recovery.fine_tuning import FineTuning
from edgeprune.recovery.precision import MixedPrecision
from edgeprune.recovery.taps import require_known
from edgeprune.recovery.teaching import Distillations, made
from edgeprune.spec import Budget, Constraints
from edgeprune.tasks import ranks
from edgeprune.tasks.batches import device_of

if TYPE_CHECKING:
    from torch import nn

    from edgeprune.allocation._base import Allocator
    from edgeprune.boards.board import Board
    from edgeprune.criteria._base import Criterion
    from edgeprune.criteria.calibration import DamageCalibration
    from edgeprune.graph.channel_graph import ChannelGraph
    from edgeprune.latency.predictor import Predictor
    from edgeprune.lowering.kernel_graph import KernelGraph
    from edgeprune.tasks.task import Task

MARGIN = 0.02
"""Share of the budget that the aim stays below it, because predictions and measurements scatter."""

_log = logging.getLogger("edgeprune.loop")


def prune(
    model: nn.Module,
    example_inputs: Any,
    budget: Budget | str,
    board: Board | str | None = None,
    predictor: Predictor | None = None,
    task: Task | None = None,
    constraints: Constraints | None = None,
    *,
    criterion: str | Criterion | None = None,
    allocator: str | Allocator = ALLOCATOR,
    calibrate_damage: DamageCalibration | None = None,
    blocks: bool = False,
    backend: str = "onnxruntime",
    margin: float = MARGIN,
    fine_tuning: FineTuning | None = None,
    distill: bool | Distillations = False,
    taps: Sequence[str] = (),
    refit: bool = False,
    calibration_batches: int | None = CALIBRATION_BATCHES,
    graph: ChannelGraph | None = None,
    kernel_graph: KernelGraph | None = None,
    planner: Planner | None = None,
    plan_path: Path | str | None = None,
    most_rounds: int = MOST_ROUNDS,
    measuring_rounds: int = 20,
    earlier: Result | None = None,
    checkpoint: Interruption | Path | str | None = None,
    progress: Progress | None = None,
) -> Result:
    """Prune a model to a budget: of latency, and of other costs at the same time.

    The first plan, with its prediction, is made and (with `plan_path`) written before any pruned model is compiled or timed.
    With a board the loop is closed: the cut model is timed there, interleaved with the dense one; what it took corrects the
    predictions, and a plan that misses the budget, or leaves more of it unused than 3 %, is followed by another one. Latency
    does not depend on the values of weights, so only the plan that is taken is tuned, and what is handed over is measured once
    more. The model itself is not changed.

    Args:
        model: The dense model.
        example_inputs: Tensor, tuple or dict; fixes the deployment batch.
        budget: Upper bound of the latency; a share is one of the dense model's latency, measured where the predictor's table
            holds it (`dense_latency`), of the median, percentile or state that the table was chosen for
            (`LatencyTable.chosen`). Text as in `Budget.parse`. Parameters, multiply-accumulates and memory are counted, energy
            is predicted; none is measured, and only the exact allocator keeps them.
        board: Where dense and pruned engines are compared; None leaves the latency predicted only.
        predictor: Fitted on a table of the board.
        task: Data, loss and metric. Without it scores are data-free, nothing is recovered, and accuracy is not measured.
        constraints: What widths must respect.
        criterion: Importance of channels; ``"taylor"`` with a task and ``"l2"`` without one when None.
        allocator: How widths are chosen.
        calibrate_damage: How damage is put on the scale of a few measured losses (``DamageCalibration()``), which makes groups
            comparable under any criterion; needs a task. None leaves it as the criterion gives it.
        blocks: Whether whole residual branches may go too. What that costs is the loss measured without each of them, and all
            damage is put on that scale, so it needs a task; without `refit` it is then measured once more beside the plan
            (`edgeprune.loop.in_context`), which takes some minutes for a network of fifty layers.
        backend: Runtime of the engines, where there is no `kernel_graph`.
        margin: Share of the budget that the predicted latency stays below it.
        fine_tuning: How the cut model is tuned on the task; ``FineTuning(epochs=0)`` only re-estimates batch norm.
        distill: By which losses the dense model teaches the cut one: ``"logits"``, ``"features"``, ``"channelwise"``,
            ``"attention"``, several of them, or objects (`edgeprune.recovery.distillation`); True is its logits.
        taps: Modules whose values are compared by all but the logits; the ends of stages where there are none.
        refit: Whether the layers of the cut model are refitted by least squares before they are tuned
            (`edgeprune.recovery.reconstruction`); needs a task, and no labels.
        calibration_batches: Most training batches for batch-norm re-estimation.
        graph: The traced model, where the caller has it.
        kernel_graph: The lowered model, where the caller has it.
        planner: Where the caller has one of this model: with its scores, predictor, task and everything else that it
            holds, none of which may then be given too.
        plan_path: Where the plan is written.
        most_rounds: Most plans that are tried on the board.
        measuring_rounds: Rounds of each comparison on the board.
        earlier: What an earlier call of this model, budget and settings came to whose last plan was not measured: the loop goes
            on with that plan, and a model that was tuned for the plan that is taken is not tuned again.
        checkpoint: Folder for what an interrupted tuning goes on from. The same call then takes the plan that was measured, and
            tunes on from the last finished epoch, to the weights that it would have come to without the interruption. It is
            there from the beginning of the tuning on; whoever has stored the result removes it.
        progress: Called with (step, done, in all).

    Raises:
        ConfigError: The budget or margin is none, a planner comes with what it holds already, the earlier result is of
            another model or budget, or has nothing left to measure, or several processes (``torchrun``) prune at once.
        TableMissingError: There is no predictor.
        TableMismatchError: The predictor is of another device or runtime than the board or backend.
        BudgetInfeasibleError: No widths meet the budget; says what the smallest plan found reaches.
        EmptyPlanError: The model has nothing that can be pruned.
        ConstraintError: A constraint matches nothing.
        TaskError: The task cannot be used.
        SurgeryError: The cut model does not equal the masked one.
        RemoteError: The board is not there at the start; one that is lost later leaves a result that says so.
    """
    from edgeprune.boards.board import Board

    if ranks.count() > 1:
        raise ConfigError(
            f"pruning must run in one process, found {ranks.count()}; what several can do together is the tuning.",
            hint="prune with FineTuning(epochs=0), then edgeprune.recovery.fine_tuning.fine_tune under torchrun",
        )
    chosen = Budget.parse(budget) if isinstance(budget, str) else budget
    if not 0 <= margin < 1:
        raise ConfigError(f"the margin must be a share in [0, 1), found {margin}.")
    if planner is not None:
        if chosen.bounds_more:
            raise ConfigError("a planner must be made with limits besides the latency, found some in the budget too.")
        given = (predictor, task, constraints, criterion, calibrate_damage, graph, kernel_graph)
        set_otherwise = any(option is not None for option in given) or allocator != ALLOCATOR or blocks
        if planner.model is not model or set_otherwise:
            raise ConfigError(
                "a planner must be given with its own model and without predictor, task, constraints, criterion, allocator, "
                "calibrate_damage, blocks, graph and kernel_graph, which it holds, found another model or one of these."
            )
        predictor, task, kernel_graph = planner.predictor, planner.task, planner.kernel_graph
    if predictor is None:
        raise TableMissingError(
            "pruning to a latency needs a predictor of the board, found none.",
            hint="edgeprune profile, then edgeprune fit",
        )
    if earlier is not None and board is None:
        raise ConfigError("going on with an earlier result needs a board to measure on, found none.")
    if refit and task is None:
        raise ConfigError("refitting layers needs a task, for its data, found none.", hint="--task FILE.py:FACTORY")
    if task is not None:
        from edgeprune.tasks.batches import validate

        validate(task, model)
    with ExitStack() as stack:
        target = None
        if board is not None:
            from edgeprune.loop.verification import require_same_device

            target = stack.enter_context(Board.open(board)) if isinstance(board, str) else board
            require_same_device(predictor.table, target)
        if kernel_graph is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="edgeprune-lower-")))
            kernel_graph = lowered(
                model, example_inputs, backend, predictor, graph=graph, folder=folder, progress=progress
            )
        require_runtime(predictor, kernel_graph)
        if planner is None:
            planner = Planner(
                model,
                kernel_graph,
                predictor,
                task=task,
                constraints=constraints,
                criterion=criterion,
                allocator=allocator,
                calibrate_damage=calibrate_damage,
                blocks=blocks,
                limits=limits_of(chosen, kernel_graph, predictor),
                progress=progress,
            )
        # Refused now rather than when the tuning begins.
        require_known(planner.graph, taps)
        settings = fine_tuning or FineTuning()
        MixedPrecision(settings.precision, device_of(model))
        losses = made("logits" if distill is True else distill, settings.temperature) if distill else ()
        dense = dense_latency(predictor, kernel_graph)
        budget_ms = chosen.resolve_ms(dense.ms)
        if earlier is not None:
            _require_unfinished(earlier, planner, dense, budget_ms)
        kept = Interruption(Path(checkpoint)) if isinstance(checkpoint, Path | str) else checkpoint
        identity: dict[str, Any] = {}
        begun, replaced = None, ""
        if kept is not None and task is not None:
            identity = {
                **identity_of(planner, chosen, settings, losses),
                "blocks": blocks,
                "refit": refit,
                "margin": margin,
                "taps": list(taps),
                "calibration batches": calibration_batches,
                "most rounds": most_rounds,
                "measuring rounds": measuring_rounds,
                "board": target is not None,
            }
            begun, replaced = kept.load(model, identity)
            if replaced:
                _log.warning("%s", replaced)
        metrics_before = evaluate(model, task) if task is not None and begun is None else {}
        closed = None
        if begun is not None:
            _log.info("going on with the interrupted run in %s", checkpoint)
            turn, metrics_before = begun.rounds[begun.chosen], dict(begun.metrics_before)
            proposal = planner.proposal(Allocation(dict(turn.widths), turn.certificate), turn.aim_ms, begun.plan)
            if target is not None:
                closed = Closed(begun.rounds, begun.chosen, proposal, None, begun.lost, begun.ended)
            if plan_path is not None:
                proposal.plan.save(plan_path)
        else:
            if blocks and not refit and planner.allocator.name == ALLOCATOR:
                # What blocks are worth hangs on which others go. It is measured with batch norms estimated anew; what a refit
                # leaves of it is another matter (docs/pruning.md, whole blocks).
                planner = planner.settled(_aimed(dense, margin) * budget_ms)
            proposal = _first(planner, dense, budget_ms, margin, earlier)
            first = proposal.plan
            if plan_path is not None:
                first.save(plan_path)
                _log.info("plan written to %s", plan_path)
            if target is not None:
                loop = ClosedLoop(
                    planner,
                    dense,
                    budget_ms,
                    target,
                    # What is only counted holds as planned: there is nothing to correct.
                    most_rounds=most_rounds if chosen.bounds_latency else 1,
                    measuring_rounds=measuring_rounds,
                    progress=progress,
                )
                if earlier is None:
                    closed = loop.run(proposal)
                else:
                    closed = loop.run(proposal, earlier.rounds[:-1], {earlier.chosen: earlier.plan})
                proposal = closed.proposal
                if plan_path is not None and proposal.plan.hash != first.hash:
                    proposal.plan.save(plan_path)
        rounds = (unmeasured(proposal),) if closed is None else closed.rounds
        chosen_round = 0 if closed is None else closed.chosen
        unchanged = proposal.plan.widths() == planner.graph.widths()
        metrics_after = metrics_before
        if unchanged:
            realized = Realized(copy.deepcopy(model), 0.0, ())
        elif earlier is not None and earlier.plan.hash == proposal.plan.hash:
            realized = Realized(earlier.module, earlier.check_max_abs, earlier.recovery)
            metrics_after = dict(earlier.metrics_after)
        else:
            realized = (
                begun.realized
                if begun is not None
                else cut(
                    planner,
                    proposal,
                    example_inputs,
                    module=None if closed is None else closed.module,
                    refit=refit,
                    calibration_batches=calibration_batches,
                    progress=progress,
                )
            )
            if kept is not None and task is not None and begun is None:
                about = (
                    proposal.plan,
                    rounds,
                    chosen_round,
                    *(("", "") if closed is None else (closed.lost, closed.ended)),
                )
                kept.save(Begun(*about, metrics_before, realized), identity)
            realized = tuned(
                planner,
                proposal.plan,
                realized,
                fine_tuning=settings,
                distill=losses,
                taps=taps,
                checkpoint=None if kept is None else kept.checkpoint,
                progress=progress,
            )
            if realized.recovery:
                metrics_after = dict(realized.recovery[-1].after)
        measured = rounds[chosen_round].measured
        lost = closed.lost if closed is not None and measured is None else ""
        if target is not None and measured is not None and task is not None and not unchanged:
            # What is handed over is the tuned model, so that one has the last word.
            from edgeprune.loop.verification import measured_or_lost

            again, lost = measured_or_lost(target, planner, realized.module, rounds=measuring_rounds, progress=progress)
            measured = again or measured
    measured_ms = None if measured is None else measured.ratio * dense.ms
    return Result(
        module=realized.module,
        plan=proposal.plan,
        budget_ms=budget_ms,
        dense_ms=dense.ms,
        dense_measured=dense.measured,
        dense_predicted_ms=dense.predicted_ms,
        predicted_ms=proposal.predicted_ms,
        measured_ms=measured_ms,
        measured=measured,
        budget_met=None if measured_ms is None or not chosen.bounds_latency else measured_ms <= budget_ms,
        rounds=rounds,
        chosen=chosen_round,
        certificate=proposal.allocation.certificate,
        check_max_abs=realized.check_max_abs,
        metrics_before=metrics_before,
        metrics_after=metrics_after,
        recovery=realized.recovery,
        spent=spent(planner.limits, proposal.plan.widths()),
        unchanged=unchanged,
        notes=(
            *table_notes(predictor, kernel_graph, dense),
            *latency_notes(
                chosen,
                dense,
                budget_ms=budget_ms,
                predicted_ms=proposal.predicted_ms,
                measured=measured,
                unchanged=unchanged,
                lost=lost,
            ),
            *(round_notes(closed, dense, budget_ms) if closed is not None and chosen.bounds_latency else ()),
            *([replaced] if replaced else []),
            *realized.notes,
            *accuracy_notes(planner, metrics_after),
            *search_notes(proposal.allocation.certificate, unchanged),
        ),
    )


def _first(planner: Planner, dense: DenseLatency, budget_ms: float, margin: float, earlier: Result | None) -> Proposal:
    """The plan to begin with: the one that an earlier run left unmeasured, or the best by the predictor."""
    if earlier is not None:
        turn = earlier.rounds[-1]
        plan = earlier.plan if earlier.chosen == len(earlier.rounds) - 1 else None
        return planner.proposal(Allocation(dict(turn.widths), turn.certificate), turn.aim_ms, plan)
    if dense.ms <= budget_ms:
        if planner.keeps_limits(planner.graph.widths()):
            return planner.dense(budget_ms)
        return planner.propose(max(budget_ms, planner.dense_ms))
    return planner.propose(budget_ms, margin=1 - _aimed(dense, margin))


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
