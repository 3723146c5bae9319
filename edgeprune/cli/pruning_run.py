"""The run behind ``edgeprune prune``: from its options to a folder of results, at once or after an interruption."""

from __future__ import annotations

import shlex
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.cli import record as records
from edgeprune.cli.console import Output, command_line
from edgeprune.cli.loading import load_model, load_task
from edgeprune.cli.meant_latency import fitted
from edgeprune.cli.options import given
from edgeprune.cli.pruning_result import earlier_result, not_fp32, record_of, tell
from edgeprune.cli.pruning_start import begun, checked_table, interruption_of
from edgeprune.cli.record import PruneOptions, PruningRecord
from edgeprune.errors import ConfigError, TableMismatchError
from edgeprune.recovery.distillation.registry import require_names
from edgeprune.report.pruning import parameter_count
from edgeprune.tasks.limits import parse_limits

if TYPE_CHECKING:
    import torch

    from edgeprune.budget import Budget
    from edgeprune.loop.multitask.per_task import PerTask
    from edgeprune.loop.result import Result
    from edgeprune.tasks.task import Task


def begin(options: PruneOptions, out: Path, output: Output) -> None:
    """Prune from the start.

    Raises:
        EdgepruneError: Whatever `edgeprune.prune` and the loading of its arguments raise.
    """
    # What can be refused quickly is refused first: torch takes seconds to import, the model perhaps minutes to build.
    budget = options.budget
    _ = options.constraints  # read here only to be refused
    require_names(options.distill)
    if options.refit and options.refit_biases:
        raise ConfigError("--refit refits biases too, found --refit-biases beside it.", hint="one of the two")
    if parse_limits(options.limit) and options.task is None:
        raise ConfigError("--limit needs a task, for its objectives, found none.", hint="--task FILE.py:FACTORY")
    table, module, example = begun(options, out, output)
    _carry_out(options, budget, out, output, module, example, table, None)


def go_on(out: Path, board: str | None, output: Output) -> None:
    """Go on with a run that was interrupted while it tuned, or whose last plan no board has measured.

    Args:
        out: Folder of the run.
        board: Where to measure now, in place of the run's own board; an interrupted run goes on with its own.
        output: Where to tell it.

    Raises:
        ConfigError: There is no such run, nothing is left of it, or no board is known.
        TableMismatchError: The table is not the one of the run any more.
        EdgepruneError: As in `begin`.
    """
    interrupted = records.interrupted(out)
    if interrupted is not None:
        if board is not None and board != interrupted.board:
            raise ConfigError(
                f"an interrupted run goes on with its own board, {interrupted.board}, found {board}.",
                hint=command_line("edgeprune", "prune", "--resume", "--out", out),
            )
        if interrupted.tiles is not None:
            from edgeprune.cli.tiles_run import begin_tiles

            begin_tiles(interrupted, out, output)
            return
        begin(interrupted, out, output)
        return
    if not (out / records.FILE_NAME).is_file():
        raise ConfigError(
            "--resume goes on with a run that was interrupted while it tuned, or with a finished one whose last plan no board "
            f"has measured; {out} holds no finished run, and nothing of an interrupted one.",
            hint="edgeprune prune MODEL --table TABLE --latency 12ms, without --resume",
        )
    record = PruningRecord.load(out)
    if record.options.tiles is not None:
        raise ConfigError(
            f"a run that removed tiles is measured by compiling and deploying it, {out} is one: there is nothing to go on with.",
            hint=command_line("edgeprune", "compile", out),
        )
    if record.weights_hash != records.file_hash(record.options.weights):
        raise ConfigError(
            f"the weights of the run must still be those at {record.options.weights}, found others.",
            hint="edgeprune prune, without --resume",
        )
    options = record.options if board is None else record.options.model_copy(update={"board": board})
    if not record.unfinished:
        raise ConfigError(
            f"a run to go on with must have a plan that was not measured, every plan of {out} was.",
            hint=command_line("edgeprune", "compile", out),
        )
    if options.board == "none":
        raise ConfigError(
            f"going on with {out} needs a board to measure on, found none.",
            hint=command_line("edgeprune", "prune", "--resume", "--out", out, "--board", record.board),
        )
    table = checked_table(options, output)
    module = load_model(options.model, options.weights, seed=options.seed)
    example = records.load_inputs(out / records.INPUTS_NAME)
    _carry_out(options, options.budget, out, output, module, example, table, record)


