"""`prune`: choose widths for a latency budget, cut, recover, and let the board have the last word."""

from __future__ import annotations

import copy
import logging
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.errors import ConfigError, RemoteError, TableMismatchError, TableMissingError
from edgeprune.loop.planning import Planner, Progress, Proposal
from edgeprune.loop.result import LatencyCheck, PruningRound, Result
from edgeprune.recovery.evaluation import RecoveryRecord, evaluate
from edgeprune.recovery.fine_tuning import FineTuning, fine_tune
from edgeprune.spec import Budget, Constraints

if TYPE_CHECKING:
    from torch import nn

    from edgeprune.allocation._base import Allocator
    from edgeprune.boards.board import Board
    from edgeprune.criteria._base import Criterion
    from edgeprune.graph.channel_graph import ChannelGraph
    from edgeprune.latency.predictor import Predictor
    from edgeprune.lowering.kernel_graph import KernelGraph
    from edgeprune.tasks.task import Task

MARGIN = 0.02
"""Share of the budget that the aim stays below it, because predictions and measurements scatter."""
CHECK_TOLERANCE = 1e-6
"""Largest difference between cut and masked model, both computed in float64."""

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
    allocator: str | Allocator = "greedy",
    backend: str = "onnxruntime",
    margin: float = MARGIN,
    fine_tuning: FineTuning | None = None,
    distill: bool = False,
    calibration_batches: int | None = 64,
    graph: ChannelGraph | None = None,
    kernel_graph: KernelGraph | None = None,
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
        budget: Upper bound of the latency; a share is one of the dense model's latency. Text as in `Budget.parse`.
        board: Where dense and pruned engines are compared in the end; None leaves the latency predicted only.
        predictor: Fitted on a table of the board.
        task: Data, loss and metric. Without it scores are data-free, nothing is recovered, and accuracy is not measured.
        constraints: What widths must respect.
        criterion: Importance of channels; ``"taylor"`` with a task and ``"l2"`` without one when None.
        allocator: How widths are chosen.
        backend: Runtime of the engines, where there is no `kernel_graph`.
        margin: Share of the budget that the predicted latency stays below it.
        fine_tuning: How the cut model is tuned on the task; ``FineTuning(epochs=0)`` only re-estimates batch norm.
        distill: Whether the dense model teaches the cut one by its logits.
        calibration_batches: Most training batches for batch-norm re-estimation.
        graph: The traced model, where the caller has it.
        kernel_graph: The lowered model, where the caller has it.
        plan_path: Where the plan is written.
        measuring_rounds: Rounds of the comparison on the board.
        progress: Called with (step, done, in all).

    Raises:
        TableMissingError: There is no predictor.
        TableMismatchError: The predictor is of another device or runtime than the board or backend.
        BudgetInfeasibleError: No widths meet the budget; says what the smallest plan reaches.
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
        planner = Planner(
            model,
            kernel_graph,
            predictor,
            task=task,
            constraints=constraints,
            criterion=criterion,
            allocator=allocator,
            progress=progress,
        )
        budget_ms = chosen.resolve_ms(planner.dense_ms)
        unchanged = planner.dense_ms <= budget_ms
        proposal = planner.dense(budget_ms) if unchanged else planner.propose(budget_ms, margin=margin)
        if plan_path is not None:
            proposal.plan.save(plan_path)
            _log.info("plan written to %s", plan_path)
        metrics_before = evaluate(model, task) if task is not None else {}
        records: tuple[RecoveryRecord, ...] = ()
        if unchanged:
            module, difference = copy.deepcopy(model), 0.0
        else:
            module, difference = _cut(model, proposal, example_inputs, progress)
            records = _recovered(module, model, task, fine_tuning, distill, calibration_batches, progress)
        checked, lost = None, ""
        if target is not None:
            from edgeprune.loop.verification import measure_ratio

            try:
                checked = measure_ratio(
                    target,
                    kernel_graph,
                    None if unchanged else module,
                    threads=int(predictor.table.header["threads"]),
                    rounds=measuring_rounds,
                    progress=progress,
                )
            except RemoteError as error:
                # The model is pruned and tuned by now; a lost board must not take that along.
                lost = f"{target.name} could not measure it: {error.message}"
                _log.warning("%s", lost)
    metrics_after = records[-1].after if records else metrics_before
    met = _met(chosen, budget_ms, checked)
    return Result(
        module=module,
        plan=proposal.plan,
        budget_ms=budget_ms,
        dense_predicted_ms=planner.dense_ms,
        predicted_ms=proposal.predicted_ms,
        measured_ms=None if checked is None else checked.pruned_ms,
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
        check_max_abs=difference,
        metrics_before=metrics_before,
        metrics_after=metrics_after,
        recovery=records,
        unchanged=unchanged,
        notes=_notes(chosen, budget_ms, planner, proposal, task, checked, lost, met, metrics_after, unchanged),
    )


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

    identity = predictor.table.header["identity"]
    if graph is None:
        _tell(progress, "tracing", 0)
        graph = trace(model, example_inputs)
        _tell(progress, "tracing", 1)
    _tell(progress, "lowering", 0)
    lowered = lower(
        graph, backend, model=model, architecture=identity["architecture"], isa=identity["isa"], workdir=folder
    )
    _tell(progress, "lowering", 1)
    return lowered


