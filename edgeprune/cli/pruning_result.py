"""The result of a pruning run of channels: as its record keeps it, as a run that goes on needs it, and as people read it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.cli import record as records
from edgeprune.cli.console import Output
from edgeprune.cli.record import PruneOptions, PruningRecord, Recovered
from edgeprune.errors import ConfigError
from edgeprune.report.pruning import parameter_count

if TYPE_CHECKING:
    import torch

    from edgeprune.budget import Budget
    from edgeprune.latency.predictor import Predictor
    from edgeprune.loop.result import Result, Spent


def record_of(result: Result, predictor: Predictor, options: PruneOptions) -> PruningRecord:
    """What ``prune.json`` keeps of a run."""
    from edgeprune.loop.lowering import precision_of
    from edgeprune.report.pruning import engines, threads

    header = predictor.table.header
    checked = result.measured
    cpu = header["identity"].get("cpu_model", "unknown")
    return PruningRecord(
        options=options.model_copy(update={"precision": not_fp32(precision_of(predictor))}),
        table_hash=predictor.table_hash,
        weights_hash=records.file_hash(options.weights),
        budget_ms=result.budget_ms,
        dense_predicted_ms=result.dense_predicted_ms,
        predicted_ms=result.predicted_ms,
        dense_ms=None if checked is None else result.dense_ms,
        measured_ms=result.measured_ms,
        board=predictor.table.board if options.board == "none" else options.board,
        threads=header["threads"],
        conditions=""
        if checked is None
        else f"measured on {checked.board} ({cpu}, {engines(header)}, {threads(header['threads'])})",
        plan_hash=result.plan.hash,
        rounds=result.rounds,
        chosen=result.chosen,
        spent=result.spent,
        check_max_abs=result.check_max_abs,
        metrics_before=dict(result.metrics_before),
        metrics_after=dict(result.metrics_after),
        recovery=tuple(Recovered(**asdict(step)) for step in result.recovery),
        verdicts=result.verdicts,
        outputs={} if result.serves is None else dict(result.serves.outputs),
    )


def earlier_result(record: PruningRecord, out: Path, module: torch.nn.Module) -> Result:
    """The result of the run in a folder, as far as going on with it needs it."""
    import edgeprune
    from edgeprune.loop.result import Result
    from edgeprune.recovery.evaluation import RecoveryRecord

    assert record.budget_ms is not None  # of a run of channels, which always has these
    assert record.dense_predicted_ms is not None
    assert record.predicted_ms is not None
    taken = record.rounds[record.chosen]
    plan = edgeprune.PruningPlan.load(out / records.PLAN_NAME)
    if plan.hash != record.plan_hash:
        raise ConfigError(
            f"{out / records.PLAN_NAME} must be the plan of the run, found another.",
            hint="edgeprune prune, without --resume",
        )
    return Result(
        module=edgeprune.load(out / records.MODEL_FOLDER, module),
        plan=plan,
        budget_ms=record.budget_ms,
        dense_ms=record.dense_predicted_ms if record.dense_ms is None else record.dense_ms,
        dense_measured=record.dense_ms is not None,
        dense_predicted_ms=record.dense_predicted_ms,
        predicted_ms=record.predicted_ms,
        measured_ms=None,
        budget_met=None,
        rounds=record.rounds,
        chosen=record.chosen,
        certificate=taken.certificate,
        check_max_abs=record.check_max_abs,
        metrics_before=record.metrics_before,
        metrics_after=record.metrics_after,
        recovery=tuple(RecoveryRecord(**step.model_dump()) for step in record.recovery),
    )


def tell(output: Output, budget: Budget, result: Result, dense: torch.nn.Module, told: Collection[str]) -> None:
    """The figures of a run, dense beside pruned, and its notes but for those that were told before."""
    from edgeprune.surgery.cutting import described

    rows: list[list[Any]] = [
        ["predicted latency, ms", f"{result.dense_predicted_ms:.3f}", f"{result.predicted_ms:.3f}"],
    ]
    if result.rounds:
        last = result.rounds[result.chosen]
        rows.append(["interval of the prediction", "", f"{last.predicted_low_ms:.3f} to {last.predicted_high_ms:.3f}"])
    checked = result.measured
    if checked is not None:
        rows.append([f"latency on {checked.board}, ms", f"{result.dense_ms:.3f}", f"{result.measured_ms:.3f}"])
        rows.append(["of dense, interleaved", "100.0%", checked.of_dense])
        rows.append(["as timed in that comparison, ms", f"{checked.dense_ms:.3f}", f"{checked.pruned_ms:.3f}"])
    rows += [
        [
            f"{one.objective}, {one.asked}" if one.asked else one.objective,
            f"{one.dense:.4f}",
            f"{one.pruned:.4f}{'' if one.kept is None else ', kept' if one.kept else ', broken'}",
        ]
        for one in result.verdicts
    ]
    rows.append(["parameters", f"{parameter_count(dense):,}", f"{parameter_count(result.module):,}"])
    rows += [
        [f"{one.name}, at most {_amount(one, one.at_most)}", _amount(one, one.dense), _amount(one, one.value)]
        for one in result.spent
    ]
    output.table(f"budget {budget}", ["", "dense", "pruned"], rows)
    steps = [
        [step.step.replace("_", " "), name, f"{step.before[name]:.4f}", f"{value:.4f}"]
        for step in result.recovery
        for name, value in step.after.items()
    ]
    if steps:
        output.table("validation metric, step by step", ["step", "metric", "before", "after"], steps)
    if checked is not None:
        output.say(
            f"the latency to quote is {result.measured_ms:.3f} ms ({checked.ratio:.1%} of the dense model's "
            f"{result.dense_ms:.3f} ms), measured on {checked.board}: the predicted one only chose the widths, and those "
            "as timed hold for that minute"
        )
    else:
        output.say(f"the latency to quote is {result.predicted_ms:.3f} ms, predicted; no board has measured it yet")
    if result.plan.removed:
        names = ", ".join(str(branch["name"]) for branch in result.plan.removed)
        output.say(f"residual blocks removed: {names}")
    if not result.unchanged:
        output.say(f"the pruned model is {described(result.module, result.plan)}")
    output.say(f"cut and masked model differ by at most {result.check_max_abs:.1e}")
    for note in result.notes:
        if note not in told:
            output.say(note)


def _amount(spent: Spent, value: float) -> str:
    return f"{value:.4g} {spent.unit}" if spent.unit == "mJ" else f"{value:,.0f} {spent.unit}".rstrip()


def not_fp32(precision: str | None) -> str | None:
    """A precision where it has to be said; None of the usual one."""
    return None if precision == "fp32" else precision
