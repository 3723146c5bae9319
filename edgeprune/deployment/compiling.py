"""From a module to an artifact: export, golden data, a check of the engine on this host, manifest."""

from __future__ import annotations

import copy
import logging
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime, timezone
from importlib import metadata, resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import edgeprune
from edgeprune.backends import registry
from edgeprune.backends._base import CALIBRATION
from edgeprune.boards.installing import for_board
from edgeprune.deployment import preflight
from edgeprune.deployment.artifact import GOLDEN_NAME, INFER_NAME, MODEL_NAME, Artifact, describe_file, staged
from edgeprune.deployment.golden import EDGE_CASES, INT8_EDGE_CASES, SAMPLES, cut, make_golden, positional
from edgeprune.deployment.host_check import export_parity, host_parity
from edgeprune.deployment.manifest import (
    MANIFEST_NAME,
    TOLERANCES,
    Manifest,
    MeasuredCost,
    PredictedCost,
    SourceModel,
    TaskOutputs,
    Tolerance,
    canonical_json,
)
from edgeprune.deployment.weights import sha256_of_weights
from edgeprune.errors import ConfigError, EdgepruneError, ExportError, ParityError
from edgeprune.spec import Fingerprint, Precision, TensorSpec

if TYPE_CHECKING:
    import torch

    from edgeprune.backends._base import Backend
    from edgeprune.boards.board import Board
    from edgeprune.surgery.plan import PruningPlan
    from edgeprune.tasks.limits import Tolerance as MetricTolerance
    from edgeprune.tasks.task import Task

Progress = Callable[[str, str], None]
"""Called with (step, what happens)."""

INT8_SNR_DB = 25.0
"""Signal-to-noise ratio that int8 engines must reach by default, decibel."""
INT8_SAMPLES = 320
"""Of a task's training data: ranges of int8 engines settle with some hundred samples."""
_SNR_MARGIN_DB = 5.0
"""The golden samples are other ones, and fewer, than those that the layers of int8 are chosen by."""

_FEW_SAMPLES = 32
"""Fewer samples than this rarely show the ranges of numbers that a deployed model meets."""
_PARITY_HINTS: dict[Precision, str] = {
    "fp32": "edgeprune doctor, then the same command with --verbose, and report what it prints",
    "fp16": "--precision fp32",
    "int8": "--snr 30 (or more) keeps more layers in float, or --precision fp32",
}
_PACKAGES = ("torch", "numpy", "onnx", "onnxscript", "onnxruntime", "apache-tvm")

_log = logging.getLogger("edgeprune.deployment.compiling")


