"""`prune`: choose widths for a latency budget, cut, recover, and let the board have the last word."""

from __future__ import annotations

import copy
import logging
import math
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.allocation._base import Allocation
from edgeprune.errors import ConfigError, TableMissingError
from edgeprune.loop.closing import MOST_ROUNDS, ClosedLoop, unmeasured
from edgeprune.loop.dense import DenseLatency, dense_latency
from edgeprune.loop.limits import limits_of, spent
from edgeprune.loop.lowering import lowered, require_runtime
from edgeprune.loop.notes import accuracy_notes, latency_notes, round_notes, search_notes, table_notes
from edgeprune.loop.planning import ALLOCATOR, Planner, Progress, Proposal
from edgeprune.loop.realizing import CALIBRATION_BATCHES, Realized, realize
from edgeprune.loop.result import Result
from edgeprune.recovery.evaluation import evaluate
from edgeprune.recovery.fine_tuning import FineTuning
from edgeprune.spec import Budget, Constraints

if TYPE_CHECKING:
    from torch import nn

    from edgeprune.allocation._base import Allocator
    from edgeprune.boards.board import Board
    from edgeprune.criteria._base import Criterion
    from edgeprune.criteria.calibration import DamageCalibration
    from edgeprune.graph.channel_graph import ChannelGraph
    from edgeprune.latency.predictor import Predictor
    from edgeprune.loop.netadapt import NetAdapt
    from edgeprune.loop.soft_masking import SoftMasking
    from edgeprune.lowering.kernel_graph import KernelGraph
    from edgeprune.tasks.task import Task

MARGIN = 0.02
"""Share of the budget that the aim stays below it, because predictions and measurements scatter."""

_WITHOUT_SEARCH = (
    "The board asked for another plan when the run went on; it was made from the dense model, without the search."
)

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
    distill: bool = False,
    refit: bool = False,
    calibration_batches: int | None = CALIBRATION_BATCHES,
    soft_masking: SoftMasking | None = None,
    netadapt: NetAdapt | None = None,
    graph: ChannelGraph | None = None,
    kernel_graph: KernelGraph | None = None,
    planner: Planner | None = None,
    plan_path: Path | str | None = None,
    most_rounds: int = MOST_ROUNDS,
    measuring_rounds: int = 20,
    earlier: Result | None = None,
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
            holds it (`dense_latency`). Text as in `Budget.parse`. Parameters and multiply-accumulates are counted, not
            measured; only the exact allocator keeps them.
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
        distill: Whether the dense model teaches the cut one by its logits.
        refit: Whether the layers of the cut model are refitted by least squares before they are tuned
            (`edgeprune.recovery.reconstruction`); needs a task, and no labels.
        calibration_batches: Most training batches for batch-norm re-estimation.
        soft_masking: Whether some of the epochs of `fine_tuning` are trained under masks before the cut, while widths and units
            are chosen again and again (`edgeprune.loop.soft_masking`). The first plan is made without it, sets the latency to aim
            at, and is replaced.
        netadapt: Whether the first plan is replaced by one that is found by a greedy search with short tunings
            (`edgeprune.loop.netadapt`), a baseline that takes long.
        graph: The traced model, where the caller has it.
        kernel_graph: The lowered model, where the caller has it.
        planner: Where the caller has one of this model: with its scores, predictor, task and everything else that it
            holds, none of which may then be given too.
        plan_path: Where the plan is written.
        most_rounds: Most plans that are tried on the board.
        measuring_rounds: Rounds of each comparison on the board.
        earlier: What an earlier call of this model, budget and settings came to whose last plan was not measured: the loop goes
            on with that plan, and a model that was tuned for the plan that is taken is not tuned again.
        progress: Called with (step, done, in all).

    Raises:
        ConfigError: The budget or margin is none, settings do not go together, a planner comes with what it holds already, or
            the earlier result is of another model or budget, or has nothing left to measure.
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
    search = _search(soft_masking, netadapt, task, refit=refit)
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
                limits=limits_of(chosen, kernel_graph),
                progress=progress,
            )
        dense = dense_latency(predictor, kernel_graph)
        budget_ms = chosen.resolve_ms(dense.ms)
        if earlier is not None:
            _require_unfinished(earlier, planner, dense, budget_ms)
        if blocks and not refit and planner.allocator.name == ALLOCATOR:
            # What blocks are worth hangs on which others go. It is measured with batch norms estimated anew; what a refit
            # leaves of it is another matter (docs/pruning.md, whole blocks).
            planner = planner.settled(_aimed(dense, margin) * budget_ms)
        proposal = _first(planner, dense, budget_ms, margin, earlier)
        first = proposal.plan
        if plan_path is not None:
            first.save(plan_path)
            _log.info("plan written to %s", plan_path)
        metrics_before = evaluate(model, task) if task is not None else {}
        searched = None
        if search is not None and earlier is None and proposal.allocation.widths != planner.graph.widths():
            # The first plan has shown that the budget can be reached; from here on its place is taken.
            searched = search.search(planner, proposal, fine_tuning=fine_tuning, distill=distill, progress=progress)
            planner, proposal, fine_tuning = searched.planner, searched.proposal, searched.fine_tuning
            if plan_path is not None:
                proposal.plan.save(plan_path)
            first = proposal.plan
        closed = None
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
        unchanged = proposal.plan.widths() == planner.graph.widths()
        metrics_after = metrics_before
        if unchanged:
            realized = Realized(copy.deepcopy(model), 0.0, ())
        elif earlier is not None and earlier.plan.hash == proposal.plan.hash:
            realized = Realized(earlier.module, earlier.check_max_abs, earlier.recovery)
            metrics_after = dict(earlier.metrics_after)
        else:
            realized = realize(
                planner,
                proposal,
                example_inputs,
                module=None if closed is None else closed.module,
                teacher=model,
                fine_tuning=fine_tuning,
                distill=distill,
                refit=refit,
                calibration_batches=calibration_batches,
                progress=progress,
            )
            if searched is not None:
                realized = replace(
                    realized,
                    recovery=(searched.record, *realized.recovery),
                    notes=(*realized.notes, *searched.notes),
                )
            elif search is not None and earlier is not None:
                realized = replace(realized, notes=(*realized.notes, _WITHOUT_SEARCH))
            if realized.recovery:
                metrics_after = dict(realized.recovery[-1].after)
        rounds = (unmeasured(proposal),) if closed is None else closed.rounds
        chosen_round = 0 if closed is None else closed.chosen
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
            *realized.notes,
            *accuracy_notes(planner, metrics_after),
            *search_notes(proposal.allocation.certificate, unchanged),
        ),
    )


def _search(
    soft_masking: SoftMasking | None, netadapt: NetAdapt | None, task: Task | None, *, refit: bool
) -> SoftMasking | NetAdapt | None:
    """What chooses widths while it trains, if anything does."""
    if soft_masking is not None and netadapt is not None:
        raise ConfigError(
            "soft masking and netadapt both train while they choose widths, found that both are asked for."
        )
    search = soft_masking or netadapt
    if search is None:
        return None
    name = "netadapt" if soft_masking is None else "soft masking"
    if task is None:
        raise ConfigError(f"{name} trains, so it needs a task, found none.", hint="--task FILE.py:FACTORY")
    if refit:
        raise ConfigError(
            f"layers are refitted to the dense model's outputs, which {name} has trained away from, found both asked for."
        )
    return search


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
