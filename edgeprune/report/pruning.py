"""Report data of one pruning run, and of the deployment that followed it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, Literal

from edgeprune.boards import fingerprint
from edgeprune.latency.chosen import Chosen
from edgeprune.report import collecting, tasks
from edgeprune.report.data import Candidate, Card, ReportData, Round

if TYPE_CHECKING:
    from torch import nn

    from edgeprune.latency.predictor import Predictor
    from edgeprune.loop.pruned import Pruned
    from edgeprune.loop.result import LatencyCheck, MetricVerdict, Result
    from edgeprune.lowering.kernel_graph import KernelGraph

Verdict = Literal["good", "bad", ""]


def parameter_count(module: nn.Module) -> int:
    """Number of parameters; what several modules share counts once."""
    return sum(parameter.numel() for parameter in module.parameters())


def from_result(
    result: Result,
    kernel_graph: KernelGraph,
    predictor: Predictor,
    *,
    title: str,
    budget: str,
    parameters_before: int,
) -> ReportData:
    """Everything that a pruning run knows.

    Args:
        result: Of `edgeprune.prune`.
        kernel_graph: The lowered dense model.
        predictor: The one that the widths were chosen with.
        title: Headline.
        budget: As the user wrote it.
        parameters_before: Number of parameters of the dense model.
    """
    widths = result.plan.widths()
    header = predictor.table.header
    probed = fingerprint.from_facts(header["fingerprint"])
    device = f"{predictor.table.board} ({probed.cpu_model}, {engines(header)}, {threads(header['threads'])})"
    parameters_after = parameter_count(result.module)
    checked, parameters = result.measured, (parameters_before, parameters_after)
    kernels, networks = collecting.held_out_predictions(predictor)
    report = predictor.report()
    return ReportData(
        title=title,
        provenance=f"measured on {device}"
        if result.measured_ms is not None
        else f"predicted from a table measured on {device}",
        created=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        cards=(
            _latency_card(result, budget),
            _prediction_card(result),
            *(metric_card(verdict) for verdict in result.verdicts),
            Card("parameters", f"{parameters_before:,} → {parameters_after:,}"),
            Card("cut equals masked", f"{result.check_max_abs:.1e}", "largest absolute difference, before tuning"),
        ),
        board={"board": predictor.table.board, **collecting.board_facts(probed)},
        conditions=collecting.flat_conditions(header.get("conditions", {})),
        disturbances=collecting.disturbances(header),
        dense_ms=result.dense_ms,
        candidates=() if checked is None else candidate_rows(result, checked, result.dense_ms, parameters),
        metric=next(iter(result.metrics_before), "metric"),
        # Of a budget besides the latency nothing is corrected; a board that was lost leaves no verdict, but what it said before.
        rounds=round_rows(result, result.dense_ms, result.budget_ms)
        if result.budget_met is not None or result.budget_ms < result.dense_ms
        else (),
        tasks=tasks.task_table(result),
        served=tasks.served_groups(result),
        task_latency=tasks.latency_shares(result),
        staircases=collecting.staircases(kernel_graph, predictor, widths),
        layers=collecting.layers(kernel_graph, predictor, kernel_graph.graph.widths(), widths),
        layer_source=collecting.LAYER_SOURCE,
        kernel_predictions=kernels,
        network_predictions=networks,
        sentinels_ms=collecting.sentinels(header),
        noise=f"On what the fit had not seen: {report.summary()}.",
        errors=collecting.error_table(report),
        groups=collecting.group_choices(result.plan),
        frozen=collecting.frozen_groups(kernel_graph.graph),
        hashes={
            "latency table": predictor.table_hash,
            "plan": result.plan.hash,
            "model": kernel_graph.graph.signature,
            "measured": str(header.get("created", "")),
        },
        notes=result.notes,
    )


def metric_card(verdict: MetricVerdict) -> Card:
    """An objective's metric before and after."""
    value, detail = f"{verdict.dense:.4f} → {verdict.pruned:.4f}", "validation data of the task"
    if verdict.kept is None:
        return Card(verdict.objective, value, detail)
    return Card(verdict.objective, value, f"{detail}; {verdict.asked}", "good" if verdict.kept else "bad")


def engines(header: Mapping[str, Any]) -> str:
    """Runtime of a table's engines, and their precision where it is not fp32."""
    precision = Chosen.of(header).precision
    return str(header["runtime"]) if precision == "fp32" else f"{header['runtime']} in {precision}"


def threads(count: int) -> str:
    """``"1 thread"``, ``"2 threads"``."""
    return f"{count} thread{'' if count == 1 else 's'}"