def compile(  # noqa: A001 - the word of the field; `edgeprune.compile` shadows the built-in for nobody
    module: torch.nn.Module,
    example_inputs: Any,
    out: str | Path,
    *,
    backend: str | Backend = "onnxruntime",
    name: str | None = None,
    plan: PruningPlan | None = None,
    predicted_ms: float | None = None,
    measured: MeasuredCost | None = None,
    labels: Sequence[str] | None = None,
    normalization: Mapping[str, Sequence[float]] | None = None,
    golden_inputs: Any = None,
    edge_cases: Sequence[str] | None = None,
    precision: Precision = "fp32",
    task: Task | None = None,
    snr_db: float = INT8_SNR_DB,
    metric_loss: MetricTolerance | None = None,
    tolerance: Tolerance | None = None,
    tasks: Mapping[str, Sequence[int]] | None = None,
    tolerances: Mapping[str, Tolerance] | None = None,
    threads: int = 1,
    seed: int = 0,
    fingerprint: Fingerprint | None = None,
    board: Board | None = None,
    progress: Progress | None = None,
) -> Artifact:
    """Compile a module to an artifact that `edgeprune.deploy` brings to a board.

    The engine is run on this host, by the same program that boards run, against the golden outputs before `out` appears; an
    engine for another architecture is only checked on the board, when it is deployed.
    `out` appears whole or not at all; an artifact that is there already is replaced in one step.

    Args:
        module: The module, pruned or dense; run in eval form, left as it is.
        example_inputs: Tensor, tuple of tensors, or dict by parameter name, at the deployment batch.
        out: Folder to write.
        backend: Name of the backend, or one.
        name: What a person calls the model; the class's name by default.
        plan: The pruning plan that made the module; its hash and prediction go into the manifest. Of a model that was traced
            in parts, the parts are compiled, and golden inputs must be theirs.
        predicted_ms: Predicted latency, milliseconds; the plan's by default.
        measured: Cost that a board measured, with its conditions.
        labels: Class names, for whoever uses the release.
        normalization: What must be done to inputs, e.g. ``{"mean": [...], "std": [...]}``.
        golden_inputs: Calibration data, see `edgeprune.deployment.golden.make_golden`; without it the first samples of the
            task's training data, without a task random samples. An int8 engine takes the ranges of its numbers from it.
        edge_cases: Which edge cases to add to the golden samples; by default all, of an int8 engine those that do not leave
            the ranges of calibration data.
        precision: Arithmetic precision of the engine.
        task: What the module is for. Where the engine is int8, the task's metrics of the engine are held against those of the
            module, on the validation data.
        snr_db: Signal-to-noise ratio that an int8 engine must reach on calibration data, decibel; layers that make most of the
            noise stay in float where it would not.
        metric_loss: With `task`: how much worse than the module's a metric of an int8 engine may be; 1 % of it by default.
        tolerance: What parity demands; by default that of the precision.
        tasks: By task the places of the outputs that it reads, where there are several tasks: parity is then told per task.
        tolerances: What parity demands of the outputs of a task, where that is something else.
        threads: Threads of the check on this host.
        seed: Of random golden inputs.
        fingerprint: Board that it is compiled for, if known: what it lacks is told now instead of at deployment. A backend
            that generates code does so for this board; without one, for this host.
        board: The board itself, open, for a backend whose engines are built on it, or are tuned there; it is probed where
            `fingerprint` is None.
        progress: Told each step.

    Raises:
        ExportError: The module cannot be exported.
        InputError: Example or golden inputs do not fit the module.
        ParityError: The engine's outputs on this host differ from the module's, or a metric of an int8 engine is worse.
        TaskError: The task's data cannot be used.
        IncompatibleTargetError: `fingerprint` lacks something.
        ConfigError: `out` exists and is no artifact, the backend cannot compile for `precision`, int8 has no calibration data, a
            task reads an output that is not there, or a tolerance is for no task.
        CompileError: The backend cannot compile the exported model, or needs a board to do so.
        RemoteError: The board that it is built or tuned on is busy, or was lost.
        BackendUnavailableError: The backend is not installed on this host.
    """
    tell = progress or (lambda step, message: None)
    if board is not None and fingerprint is None:
        fingerprint = board.probe()
    with _hints_for(board):
        chosen = registry.get(backend).for_board(fingerprint).for_precision(precision).for_deployment()
    if board is not None:
        chosen = chosen.built_on(board)
    title = name or type(module).__name__
    if plan is not None:
        if task is not None and plan.parts:
            raise ConfigError(
                "a task's data are inputs of a whole model, found a plan for parts of one.",
                hint="leave --task out; golden_inputs= takes inputs of the parts in Python",
            )
        module, example_inputs = plan.traced(module, example_inputs)
    inputs = positional(module, example_inputs)
    if golden_inputs is None and task is not None:
        from edgeprune.deployment.engine_metrics import samples_of

        golden_inputs = samples_of(task, module, INT8_SAMPLES if precision == "int8" else SAMPLES)
    if edge_cases is None:
        edge_cases = INT8_EDGE_CASES if precision == "int8" else EDGE_CASES
    samples = 0
    if precision == "int8":
        if golden_inputs is None:
            raise ConfigError("int8 engines need calibration data, found none.", hint=CALIBRATION)
        # What the golden samples must reach is a little less than what those do that the layers are chosen by.
        tolerance = tolerance or _relaxed(TOLERANCES[precision], snr_db)
        cases = list(zip(*cut(golden_inputs, inputs), strict=True))
        samples = len(cases) * (int(inputs[0].shape[0]) if inputs[0].ndim else 1)
        if samples < _FEW_SAMPLES:
            _log.warning(
                "int8 is calibrated with %d samples only, at least %d should show what the deployed model meets: ranges of its "
                "numbers may be too narrow, which neither parity nor a metric on few samples shows",
                samples,
                _FEW_SAMPLES,
            )
        chosen = chosen.calibrated(
            cases,
            needed_db=snr_db,
            told=lambda message: tell("quantize", message),
        )
    with _hints_for(board), staged(Path(out)) as folder:
        tell("export", f"exporting for {chosen.name}")
        engine = folder / f"engine{chosen.suffix}"
        input_specs, output_specs = chosen.export(module, inputs, engine)
        tell("golden", "computing golden outputs")
        golden = make_golden(module, inputs, golden_inputs, edge_cases=edge_cases, seed=seed)
        _check_outputs(output_specs, [array.shape[1:] for array in golden.outputs])
        golden.save(folder / GOLDEN_NAME)
        model = _model_json(engine.name, chosen.name, input_specs, output_specs, labels, normalization)
        (folder / MODEL_NAME).write_bytes(canonical_json(model))
        if chosen.name == "onnxruntime":
            # The one runtime that is a Python package on every board and needs no more than the engine's path.
            source = resources.files("edgeprune.boards.onboard") / INFER_NAME
            (folder / INFER_NAME).write_bytes(source.read_bytes())
        manifest = Manifest(
            name=title,
            backend=chosen.name,
            engine=engine.name,
            precision=precision,
            files={path.name: describe_file(path) for path in sorted(folder.iterdir())},
            requires=preflight.needs_of(chosen, engine, (*input_specs, *output_specs)),
            tolerance=tolerance or TOLERANCES[precision],
            tasks=_tasks(tasks or {}, tolerances or {}, [one.name for one in output_specs]),
            quantization=_quantization(chosen, engine, samples) if precision == "int8" else None,
            host_parity={},
            versions=_versions(),
            plan_hash=None if plan is None else plan.hash,
            source=SourceModel(weights_sha256=sha256_of_weights(module), seed=seed),
            predicted=_predicted(plan, predicted_ms),
            measured=measured,
            created=_created(),
        )
        if fingerprint is not None:
            preflight.check(manifest, fingerprint, board="BOARD" if board is None else board.name)
        if chosen.runs_here(engine):
            tell("parity", "checking the engine against the module on this host")
            parity = host_parity(folder, manifest, threads=threads)
            if not parity.passed:
                raise ParityError(
                    f"the engine of {manifest.name!r} on this host {parity.complaint()}.",
                    hint=_PARITY_HINTS[precision] + "; tolerance= with a reason or edge_cases=() in Python",
                )
            # What depends on the machine (times, memory) stays out: equal inputs give equal artifacts.
            unequal = ("load_ms", "peak_memory_bytes")
            figures = {key: value for key, value in parity.as_json().items() if key not in unequal}
            manifest = manifest.model_copy(update={"host_parity": figures})
        else:
            tell(
                "parity", "this host cannot run the engine: the exported model is checked here, the engine on the board"
            )
            if chosen.exports_onnx:
                checked = export_parity(folder, manifest, module, inputs, threads=threads)
                manifest = manifest.model_copy(update={"export_parity": checked})
        session = chosen.session(engine, threads) if task is not None and precision == "int8" else None
        if task is not None and session is not None:
            from edgeprune.deployment.engine_metrics import engine_metrics

            tell("metrics", "evaluating the int8 engine on the task's validation data")
            metrics = engine_metrics(_in_float(module), inputs, session, task, metric_loss, "int8 engine")
            manifest = manifest.model_copy(
                update={"metrics": {name: asdict(metric) for name, metric in metrics.items()}}
            )
        (folder / MANIFEST_NAME).write_bytes(manifest.canonical())
    _log.info("compiled %s to %s (%s)", manifest.name, out, manifest.id[:16])
    tell("done", f"artifact {manifest.id[:16]} in {out}")
    return Artifact(Path(out), manifest)