def _require_runtime(predictor: Predictor, kernel_graph: KernelGraph) -> None:
    runtime = predictor.table.header["runtime"]
    if runtime != kernel_graph.backend.name:
        raise TableMismatchError(
            f"the latency table must have been measured with {kernel_graph.backend.name}, found {runtime}.",
            hint=f"edgeprune profile --backend {kernel_graph.backend.name}",
        )


def _cut(
    model: nn.Module, proposal: Proposal, example_inputs: Any, progress: Progress | None
) -> tuple[nn.Module, float]:
    """The cut copy, and how far it is from the masked model."""
    from edgeprune.surgery.checking import check
    from edgeprune.surgery.cutting import apply

    _tell(progress, "cutting", 0)
    module = apply(model, proposal.plan)
    _tell(progress, "cutting", 1)
    _tell(progress, "checking", 0)
    difference = check(model, proposal.plan, example_inputs, tolerance=CHECK_TOLERANCE)
    _tell(progress, "checking", 1)
    return module, difference


def _recovered(
    module: nn.Module,
    dense: nn.Module,
    task: Task | None,
    settings: FineTuning | None,
    distill: bool,
    calibration_batches: int | None,
    progress: Progress | None,
) -> tuple[RecoveryRecord, ...]:
    """Batch-norm re-estimation, then fine-tuning, in place."""
    from edgeprune.recovery.batch_norm import reestimate_batch_norm

    if task is None:
        return ()
    lead = task.objectives[0]
    first = reestimate_batch_norm(module, lead.train, batches=calibration_batches, task=task, progress=progress)
    second = fine_tune(module, task, settings, teacher=dense if distill else None, progress=progress)
    return (first, second)


def _met(budget: Budget, budget_ms: float, checked: LatencyCheck | None) -> bool | None:
    if checked is None:
        return None
    if budget.latency_ratio is not None:
        return checked.ratio <= budget.latency_ratio
    return checked.pruned_ms <= budget_ms


def _notes(
    budget: Budget,
    budget_ms: float,
    planner: Planner,
    proposal: Proposal,
    task: Task | None,
    checked: LatencyCheck | None,
    lost: str,
    met: bool | None,
    metrics_after: Any,
    unchanged: bool,
) -> tuple[str, ...]:
    notes = []
    if unchanged:
        notes.append(
            f"The dense model is predicted to take {planner.dense_ms:.4g} ms, which is within the budget of "
            f"{budget_ms:.4g} ms: nothing was pruned."
        )
    if checked is None:
        notes.append(f"The latency is unverified: it is predicted, {lost or 'no board was given to measure it on.'}")
    elif not met:
        notes.append(
            f"The budget of {budget} is not met as measured on {checked.board}: {checked.pruned_ms:.4g} ms, "
            f"{checked.ratio:.1%} of dense, where {proposal.predicted_ms:.4g} ms were predicted."
        )
    if task is None:
        notes.append(
            f"Accuracy was not measured: there is no task, the criterion {planner.criterion.name} used no data, "
            "and nothing was fine-tuned."
        )
    else:
        notes += [
            f"The metric of {objective.name} is {metrics_after[objective.name]:.4g}, beyond its limit {objective.limit}."
            for objective in task.objectives
            if not objective.meets_limit(metrics_after[objective.name])
        ]
    if not unchanged and proposal.allocation.certificate.bound is None:
        notes.append(f"The widths are not proven optimal: {proposal.allocation.certificate.note}")
    return tuple(notes)


def _tell(progress: Progress | None, step: str, done: int) -> None:
    if progress is not None:
        progress(step, done, 1)
