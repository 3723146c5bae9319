"""What came of a quickstart: ``summary.json`` and the data of its report."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from edgeprune.budget import Budget
from edgeprune.deployment.result import Deployment
from edgeprune.latency.predictor import Predictor
from edgeprune.loop.result import Result
from edgeprune.loop.verification import check_of
from edgeprune.lowering.kernel_graph import KernelGraph
from edgeprune.profiling.comparing import Comparison
from edgeprune.report import pruning
from edgeprune.report.data import Candidate, Card, ReportData


def summary(
    result: Result, candidates: tuple[Candidate, ...], deployment: Deployment, compared: Comparison
) -> dict[str, Any]:
    """Figures of a run.

    Args:
        result: Of `edgeprune.prune`.
        candidates: Dense, uniform and pruned.
        deployment: Of the pruned artifact.
        compared: The three engines timed interleaved.
    """
    dense, uniform, pruned = candidates
    return {
        "board": deployment.board,
        "dense_ms": result.dense_ms,
        "pruned_predicted_ms": result.predicted_ms,
        "pruned_measured_ms": pruned.latency_ms,
        "budget_ms": result.budget_ms,
        "dense_accuracy": dense.accuracy,
        "pruned_accuracy": pruned.accuracy,
        "uniform_accuracy": uniform.accuracy,
        "params_before": dense.parameters,
        "params_after": pruned.parameters,
        "parity_max_abs": deployment.parity.max_abs,
        "uniform_measured_ms": uniform.latency_ms,
        "pruned_ratio": pruned.ratio,
        "uniform_ratio": uniform.ratio,
        "pruned_ratio_interval": [compared.ratios["pruned"].low, compared.ratios["pruned"].high],
        "gate_ratio": deployment.ratio,
        "milliseconds_as_timed": {name: found.median_ms for name, found in compared.measurements.items()},
        "check_max_abs": result.check_max_abs,
        "release": deployment.release,
    }


def verified(result: Result, compared: Comparison, *, board: str, tolerance: float) -> Result:
    """The result with what the board said in the end, as if `edgeprune.prune` had measured it itself.

    Args:
        result: Of a prediction that was made before anything was compiled.
        compared: The engines timed interleaved.
        board: Name of the board.
        tolerance: Share by which the budget may be exceeded.
    """
    check = check_of(board, compared)
    measured_ms = check.ratio * result.dense_ms
    return replace(
        result,
        measured_ms=measured_ms,
        budget_met=measured_ms <= (1 + tolerance) * result.budget_ms,
        measured=check,
        notes=tuple(note for note in result.notes if "unverified" not in note),
    )


def report_data(
    result: Result,
    candidates: tuple[Candidate, ...],
    deployment: Deployment,
    *,
    kernel_graph: KernelGraph,
    predictor: Predictor,
    budget: Budget,
) -> ReportData:
    """The report of a run; accuracies are those of the test split.

    Args:
        result: From `verified`.
        candidates: Dense, uniform and pruned.
        deployment: Of the pruned artifact.
        kernel_graph: The lowered dense model.
        predictor: What the widths were chosen with.
        budget: As the user gave it.
    """
    dense, uniform, pruned = candidates
    data = pruning.from_result(
        result,
        kernel_graph,
        predictor,
        title=f"Handwritten digits, pruned to {budget}",
        budget=str(budget),
        parameters_before=dense.parameters or 0,
    )
    accuracy = Card(
        "accuracy",
        f"{dense.accuracy:.2%} → {pruned.accuracy:.2%}",
        f"held-out test images; uniform pruning {uniform.accuracy:.2%}",
    )
    cards = tuple(accuracy if card.title in result.metrics_before else card for card in data.cards)
    data = replace(data, cards=cards, candidates=candidates, metric="accuracy on the test split")
    return pruning.with_deployment(data, asdict(deployment))
