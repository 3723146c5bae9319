"""``edgeprune compile``: from a model, or from a pruning run, to an artifact for boards."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgeprune.cli.compile_tuning import tell_beside, telling, tuned_backend, tuning_of
from edgeprune.cli.console import Output, command_line
from edgeprune.cli.options import (
    BackendOption,
    InputOption,
    InputsOption,
    JsonOption,
    SeedOption,
    VerboseOption,
    WeightsOption,
    given,
    input_flags,
    was_given,
)
from edgeprune.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from edgeprune.backends.tvm.tuning import Tuning
    from edgeprune.cli.record import PruningRecord
    from edgeprune.deployment.artifact import Artifact


def compile(  # noqa: A001 - the verb's name
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(metavar="MODEL|DIR", help="package.module:factory, file.py:factory, or a folder of prune.")
    ],
    input_: InputOption = None,
    inputs: InputsOption = None,
    weights: WeightsOption = None,
    plan: Annotated[Path | None, typer.Option("--plan", help="Plan to cut MODEL by, with MODEL's weights.")] = None,
    backend: BackendOption = "onnxruntime",
    board: Annotated[
        str | None,
        typer.Option("--board", help="Compile for this board: local, a name, or ssh://user@host:port."),
    ] = None,
    labels: Annotated[Path | None, typer.Option("--labels", help="JSON list of class names, for users.")] = None,
    normalization: Annotated[
        Path | None, typer.Option("--normalization", help='JSON object such as {"mean": [...], "std": [...]}.')
    ] = None,
    dense: Annotated[
        Path | None, typer.Option("--dense", help="With DIR: also compile the dense model, as deploy's reference.")
    ] = None,
    precision: Annotated[
        str,
        typer.Option(
            "--precision", help="fp32, or what the backend has too: int8 (onnxruntime, tensorrt), fp16 (tensorrt, tvm)."
        ),
    ] = "fp32",
    task: Annotated[
        str | None,
        typer.Option("--task", metavar="FACTORY", help="Golden and calibration data; int8: its metrics are checked."),
    ] = None,
    snr: Annotated[
        float | None, typer.Option("--snr", metavar="DB", help="int8: signal-to-noise ratio to reach (default: 25).")
    ] = None,
    metric_loss: Annotated[
        str | None,
        typer.Option("--metric-loss", metavar="2%|2pp", help="int8: how much worse metrics may be (default: 1%)."),
    ] = None,
    dla: Annotated[
        int | None,
        typer.Option("--dla", min=0, help="Core of a Jetson's deep learning accelerator (tensorrt: fp16, int8)."),
    ] = None,
    tune: Annotated[
        str | None,
        typer.Option(
            "--tune",
            metavar="10min",
            help="tvm: search schedules so long first, timed on --board or here; they are kept.",
        ),
    ] = None,
    tune_trials: Annotated[
        int | None, typer.Option("--tune-trials", min=1, help="With --tune: candidates to build and time, at most.")
    ] = None,
    frontend: Annotated[
        str,
        typer.Option("--frontend", metavar="onnx|program", help="tvm: from ONNX, or from torch's program without it."),
    ] = "onnx",
    sign: Annotated[
        Path | None, typer.Option("--sign", metavar="KEY", help="SSH key to sign the manifest with (ssh-keygen -Y).")
    ] = None,
    seed: SeedOption = 0,
    out: Annotated[Path, typer.Option("--out", help="Artifact folder to write.")] = Path("artifact"),
    json_output: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Compile a model to an artifact: engine, golden inputs and outputs, and a manifest with hashes.

    The engine is run on this machine against the golden outputs before the artifact appears, unless it is for another kind
    of machine.
    """
    import edgeprune
    from edgeprune.cli.inputs import example_inputs
    from edgeprune.cli.loading import FORM, load_model, load_task

    output = Output(json_output)
    tuning = tuning_of(tune, tune_trials, seed)
    extras: dict[str, Any] = {
        "labels": _json(labels, list, "--labels"),
        "normalization": _json(normalization, dict, "--normalization"),
        "seed": seed,
        "precision": precision,
        **_int8(precision, snr, metric_loss),
    }
    if Path(model).is_dir():
        if input_ or inputs or weights or plan:
            raise ConfigError(
                "--input, --inputs, --weights and --plan are known from a folder of prune, found some of them too.",
                hint=f"{command_line('edgeprune', 'compile', model)}, without them",
            )
        other = backend if was_given(context, "backend") else None
        _compile_run(Path(model), output, out, dense, board, (other, dla, tuning, frontend), extras, sign, task)
        return
    if dense is not None:
        raise ConfigError(
            "--dense needs a folder of prune, found a model.",
            hint=command_line("edgeprune", "compile", model, "--out", dense),
        )
    if ":" not in model:
        raise ConfigError(
            f"compile needs a folder that edgeprune prune wrote, or a factory ({FORM}); there is no folder {model!r}, and it "
            "is no factory either.",
            hint="edgeprune prune, or --out of the run that wrote another folder",
        )
    chosen = _backend(backend, dla, tuning, frontend)
    require_compilable(chosen, precision, has_task=task is not None)
    module = load_model(model, weights, seed=seed)
    example = example_inputs(module, input_, inputs, seed=seed)
    extras["task"] = None if task is None else load_task(task)
    loaded = None if plan is None else edgeprune.PruningPlan.load(plan)
    if loaded is not None:
        module = edgeprune.apply(module, loaded)
    again: list[object] = [
        "edgeprune",
        "compile",
        model,
        *input_flags(input_, inputs),
        *given(weights=weights, plan=plan, board=board),
    ]
    with _opened(board) as opened:
        with output.step("compile") as progress:
            artifact = edgeprune.compile(
                module,
                example,
                out,
                backend=telling(chosen, progress),
                plan=loaded,
                board=opened,
                progress=progress.told,
                **extras,
            )
        traced, traced_example = (module, example) if loaded is None else loaded.traced(module, example)
        more = tell_beside(output, artifact, traced, traced_example, [*again, "--out", out], opened)
    _finish(output, artifact, command_line("edgeprune", "deploy", out, "--board", board or "local"), more, sign)