@contextmanager
def _hints_for(board: Board | None) -> Iterator[None]:
    """Name the board in hints of backends, which do not know what the user calls it."""
    try:
        yield
    except EdgepruneError as error:
        if board is not None and error.hint is not None:
            error.hint = for_board(error.hint, board.name)
        raise


def _in_float(module: torch.nn.Module) -> torch.nn.Module:
    """A copy as the golden outputs are computed with."""
    return copy.deepcopy(module).cpu().float().eval()


def _quantization(backend: Backend, engine: Path, samples: int) -> dict[str, Any] | None:
    """What an int8 engine says of its layers, and how many samples it was calibrated and judged with."""
    told = backend.quantization(engine)
    return None if told is None else {**told, "samples": samples}


def _relaxed(tolerance: Tolerance, snr_db: float) -> Tolerance:
    return tolerance.model_copy(update={"snr_db": min(tolerance.snr_db, max(0.0, snr_db - _SNR_MARGIN_DB))})


def _tasks(
    tasks: Mapping[str, Sequence[int]], tolerances: Mapping[str, Tolerance], outputs: Sequence[str]
) -> dict[str, TaskOutputs]:
    for name in tolerances:
        if name not in tasks:
            raise ConfigError(
                f"a tolerance must be for a task, found one for {name!r} and {', '.join(tasks) or 'no task'}."
            )
    for name, places in tasks.items():
        if not places or not all(0 <= place < len(outputs) for place in places):
            raise ConfigError(
                f"task {name!r} must read some of the {len(outputs)} outputs of the module, found {list(places)}."
            )
    return {
        name: TaskOutputs(outputs=[outputs[place] for place in places], tolerance=tolerances.get(name))
        for name, places in tasks.items()
    }


