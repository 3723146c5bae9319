"""``edgeprune prune``: prune a model to a latency budget."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgeprune.cli.console import Output, command_line
from edgeprune.cli.options import (
    BackendOption,
    InputOption,
    InputsOption,
    JsonOption,
    ModelArgument,
    SeedOption,
    VerboseOption,
    WeightsOption,
    given,
)
from edgeprune.criteria.registry import CRITERIA
from edgeprune.errors import ConfigError
from edgeprune.spec import Budget, Constraints

if TYPE_CHECKING:
    import torch

    from edgeprune.cli.record import PruningRecord
    from edgeprune.latency.predictor import Predictor
    from edgeprune.loop.result import Result


def prune(
    model: ModelArgument,
    table: Annotated[Path, typer.Option("--table", help="Latency table, or predictor settings of `edgeprune fit`.")],
    latency: Annotated[str, typer.Option("--latency", metavar="12ms|50%", help="Latency budget.")],
    input_: InputOption = None,
    inputs: InputsOption = None,
    weights: WeightsOption = None,
    task: Annotated[
        str | None, typer.Option("--task", metavar="FILE.py:FACTORY", help="Data, loss and metric (edgeprune.Task).")
    ] = None,
    board: Annotated[
        str, typer.Option("--board", help="Where the result is measured; none leaves it predicted only.")
    ] = "none",
    backend: BackendOption = "onnxruntime",
    keep: Annotated[
        list[str] | None, typer.Option("--keep", metavar="PATTERN", help="Modules whose channels stay; repeat.")
    ] = None,
    min_width: Annotated[
        list[str] | None,
        typer.Option("--min-width", metavar="PATTERN=N", help="Fewest units to keep, not an eighth; repeat."),
    ] = None,
    multiple_of: Annotated[
        list[str] | None, typer.Option("--multiple-of", metavar="PATTERN=N", help="Widths are multiples; repeat.")
    ] = None,
    same_as: Annotated[
        list[str] | None, typer.Option("--same-as", metavar="PATTERN=MODULE", help="Equal widths; repeat.")
    ] = None,
    criterion: Annotated[
        str | None,
        typer.Option(
            "--criterion",
            help=f"Importance: {', '.join(CRITERIA.builtin)}; taylor with a task and l2 without by default.",
        ),
    ] = None,
    calibrate_damage: Annotated[
        bool,
        typer.Option(
            "--calibrate-damage", help="Measure a few losses per group first, so that groups compare as losses."
        ),
    ] = False,
    allocator: Annotated[
        str,
        typer.Option(
            "--allocator", help="How widths are chosen: exact, global_threshold, greedy, knapsack or uniform."
        ),
    ] = "exact",
    epochs: Annotated[int, typer.Option("--epochs", min=0, help="Of fine-tuning on the task.")] = 3,
    lr: Annotated[float, typer.Option("--lr", help="Learning rate of fine-tuning.")] = 1e-3,
    distill: Annotated[bool, typer.Option("--distill", help="Let the dense model teach the pruned one.")] = False,
    seed: SeedOption = 0,
    out: Annotated[Path, typer.Option("--out", help="Folder to write.")] = Path("pruned"),
    json_output: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Prune a model to a latency budget: choose widths by predicted milliseconds, cut, check, tune, measure.

    Without a task the criterion uses no data, nothing is tuned, and accuracy is not measured.
    """
    import edgeprune
    from edgeprune.cli import record as records
    from edgeprune.cli.inputs import example_inputs
    from edgeprune.cli.loading import load_model, load_task
    from edgeprune.report import pruning, stored

    # What can be refused quickly is refused first: torch takes seconds to import, the model perhaps minutes to build.
    output = Output(json_output)
    budget = Budget.parse(latency)
    constraints = Constraints(
        keep=tuple(keep or ()),
        min_width=_numbers("--min-width", min_width),
        multiple_of=_numbers("--multiple-of", multiple_of),
        same_as=_pairs("--same-as", same_as),
    )
    records.check_out(out)
    if weights is None:
        output.say("no --weights: the model is taken with the weights that its factory gives it")
    measured = None if table.suffix == ".json" else edgeprune.LatencyTable.load(table)
    module = load_model(model, weights, seed=seed)
    example = example_inputs(module, input_, inputs, seed=seed)
    loaded_task = None if task is None else load_task(task)
    if loaded_task is not None:
        from edgeprune.tasks.batches import validate

        with output.step("try the task on one batch"):
            validate(loaded_task, module)
    with output.step("fit the predictor"):
        predictor = edgeprune.Predictor.load(table) if measured is None else edgeprune.fit(measured)
    with records.staged(out) as folder, tempfile.TemporaryDirectory(prefix="edgeprune-lower-") as scratch:
        with output.step("trace and lower"):
            graph = edgeprune.trace(module, example)
            device = predictor.table.target()
            kernel_graph = edgeprune.lower(graph, backend, model=module, device=device, workdir=Path(scratch))
        with output.step(f"prune to {budget}") as progress:
            from edgeprune.criteria.calibration import DamageCalibration
            from edgeprune.recovery.fine_tuning import FineTuning

            result = edgeprune.prune(
                module,
                example,
                budget,
                None if board == "none" else board,
                predictor,
                loaded_task,
                constraints,
                criterion=criterion,
                calibrate_damage=DamageCalibration() if calibrate_damage else None,
                allocator=allocator,
                fine_tuning=FineTuning(epochs=epochs, lr=lr, seed=seed),
                distill=distill,
                graph=graph,
                kernel_graph=kernel_graph,
                plan_path=folder / records.PLAN_NAME,
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
                parameters_before=_parameters(module),
            )
            stored.save(data, folder / stored.FILE_NAME)
            record = _record(result, predictor, model, weights, seed, kernel_graph.backend.name, latency, board)
            (folder / records.FILE_NAME).write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")
    _tell(output, result, module)
    output.wrote(out / records.PLAN_NAME, "plan")
    output.wrote(out / records.MODEL_FOLDER, "pruned model")
    output.wrote(out / records.INPUTS_NAME, "example inputs")
    output.wrote(out / stored.FILE_NAME, "data of the report")
    output.wrote(out / records.FILE_NAME, "settings and figures of the run, for compile")
    output.finish(
        {
            **record.model_dump(),
            "out": str(out),
            "budget_met": result.budget_met,
            "parameters_before": _parameters(module),
            "parameters_after": _parameters(result.module),
            "metrics_before": dict(result.metrics_before),
            "metrics_after": dict(result.metrics_after),
            "predicted_low_ms": result.rounds[-1].predicted_low_ms,
            "predicted_high_ms": result.rounds[-1].predicted_high_ms,
            "check_max_abs": result.check_max_abs,
            "unchanged": result.unchanged,
            "notes": list(result.notes),
        },
        next_command=command_line(
            *("edgeprune", "compile", out, "--out", out / "artifact", "--dense", out / "dense"),
            *given(seed=seed or None),
        ),
    )