def with_deployment(data: ReportData, deployment: Mapping[str, Any]) -> ReportData:
    """The same with what a deployment checked and measured on its board.

    Args:
        data: Of the pruning run.
        deployment: As `edgeprune deploy` wrote it: the fields of `Deployment`.
    """
    ratio, timed_ms, dense_ms = deployment.get("ratio"), deployment["measured_ms"], deployment.get("dense_ms")
    if timed_ms is None:
        value, detail = "not measured", "its processor is emulated"
    elif not (ratio and dense_ms):
        value, detail = f"{timed_ms:.3f} ms", "as timed, without a dense reference"
    elif data.dense_ms is None:
        value, detail = f"{timed_ms:.3f} ms", f"as timed; {ratio:.1%} of dense, interleaved"
    else:  # the one scale of the page, whatever the speed of the board on that day
        value = f"{ratio * data.dense_ms:.3f} ms"
        detail = f"{ratio:.1%} of dense, interleaved; as timed there {dense_ms:.3f} → {timed_ms:.3f} ms"
    if deployment.get("budget") and deployment.get("tolerance") is not None:
        detail = f"{detail}; budget {deployment['budget']}, +{deployment['tolerance']:.0%} tolerated"
    timed_with, made_for = deployment.get("threads"), deployment.get("made_for_threads")
    if timed_with and made_for and made_for != timed_with:
        detail = f"{detail}; timed with {threads(timed_with)}, the artifact is for {threads(made_for)}"
    if deployment.get("disturbance"):
        detail = f"{detail}; {deployment['disturbance']}"
    parity = deployment["parity"]
    board = deployment["board"]
    cards = (
        Card(f"deployed to {board}", value, detail, "good"),
        Card(f"parity on {board}", f"{parity['max_abs']:.1e}", "largest absolute difference", "good"),
        *(
            Card(
                f"parity of {name} on {board}",
                f"{one['relative']:.1e} of the scale",
                f"{one['tolerance']:.1e} allowed",
                "good" if one["passed"] else "bad",
            )
            for name, one in parity.get("tasks", {}).items()
        ),
    )
    hashes = {f"artifact on {board}": str(deployment["artifact"]), f"release on {board}": str(deployment["release"])}
    return replace(data, cards=(*data.cards, *cards), hashes={**data.hashes, **hashes})


def _latency_card(result: Result, budget: str) -> Card:
    checked = result.measured
    if checked is None:
        value = f"{result.dense_predicted_ms:.3f} → {result.predicted_ms:.3f} ms"
        return Card("latency, predicted only", value, f"budget {budget}; not measured on a board")
    verdict: Verdict = "" if result.budget_met is None else "good" if result.budget_met else "bad"
    interleaved = ", ".join(filter(None, ("interleaved", checked.disturbance)))
    return Card(
        "latency",
        f"{result.dense_ms:.3f} → {result.measured_ms:.3f} ms",
        f"{checked.ratio:.1%} of dense, {interleaved}; budget {budget}; "
        f"as timed in the comparison {checked.dense_ms:.3f} → {checked.pruned_ms:.3f} ms",
        verdict,
    )


def _prediction_card(result: Result) -> Card:
    detail = ""
    if result.rounds:
        last = result.rounds[result.chosen]
        detail = f"interval {last.predicted_low_ms:.3f} to {last.predicted_high_ms:.3f} ms"
    if result.measured_ms is not None:
        detail = f"{result.predicted_ms / result.measured_ms - 1:+.1%} of measured, {detail}"
    return Card("predicted before compiling", f"{result.predicted_ms:.3f} ms", detail)


def round_rows(result: Pruned, dense_ms: float, budget_ms: float) -> tuple[Round, ...]:
    """The rounds of the closed loop, none where no plan was measured.

    Args:
        result: Of channels or of tiles.
        dense_ms: Latency of the dense model, the scale of the page, milliseconds.
        budget_ms: Of the latency, milliseconds.
    """
    if not any(turn.measured for turn in result.rounds):
        return ()
    rows = []
    for place, turn in enumerate(result.rounds):
        measured_ms = None if turn.measured is None else turn.measured_ms(dense_ms)
        share = None if measured_ms is None else measured_ms / budget_ms
        rows.append(Round(turn.aim_ms, turn.predicted_ms, measured_ms, share, place == result.chosen))
    return tuple(rows)


def candidate_rows(
    result: Pruned, checked: LatencyCheck, dense_ms: float, parameters: tuple[int, int]
) -> tuple[Candidate, ...]:
    """Dense and pruned model side by side.

    Args:
        result: Of channels or of tiles.
        checked: Their comparison on a board.
        dense_ms: Latency of the dense model, the scale of the page, milliseconds.
        parameters: Of the dense and the pruned model.
    """
    lead = next(iter(result.metrics_before), None)
    before = None if lead is None else result.metrics_before[lead]
    after = None if lead is None else result.metrics_after[lead]
    return (
        Candidate("dense", dense_ms, 1.0, before, parameters[0]),
        Candidate("pruned", checked.ratio * dense_ms, checked.ratio, after, parameters[1]),
    )