def _model_json(
    engine: str,
    runtime: str,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    labels: Sequence[str] | None,
    normalization: Mapping[str, Sequence[float]] | None,
) -> dict[str, Any]:
    """What a program that uses the release must know; its keys are stable."""
    return {
        "schema_version": 1,
        "engine": engine,
        "runtime": runtime,
        "inputs": [_tensor_json(tensor) for tensor in inputs],
        "outputs": [_tensor_json(tensor) for tensor in outputs],
        "labels": None if labels is None else [str(label) for label in labels],
        "normalization": None
        if normalization is None
        else {key: [float(value) for value in values] for key, values in normalization.items()},
    }


def _tensor_json(tensor: TensorSpec) -> dict[str, Any]:
    return {"name": tensor.name, "shape": list(tensor.shape), "dtype": tensor.dtype}


def _check_outputs(specs: Sequence[TensorSpec], shapes: Sequence[tuple[int, ...]]) -> None:
    if [spec.shape for spec in specs] != list(shapes):
        raise ExportError(
            f"the engine's outputs must have the module's shapes {list(shapes)}, found {[spec.shape for spec in specs]}."
        )


def _predicted(plan: PruningPlan | None, predicted_ms: float | None) -> PredictedCost | None:
    told: Mapping[str, Any] = {} if plan is None else plan.predicted
    latency_ms = told.get("latency_ms") if predicted_ms is None else predicted_ms
    if latency_ms is None:
        return None
    # The plan's interval and table belong to the plan's own prediction.
    about = told if told.get("latency_ms") == latency_ms else {}
    low_ms, high_ms, table = (about.get(key) for key in ("low_ms", "high_ms", "table"))
    return PredictedCost(
        latency_ms=float(latency_ms),
        low_ms=None if low_ms is None else float(low_ms),
        high_ms=None if high_ms is None else float(high_ms),
        table=None if table is None else str(table),
        threads=None if told.get("threads") is None else int(told["threads"]),
    )


def _versions() -> dict[str, str]:
    found = {"edgeprune": edgeprune.__version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _created() -> str:
    """Now, or what ``SOURCE_DATE_EPOCH`` says, so that a build can be repeated bit by bit."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    if epoch is None:
        moment = datetime.now(timezone.utc)
    else:
        try:
            moment = datetime.fromtimestamp(int(epoch), timezone.utc)
        except (ValueError, OverflowError, OSError) as error:
            raise ConfigError(
                f"SOURCE_DATE_EPOCH must be seconds since 1970, found {epoch!r}.", hint="unset SOURCE_DATE_EPOCH"
            ) from error
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")