def _int8(precision: str, snr: float | None, metric_loss: str | None) -> dict[str, Any]:
    """What an int8 engine must reach, where it was said."""
    from edgeprune.tasks.limits import Tolerance, parse_limit

    if precision != "int8" and (snr is not None or metric_loss is not None):
        raise ConfigError(
            f"--snr and --metric-loss are of int8 engines, found --precision {precision}.", hint="--precision int8"
        )
    found: dict[str, Any] = {}
    if snr is not None:
        if not snr > 0:
            raise ConfigError(f"--snr must be a positive number of decibel, found {snr:g}.", hint="--snr 25")
        found["snr_db"] = snr
    if metric_loss is not None:
        sentence = f"--metric-loss must be a share or percentage points, found {metric_loss!r}."
        try:
            limit = parse_limit(metric_loss)
        except ConfigError as error:
            raise ConfigError(sentence, hint="--metric-loss 1%") from error
        if not isinstance(limit, Tolerance):
            raise ConfigError(sentence, hint="--metric-loss 1%")
        found["metric_loss"] = limit
    return found


def _opened(board: str | None) -> contextlib.AbstractContextManager[Any]:
    import edgeprune

    return contextlib.nullcontext() if board is None else edgeprune.Board.open(board)


def _backend(name: str, dla: int | None, tuning: Tuning | None, frontend: str) -> Any:
    """The backend of that name, or one that was told about a DLA, to tune, or what to compile from."""
    if frontend != "onnx":
        if name != "tvm":
            raise ConfigError(f"--frontend {frontend} needs --backend tvm, found {name}.", hint="--backend tvm")
        from edgeprune.backends.tvm.backend import Tvm

        return Tvm(tuning=tuning, frontend=frontend)
    if tuning is not None:
        return tuned_backend(name, tuning)
    if dla is None:
        return name
    if name != "tensorrt":
        raise ConfigError(f"--dla needs --backend tensorrt, found {name}.", hint="--backend tensorrt --precision fp16")
    from edgeprune.backends.tensorrt.backend import TensorRt

    return TensorRt(dla_core=dla)


def require_compilable(backend: Any, precision: str, *, has_task: bool) -> None:
    """Refuse what needs neither model nor trace to be refused.

    Raises:
        ConfigError: The backend does not compile for that precision, or int8 has nothing to be calibrated with.
        BackendUnavailableError: The backend is not installed here.
    """
    from edgeprune.backends import registry

    registry.get(backend).for_precision(precision)  # type: ignore[arg-type]  # a text to be refused
    if precision == "int8" and not has_task:
        raise ConfigError(
            "int8 engines need calibration data, found none.", hint="--task FACTORY, whose training data are taken"
        )


