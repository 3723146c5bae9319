"""`prune`: choose widths for a latency budget, cut, recover, and let the board have the last word."""

from __future__ import annotations

import copy
import logging
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.errors import ConfigError, RemoteError, TableMismatchError, TableMissingError
from edgeprune.loop.dense import DenseLatency, dense_latency
from edgeprune.loop.planning import ALLOCATOR, Planner, Progress, Proposal
from edgeprune.loop.realizing import CALIBRATION_BATCHES, Realized, realize
from edgeprune.loop.result import LatencyCheck, PruningRound, Result
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
    backend: str = "onnxruntime",
    margin: float = MARGIN,
    fine_tuning: FineTuning | None = None,
    distill: bool = False,
    calibration_batches: int | None = CALIBRATION_BATCHES,
    graph: ChannelGraph | None = None,
    kernel_graph: KernelGraph | None = None,
    planner: Planner | None = None,
    plan_path: Path | str | None = None,
    measuring_rounds: int = 20,
    progress: Progress | None = None,
) -> Result:
    """Prune a model to a latency budget.

    The plan, with its prediction, is made and (with `plan_path`) written before any pruned model is compiled or timed. The
    model itself is not changed.

    Args:
        model: The dense model.
        example_inputs: Tensor, tuple or dict; fixes the deployment batch.
        budget: Upper bound of the latency; a share is one of the dense model's latency, measured where the predictor's table
            holds it (`dense_latency`). Text as in `Budget.parse`.
        board: Where dense and pruned engines are compared in the end; None leaves the latency predicted only.
        predictor: Fitted on a table of the board.
        task: Data, loss and metric. Without it scores are data-free, nothing is recovered, and accuracy is not measured.
        constraints: What widths must respect.
        criterion: Importance of channels; ``"taylor"`` with a task and ``"l2"`` without one when None.
        allocator: How widths are chosen.
        calibrate_damage: How damage is put on the scale of a few measured losses (``DamageCalibration()``), which makes groups
            comparable under any criterion; needs a task. None leaves it as the criterion gives it.
        backend: Runtime of the engines, where there is no `kernel_graph`.
        margin: Share of the budget that the predicted latency stays below it.
        fine_tuning: How the cut model is tuned on the task; ``FineTuning(epochs=0)`` only re-estimates batch norm.
        distill: Whether the dense model teaches the cut one by its logits.
        calibration_batches: Most training batches for batch-norm re-estimation.
        graph: The traced model, where the caller has it.
        kernel_graph: The lowered model, where the caller has it.
        planner: Where the caller has one of this model: with its scores, predictor, task and everything else that it
            holds, none of which may then be given too.
        plan_path: Where the plan is written.
        measuring_rounds: Rounds of the comparison on the board.
        progress: Called with (step, done, in all).

    Raises:
        ConfigError: The budget or margin is none, or a planner comes with what it holds already.
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
        given = (predictor, task, constraints, criterion, calibrate_damage, graph, kernel_graph)
        if planner.model is not model or any(option is not None for option in given) or allocator != ALLOCATOR:
            raise ConfigError(
                "a planner must be given with its own model and without predictor, task, constraints, criterion, allocator, "
                "calibrate_damage, graph and kernel_graph, which it holds, found another model or one of these."
            )
        predictor, task, kernel_graph = planner.predictor, planner.task, planner.kernel_graph
    if predictor is None:
        raise TableMissingError(
            "pruning to a latency needs a predictor of the board, found none.",
            hint="edgeprune profile, then edgeprune fit",
        )
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
            kernel_graph = _lowered(model, example_inputs, backend, predictor, graph, folder, progress)
        _require_runtime(predictor, kernel_graph)
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
                progress=progress,
            )
        dense = dense_latency(predictor, kernel_graph)
        budget_ms = chosen.resolve_ms(dense.ms)
        proposal = _proposed(planner, dense, budget_ms, margin)
        unchanged = proposal.plan.widths() == planner.graph.widths()
        if plan_path is not None:
            proposal.plan.save(plan_path)
            _log.info("plan written to %s", plan_path)
        metrics_before = evaluate(model, task) if task is not None else {}
        if unchanged:
            realized = Realized(copy.deepcopy(model), 0.0, ())
        else:
            realized = realize(
                planner,
                proposal,
                example_inputs,
                fine_tuning=fine_tuning,
                distill=distill,
                calibration_batches=calibration_batches,
                progress=progress,
            )
        checked, lost = None, ""
        if target is not None:
            pruned = None if unchanged else realized.module
            checked, lost = _measured(target, planner, pruned, measuring_rounds, progress)
    metrics_after = realized.recovery[-1].after if realized.recovery else metrics_before
    met = None if checked is None else checked.ratio * dense.ms <= budget_ms
    return Result(
        module=realized.module,
        plan=proposal.plan,
        budget_ms=budget_ms,
        dense_ms=dense.ms,
        dense_measured=dense.measured,
        dense_predicted_ms=dense.predicted_ms,
        predicted_ms=proposal.predicted_ms,
        measured_ms=None if checked is None else checked.ratio * dense.ms,
        budget_met=met,
        rounds=(
            PruningRound(
                aim_ms=proposal.aim_ms,
                widths=proposal.allocation.widths,
                predicted_ms=proposal.predicted_ms,
                predicted_low_ms=proposal.low_ms,
                predicted_high_ms=proposal.high_ms,
                measured=checked,
            ),
        ),
        certificate=proposal.allocation.certificate,
        check_max_abs=realized.check_max_abs,
        metrics_before=metrics_before,
        metrics_after=metrics_after,
        recovery=realized.recovery,
        unchanged=unchanged,
        notes=(
            *_table_notes(predictor, kernel_graph, dense),
            *_latency_notes(chosen, budget_ms, dense, proposal, checked, lost, met, unchanged),
            *realized.notes,
            *_accuracy_notes(planner, metrics_after),
            *_search_notes(proposal, unchanged),
        ),
    )


def _proposed(planner: Planner, dense: DenseLatency, budget_ms: float, margin: float) -> Proposal:
    if dense.ms <= budget_ms:
        return planner.dense(budget_ms)
    # Where the predictor has the dense model faster than it was measured, the aim is lowered in the same proportion:
    # otherwise dense widths could pass for meeting a budget that they were measured not to meet.
    aimed = (1 - margin) * min(1.0, dense.predicted_ms / dense.ms)
    return planner.propose(budget_ms, margin=1 - aimed)


def _lowered(
    model: nn.Module,
    example_inputs: Any,
    backend: str,
    predictor: Predictor,
    graph: ChannelGraph | None,
    folder: Path,
    progress: Progress | None,
) -> KernelGraph:
    from edgeprune.graph.tracing import trace
    from edgeprune.lowering.kernel_graph import lower

    device = predictor.table.target()
    if graph is None:
        _tell(progress, "tracing", 0)
        graph = trace(model, example_inputs)
        _tell(progress, "tracing", 1)
    _tell(progress, "lowering", 0)
    lowered = lower(graph, backend, model=model, device=device, workdir=folder)
    _tell(progress, "lowering", 1)
    return lowered


def _require_runtime(predictor: Predictor, kernel_graph: KernelGraph) -> None:
    runtime = predictor.table.header["runtime"]
    if runtime != kernel_graph.backend.name:
        raise TableMismatchError(
            f"the latency table must have been measured with {kernel_graph.backend.name}, found {runtime}.",
            hint=f"edgeprune profile --backend {kernel_graph.backend.name}",
        )


def _measured(
    board: Board, planner: Planner, pruned: nn.Module | None, rounds: int, progress: Progress | None
) -> tuple[LatencyCheck | None, str]:
    """What the board says, or None and a clause on why it says nothing."""
    from edgeprune.loop.verification import measure_ratio

    threads = int(planner.predictor.table.header["threads"])
    try:
        return measure_ratio(board, planner.kernel_graph, pruned, threads=threads, rounds=rounds, progress=progress), ""
    except RemoteError as error:
        # The model is pruned and tuned by now; a lost board must not take that along.
        lost = f"{board.name} could not measure it: {error.message}"
        _log.warning("%s", lost)
        return None, lost


def _latency_notes(
    budget: Budget,
    budget_ms: float,
    dense: DenseLatency,
    proposal: Proposal,
    checked: LatencyCheck | None,
    lost: str,
    met: bool | None,
    unchanged: bool,
) -> Iterator[str]:
    if unchanged and dense.ms <= budget_ms:
        known = "was measured" if dense.measured else "is predicted"
        yield (
            f"The dense model {known} to take {dense.ms:.4g} ms, which is within the budget of {budget_ms:.4g} ms: "
            "nothing was pruned."
        )
    elif unchanged:
        yield f"No smaller widths come closer to the budget of {budget_ms:.4g} ms: nothing was pruned."
    if checked is None:
        yield f"The latency is unverified: it is predicted, {lost or 'no board was given to measure it on.'}"
    elif not met:
        yield (
            f"The budget of {budget} is not met as measured on {checked.board}: {checked.ratio:.1%} of the dense model's "
            f"{dense.ms:.4g} ms, where {proposal.predicted_ms:.4g} ms were predicted."
        )


def _table_notes(predictor: Predictor, kernel_graph: KernelGraph, dense: DenseLatency) -> Iterator[str]:
    """What of the dense model the table does not hold: of another input or model it is extrapolated, and that must be said."""
    if dense.measured:
        return
    predicted = predictor.predict(kernel_graph.at(kernel_graph.graph.widths()))
    unknown = predicted[predicted["source"] != "measured"]
    if len(unknown):
        share = float(unknown["ms"].sum() / predicted["ms"].sum())
        yield (
            f"{len(unknown)} of {len(predicted)} kernels of the dense model ({share:.0%} of its time) are not in the latency "
            "table, so its predictions are extrapolated: profile this model with this input."
        )
    else:
        yield "The dense model as a whole is not in the latency table, so its latency is predicted: profile this model."


def _accuracy_notes(planner: Planner, metrics_after: Mapping[str, float]) -> Iterator[str]:
    if planner.task is None:
        yield (
            f"Accuracy was not measured: there is no task, the criterion {planner.criterion.name} used no data, "
            "and nothing was fine-tuned."
        )
        return
    for objective in planner.task.objectives:
        if not objective.meets_limit(metrics_after[objective.name]):
            yield f"The metric of {objective.name} is {metrics_after[objective.name]:.4g}, beyond its limit {objective.limit}."


def _search_notes(proposal: Proposal, unchanged: bool) -> Iterator[str]:
    certificate = proposal.allocation.certificate
    if not unchanged and certificate.bound is None:
        yield f"The widths are not proven optimal: {certificate.note}"


def _tell(progress: Progress | None, step: str, done: int) -> None:
    if progress is not None:
        progress(step, done, 1)