def _carry_out(
    options: PruneOptions,
    budget: Budget,
    out: Path,
    output: Output,
    module: torch.nn.Module,
    example: Any,
    table: Any,
    earlier: PruningRecord | None,
) -> None:
    import edgeprune
    from edgeprune.loop.dense import dense_latency
    from edgeprune.loop.lowering import precision_of
    from edgeprune.loop.notes import table_notes
    from edgeprune.report import pruning, stored
    from edgeprune.surgery.cutting import described

    task = None if options.task is None else load_task(options.task)
    if task is not None:
        from edgeprune.tasks.batches import validate

        task = task.with_limits(parse_limits(options.limit))
        with output.step("try the task on one batch"):
            validate(task, module)
    with output.step("fit the predictor"):
        predictor = fitted(table, options)
    if earlier is not None and predictor.table_hash != earlier.table_hash:
        raise TableMismatchError(
            f"the latency table of the run must be at {options.table}, found another one.",
            hint="edgeprune prune, without --resume",
        )
    interruption = interruption_of(options, out, output)
    with records.staged(out) as folder, tempfile.TemporaryDirectory(prefix="edgeprune-lower-") as scratch:
        with output.step("trace and lower"):
            graph = edgeprune.trace(module, example)
            device = predictor.table.target()
            kernel_graph = edgeprune.lower(
                graph,
                options.backend,
                model=module,
                device=device,
                precision=precision_of(predictor),
                workdir=Path(scratch),
            )
            # Known before the long steps: who gave the wrong table need not wait for them.
            dense = dense_latency(predictor, kernel_graph)
            told = tuple(table_notes(predictor, kernel_graph, dense))
            for note in told:
                output.say(note)
            if budget.bounds_latency and not budget.bounds_more and dense.ms <= budget.resolve_ms(dense.ms):
                output.say(
                    f"the dense model takes {dense.ms:.4g} ms, within the budget of {budget}: there is nothing to prune"
                )
        with output.step(f"prune to {budget}") as progress:
            from edgeprune.criteria.calibration import DamageCalibration
            from edgeprune.loop.multitask.pagcp import Pagcp
            from edgeprune.loop.netadapt import NetAdapt
            from edgeprune.loop.soft_masking import SoftMasking
            from edgeprune.recovery.fine_tuning import FineTuning

            result = edgeprune.prune(
                module,
                example,
                budget,
                None if options.board == "none" else options.board,
                predictor,
                task,
                options.constraints,
                criterion=options.criterion,
                calibrate_damage=DamageCalibration() if options.calibrate_damage else None,
                allocator=options.allocator,
                fine_tuning=FineTuning(
                    epochs=options.epochs,
                    lr=options.lr,
                    ema=options.ema,
                    precision=options.amp or "float32",
                    seed=options.seed,
                ),
                distill=options.distill,
                taps=options.tap,
                blocks=options.blocks,
                refit="biases" if options.refit_biases else options.refit,
                soft_masking=SoftMasking(options.soft_masking, options.reallocate_every)
                if options.soft_masking
                else None,
                netadapt=NetAdapt() if options.netadapt else None,
                pagcp=Pagcp(rounds=options.pagcp) if options.pagcp else None,
                per_task=_per_task(options, task),
                graph=graph,
                kernel_graph=kernel_graph,
                plan_path=folder / records.PLAN_NAME,
                earlier=None if earlier is None else earlier_result(earlier, out, module),
                checkpoint=interruption,
                progress=progress.stepped,
            )
        with output.step("write"):
            edgeprune.save(result.module, folder / records.MODEL_FOLDER, result.plan)
            records.save_inputs(example, folder / records.INPUTS_NAME)
            data = pruning.from_result(
                result,
                kernel_graph,
                predictor,
                title=f"{type(module).__name__} pruned to {budget}",
                budget=str(budget),
                parameters_before=parameter_count(module),
            )
            stored.save(data, folder / stored.FILE_NAME)
            record = record_of(result, predictor, options)
            (folder / records.FILE_NAME).write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")
    interruption.discard()
    tell(output, budget, result, module, told)
    if result.unchanged:
        output.say(
            f"nothing was pruned: {out} holds the whole dense model and a plan that removes nothing, so that compile and deploy "
            "go on as usual"
        )
    output.wrote(out / records.PLAN_NAME, "plan that removes nothing" if result.unchanged else "plan")
    output.wrote(out / records.MODEL_FOLDER, "dense model" if result.unchanged else "pruned model")
    output.wrote(out / records.INPUTS_NAME, "example inputs")
    output.wrote(out / stored.FILE_NAME, "data of the report")
    output.wrote(out / records.FILE_NAME, "settings and figures of the run, for compile")
    taken = result.rounds[result.chosen]
    output.finish(
        {
            **record.model_dump(mode="json"),
            "out": str(out),
            "budget_met": result.budget_met,
            "parameters_before": parameter_count(module),
            "parameters_after": parameter_count(result.module),
            "predicted_low_ms": taken.predicted_low_ms,
            "predicted_high_ms": taken.predicted_high_ms,
            "unchanged": result.unchanged,
            "module": None if result.unchanged else described(result.module, result.plan),
            "notes": list(result.notes),
        },
        next_command=_next(result, record.options, out),
    )


def _per_task(options: PruneOptions, task: Task | None) -> PerTask | None:
    """Limits of several objectives choose the widths, unless something else was asked to.

    Raises:
        ConfigError: Limits are to be held, and there are none, or something else chooses the widths.
    """
    from edgeprune.loop.multitask.per_task import PerTask

    chosen = {
        "--pagcp": options.pagcp,
        "--netadapt": options.netadapt,
        "--soft-masking": options.soft_masking,
        "--blocks": options.blocks,
        f"--allocator {options.allocator}": options.allocator != "exact",
    }
    others = [name for name, asked in chosen.items() if asked]
    limited = [] if task is None else [one for one in task.objectives if one.limit is not None]
    if options.hold_limits and (others or not limited):
        found = others[0] if others else "no limit"
        name = "NAME" if task is None else shlex.quote(task.objectives[0].name)
        limit = f"--limit {name}=2%" + (f", without {others[0]}" if others else "")
        raise ConfigError(
            f"--hold-limits needs limits of objectives, and the exact allocator to hold them, found {found}.",
            hint="--pagcp holds them anyway" if options.pagcp else limit,
        )
    if others or task is None or not (options.hold_limits or (limited and len(task.objectives) > 1)):
        return None
    return PerTask(hold=options.hold_limits)


def _next(result: Result, options: PruneOptions, out: Path) -> str:
    if result.measured is None and options.board != "none":
        return command_line("edgeprune", "prune", "--resume", "--out", out)
    precision = not_fp32(options.precision)
    return command_line(
        *("edgeprune", "compile", out, "--out", out / "artifact", "--dense", out / "dense"),
        *given(seed=options.seed or None, precision=precision),
        # What int8 is calibrated with, where the run has none of its own.
        *given(task="FACTORY" if precision == "int8" and options.task is None else None),
    )