def _compile_run(
    folder: Path,
    output: Output,
    out: Path,
    dense: Path | None,
    board: str | None,
    backend: tuple[str | None, int | None, Tuning | None, str],
    extras: dict[str, Any],
    sign: Path | None,
    task: str | None,
) -> None:
    """The pruned model of a run, and its dense one when asked for; for the run's own board where engines are not portable.

    An int8 engine is calibrated with the run's own task, where there is no other. With another backend or precision than the
    run's (and a DLA core) what the run says of the latency is left out: it is not of that one.
    """
    import edgeprune
    from edgeprune.backends import registry
    from edgeprune.cli.loading import load_model, load_task
    from edgeprune.cli.record import INPUTS_NAME, MODEL_FOLDER, PLAN_NAME, PruningRecord, load_inputs

    record = PruningRecord.load(folder)
    plan = edgeprune.PruningPlan.load(folder / PLAN_NAME)
    example = load_inputs(folder / INPUTS_NAME)
    options = record.options
    name = backend[0] or options.backend
    meant, precision = (options.backend, options.precision or "fp32"), str(extras["precision"])
    own = (name, precision) == meant
    if not own:
        output.say(
            f"the run was for {' '.join(meant)}: what it takes with {name} {precision} was neither predicted nor measured, "
            "deploy does so"
        )
    chosen = _backend(name, *backend[1:])
    if task is None and precision == "int8":
        task = options.task
    require_compilable(chosen, precision, has_task=task is not None)
    if board is None and not registry.get(name).portable:
        board = record.board
    original: torch.nn.Module = load_model(options.model, options.weights, seed=options.seed)
    more: dict[str, Any] = {}
    extras["task"] = None if task is None else load_task(task)
    # An objective whose loss reads no output has none to check.
    extras["tasks"] = {name: places for name, places in record.outputs.items() if places}
    with _opened(board) as opened:
        extras["board"] = opened
        if dense is not None:
            traced, traced_example = plan.traced(original, example)
            with output.step("compile the dense model") as progress:
                reference = edgeprune.compile(
                    traced,
                    traced_example,
                    dense,
                    name=type(original).__name__,
                    backend=telling(chosen, progress),
                    progress=progress.told,
                    **extras,
                )
            output.wrote(dense, "artifact of the dense model")
            more = {"dense": str(dense), "dense_id": reference.id}
        pruned = edgeprune.load(folder / MODEL_FOLDER, original)
        with output.step("compile the pruned model") as progress:
            artifact = edgeprune.compile(
                pruned,
                example,
                out,
                backend=telling(chosen, progress),
                plan=plan.with_prediction(threads=record.threads) if own else replace(plan, predicted={}),
                predicted_ms=record.predicted_ms if own else None,
                measured=_measured(record) if own else None,
                progress=progress.told,
                **extras,
            )
        again = ["edgeprune", "compile", folder, "--backend", "onnxruntime", *given(board=board), "--out", out]
        more |= tell_beside(output, artifact, *plan.traced(pruned, example), again, opened)
    # A share of the dense latency can only be checked against the dense model.
    checkable = own and (dense is not None or options.budget.latency_ratio is None)
    following = command_line(
        *("edgeprune", "deploy", out, "--board", board or record.board),
        *given(threads=record.threads, latency=options.latency if checkable else None, reference=dense),
        *given(percentile=options.percentile if options.percentile != 50 and checkable else None),
    )
    _finish(output, artifact, following, more, sign)


def _measured(record: PruningRecord) -> Any:
    from edgeprune.deployment.manifest import MeasuredCost

    if record.measured_ms is None:
        return None
    return MeasuredCost(
        latency_ms=record.measured_ms,
        dense_ms=record.dense_ms,
        conditions=record.conditions,
        threads=record.threads,
    )


def _finish(output: Output, artifact: Artifact, following: str, more: dict[str, Any], key: Path | None) -> None:
    from edgeprune.deployment.signing import sign

    if key is not None:
        output.wrote(sign(artifact, key), f"signature of the manifest, with {key}")
    told = artifact.manifest.quantization
    if told is not None:
        ratio = "no difference" if told["snr_db"] is None else f"{told['snr_db']:.1f} dB"
        samples = f", calibrated with {told['samples']} samples" if "samples" in told else ""
        output.say(
            f"int8 in {told['layers'] - len(told['kept'])} of {told['layers']} layers, {ratio} against float{samples}"
        )
        without = told.get("no_kernel", [])
        if loud := [name for name in told["kept"] if name not in without]:
            output.say(f"  in float stay {', '.join(loud)}")
        if without:
            output.say(f"  in float too, since the runtime has no int8 kernel for them: {', '.join(without)}")
    for name, metric in artifact.manifest.metrics.items():
        output.say(f"  {name}: {metric['engine']:.4g}, of the module in float {metric['module']:.4g}")
    if told is not None and not artifact.manifest.metrics:
        output.say("  no task: what int8 does to its metrics was not checked")
    parity = artifact.manifest.host_parity
    if parity:
        output.say(f"engine and module agree on this machine: largest difference {parity['max_abs']:.1e}")
        for name, one in parity.get("tasks", {}).items():
            output.say(f"  {name}: {', '.join(one['outputs'])}, {one['relative']:.1e} of the scale")
    else:
        exported = artifact.manifest.export_parity
        if exported:
            output.say(f"exported model and module agree on this machine: largest difference {exported['max_abs']:.1e}")
        output.say("this machine cannot run the engine: deploy compares it with the module on the board")
    output.wrote(artifact.folder, f"artifact {artifact.id[:16]}, {artifact.size_bytes / 1e6:.2f} MB")
    output.finish(
        {
            "artifact": str(artifact.folder),
            "id": artifact.id,
            "size_bytes": artifact.size_bytes,
            "host_parity": parity,
            "quantization": told,
            "metrics": artifact.manifest.metrics,
            **more,
        },
        next_command=following,
    )


def _json(path: Path | None, kind: type, option: str) -> Any:
    if path is None:
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{option} must name a JSON file, {path} cannot be read as one.", hint=f"python -m json.tool {path}"
        ) from error
    if not isinstance(value, kind):
        example = '["cat", "dog"]' if kind is list else '{"mean": [0.5], "std": [0.2]}'
        raise ConfigError(
            f"{option} must hold a JSON {'list' if kind is list else 'object'}, {path} does not.", hint=example
        )
    return value