def _pairs(option: str, texts: Sequence[str] | None) -> dict[str, str]:
    pairs = {}
    for text in texts or ():
        pattern, separator, value = text.rpartition("=")
        if not separator or not pattern or not value:
            raise ConfigError(f"{option} must be written PATTERN=VALUE, found {text!r}.", hint=f"{option} 'layers.*=8'")
        pairs[pattern] = value
    return pairs


def _numbers(option: str, texts: Sequence[str] | None) -> dict[str, int]:
    numbers = {}
    for pattern, value in _pairs(option, texts).items():
        if not value.isdigit():
            raise ConfigError(
                f"{option} must give a whole number, found {pattern}={value}.", hint=f"{option} {pattern}=8"
            )
        numbers[pattern] = int(value)
    return numbers


def _parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _record(
    result: Result,
    predictor: Predictor,
    model: str,
    weights: Path | None,
    seed: int,
    backend: str,
    latency: str,
    board: str,
) -> PruningRecord:
    from edgeprune.cli.record import PruningRecord, absolute_reference
    from edgeprune.report.pruning import threads

    header = predictor.table.header
    checked = result.rounds[-1].measured if result.rounds else None
    cpu = header["identity"].get("cpu_model", "unknown")
    return PruningRecord(
        model=absolute_reference(model),
        weights=None if weights is None else str(weights.resolve()),
        seed=seed,
        backend=backend,
        table_hash=predictor.table_hash,
        budget=latency,
        budget_ms=result.budget_ms,
        dense_predicted_ms=result.dense_predicted_ms,
        predicted_ms=result.predicted_ms,
        dense_ms=None if checked is None else result.dense_ms,
        measured_ms=result.measured_ms,
        board=header["board"] if board == "none" else board,
        threads=header["threads"],
        conditions=""
        if checked is None
        else f"measured on {checked.board} ({cpu}, {header['runtime']}, {threads(header['threads'])})",
        plan_hash=result.plan.hash,
    )


def _tell(output: Output, result: Result, dense: torch.nn.Module) -> None:
    rows: list[list[Any]] = [
        ["predicted latency, ms", f"{result.dense_predicted_ms:.3f}", f"{result.predicted_ms:.3f}"],
    ]
    if result.rounds:
        last = result.rounds[-1]
        rows.append(["interval of the prediction", "", f"{last.predicted_low_ms:.3f} to {last.predicted_high_ms:.3f}"])
    checked = result.rounds[-1].measured if result.rounds else None
    if checked is not None:
        rows.append([f"latency on {checked.board}, ms", f"{result.dense_ms:.3f}", f"{result.measured_ms:.3f}"])
        rows.append(["of dense, interleaved", "100.0%", f"{checked.ratio:.1%}"])
        rows.append(["as timed in that comparison, ms", f"{checked.dense_ms:.3f}", f"{checked.pruned_ms:.3f}"])
    rows += [
        [name, f"{before:.4f}", f"{result.metrics_after[name]:.4f}"] for name, before in result.metrics_before.items()
    ]
    rows.append(["parameters", f"{_parameters(dense):,}", f"{_parameters(result.module):,}"])
    output.table(f"budget {result.budget_ms:.3f} ms", ["", "dense", "pruned"], rows)
    output.say(f"cut and masked model differ by at most {result.check_max_abs:.1e}")
    for note in result.notes:
        output.say(note)
