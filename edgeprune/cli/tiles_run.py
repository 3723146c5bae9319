"""The run behind ``edgeprune prune --tiles``: the same folder as of any pruning run, with tiles in its plan."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.cli import record as records
from edgeprune.cli.console import Output, command_line
from edgeprune.cli.loading import load_task
from edgeprune.cli.meant_latency import fitted
from edgeprune.cli.options import given
from edgeprune.cli.pruning_start import begun, interruption_of
from edgeprune.cli.record import PruneOptions, PruningRecord, Recovered
from edgeprune.errors import ConfigError
from edgeprune.report.pruning import parameter_count
from edgeprune.tasks.limits import parse_limits

if TYPE_CHECKING:
    import torch

    from edgeprune.latency.predictor import Predictor
    from edgeprune.loop.interruption import Interruption
    from edgeprune.loop.tiled_result import TiledResult

TOGETHER = frozenset(
    {
        *("model", "weights", "input_", "inputs", "task", "limit", "board", "backend", "tiles", "macs", "seed", "out"),
        *("table", "latency", "energy", "precision", "percentile", "sustained", "json_output", "verbose"),
        *("epochs", "lr", "distill", "ema", "amp", "channels", "power_weight"),
    }
)
"""Options of ``prune`` that mean something for tiles."""
BESIDE_CHANNELS = frozenset({"keep", "min_width", "multiple_of", "same_as", "criterion", "blocks"})
"""And those that do where channels go with them."""


def require_together(given_options: Collection[str], options: PruneOptions) -> None:
    """Refuse options that a run of tiles does nothing with.

    Args:
        given_options: Names of the parameters that the user wrote.
        options: The run's.

    Raises:
        ConfigError: Names them.
    """
    unused = set(given_options) - TOGETHER - (BESIDE_CHANNELS if options.channels else set())
    others = sorted("--" + name.strip("_").replace("_", "-") for name in unused)
    if others and options.channels:
        raise ConfigError(
            f"--tiles --channels chooses both by one search of its own, which has no use for {', '.join(others)}, found it."
        )
    if others:
        raise ConfigError(
            f"--tiles removes tiles by what they cost the task and leaves channels as they are, found {', '.join(others)} too.",
            hint="--channels, for both in one allocation",
        )
    if options.task is None:
        raise ConfigError(
            "--tiles needs a task, whose loss says which tiles matter, found none.", hint="--task FILE.py:F"
        )
    budgets = {"--macs": options.macs, "--latency": options.latency, "--energy": options.energy}
    asked = [name for name, text in budgets.items() if text]
    if len(asked) != 1:
        raise ConfigError(
            f"--tiles needs a budget of one of {', '.join(budgets)}, found {' and '.join(asked) or 'none'}.",
            hint="--tiles 64x128 --macs 50%",
        )
    if options.energy and options.channels:
        raise ConfigError(
            "--tiles --channels share a budget of --macs or --latency, found --energy.",
            hint="--macs 50%, or --energy without --channels",
        )
    if options.tiles == "auto" and not options.latency:
        raise ConfigError(
            f"--tiles auto chooses sizes by predicted latency, which the budget must bound, found {asked[0]}.",
            hint="--latency 60% --table TABLE, or --tiles 64x128",
        )
    if options.power_weight and options.channels:
        raise ConfigError(
            "--power-weight weighs power where tiles alone are chosen, found --channels beside it.",
            hint="--power-weight without --channels",
        )
    if not options.macs and options.table is None:
        raise ConfigError(f"{asked[0]} needs --table, which says what tiles take, found none.", hint="--macs 50%")
    if not set(options.distill) <= {"logits"}:
        raise ConfigError(f"--tiles goes with --distill logits alone, found {', '.join(options.distill)}.")


def begin_tiles(options: PruneOptions, out: Path, output: Output) -> None:
    """Remove tiles, and write the run's folder.

    Raises:
        EdgepruneError: Whatever `edgeprune.prune_tiles` and the loading of its arguments raise.
    """
    budget = options.budget
    assert options.tiles is not None
    assert options.task is not None
    table, module, example = begun(options, out, output)
    task = load_task(options.task).with_limits(parse_limits(options.limit))
    predictor = None
    if options.table is not None:
        with output.step("fit the predictor"):
            predictor = fitted(table, options)
    interruption = interruption_of(options, out, output)
    with records.staged(out) as folder:
        with output.step(f"remove tiles{' and channels' if options.channels else ''}, to {budget}") as progress:
            result = _pruned(options, module, example, task, predictor, folder, interruption, progress.stepped)
        with output.step("write"):
            record = _written(result, options, predictor, module, example, folder)
    interruption.discard()
    _tell(output, result, module, str(budget))
    for name, what in (
        (records.PLAN_NAME, "plan"),
        (records.MODEL_FOLDER, "pruned model"),
        (records.INPUTS_NAME, "example inputs"),
        ("report.json", "data of the report"),
        (records.FILE_NAME, "settings and figures of the run, for compile"),
    ):
        output.wrote(out / name, what)
    output.finish(
        {
            **record.model_dump(mode="json"),
            "out": str(out),
            "share": result.share,
            "refitted": result.refitted,
            "dense": dict(result.dense),
            "parameters_before": parameter_count(module),
            "parameters_after": parameter_count(result.module),
            "notes": list(result.notes),
        },
        next_command=command_line(
            *("edgeprune", "compile", out, "--out", out / "artifact", "--dense", out / "dense"),
            *given(seed=options.seed or None),
        ),
    )


def _pruned(
    options: PruneOptions,
    module: torch.nn.Module,
    example: Any,
    task: Any,
    predictor: Predictor | None,
    folder: Path,
    interruption: Interruption,
    progress: Any,
) -> TiledResult:
    import edgeprune
    from edgeprune.loop.joint.choosing import Channels
    from edgeprune.recovery.fine_tuning import FineTuning

    assert options.tiles is not None
    channels = None
    if options.channels:
        channels = Channels(options.constraints, options.criterion or "taylor", blocks=options.blocks)
    tuning = FineTuning(
        epochs=options.epochs, lr=options.lr, ema=options.ema, precision=options.amp or "float32", seed=options.seed
    )
    return edgeprune.prune_tiles(
        module,
        example,
        options.budget,
        task,
        None if options.board == "none" else options.board,
        predictor,
        tile=options.tiles,
        channels=channels,
        power_weight=options.power_weight,
        fine_tuning=tuning,
        distill=bool(options.distill),
        backend=options.backend,
        plan_path=folder / records.PLAN_NAME,
        checkpoint=interruption,
        progress=progress,
    )


def _written(
    result: TiledResult,
    options: PruneOptions,
    predictor: Predictor | None,
    module: torch.nn.Module,
    example: Any,
    folder: Path,
) -> PruningRecord:
    import edgeprune
    from edgeprune.report import stored, tiled

    edgeprune.save(result.module, folder / records.MODEL_FOLDER, result.plan)
    records.save_inputs(example, folder / records.INPUTS_NAME)
    data = tiled.from_tiles(
        result,
        title=f"{type(module).__name__} with tiles, {options.budget}",
        table_hash=None if predictor is None else predictor.table_hash,
        parameters=(parameter_count(module), parameter_count(result.module)),
    )
    stored.save(data, folder / stored.FILE_NAME)
    checked = result.measured
    record = PruningRecord(
        options=options,
        table_hash=None if predictor is None else predictor.table_hash,
        weights_hash=records.file_hash(options.weights),
        budget_ms=result.budget_ms,
        dense_predicted_ms=result.dense_predicted_ms,
        predicted_ms=result.predicted_ms,
        dense_ms=None if checked is None else checked.dense_ms,
        measured_ms=None if checked is None else checked.ratio * checked.dense_ms,
        board=options.board if options.board != "none" else "local" if predictor is None else predictor.table.board,
        threads=1 if predictor is None else int(predictor.table.header["threads"]),
        conditions="" if checked is None else f"measured on {checked.board}, interleaved with the dense engine",
        plan_hash=result.plan.hash,
        rounds=result.rounds,
        chosen=result.chosen,
        spent=(),
        check_max_abs=result.check_max_abs,
        metrics_before=dict(result.metrics_before),
        metrics_after=dict(result.metrics_after),
        recovery=tuple(Recovered(**asdict(step)) for step in result.recovery),
        verdicts=result.verdicts,
        tiles={name: (layer.kept, layer.tiles) for name, layer in result.layers.items()},
        tile_sizes=dict(result.sizes),
        widths=dict(result.widths) if options.channels else {},
    )
    (folder / records.FILE_NAME).write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return record


def _tell(output: Output, result: TiledResult, dense: torch.nn.Module, budget: str) -> None:
    unit = result.allocation.unit
    what = {"ms": "latency, predicted", "mJ": "energy above idle, predicted"}.get(unit, unit)
    rows = [[what, "100.0%", f"{result.share:.1%}"]]
    if result.predicted_ms is not None:
        rows.append(["predicted latency, ms", f"{result.dense_predicted_ms:.3f}", f"{result.predicted_ms:.3f}"])
    if result.measured is not None:
        rows.append([f"of dense on {result.measured.board}, interleaved", "100.0%", result.measured.of_dense])
    if result.power_share is not None:
        rows.append([result.power_of, "100.0%", f"{result.power_share:.1%}"])
    rows.append(["parameters", f"{parameter_count(dense):,}", f"{parameter_count(result.module):,}"])
    for step in result.recovery:
        rows += [
            [f"{name}, after {step.step}", f"{result.metrics_before[name]:.4f}", f"{value:.4f}"]
            for name, value in step.after.items()
        ]
    output.table(f"budget {budget}", ["", "dense", "pruned"], rows)
    if any(kept < size for kept, size in result.widths.values()):
        output.table(
            "widths",
            ["group", "kept", "of"],
            [[name, str(kept), str(size)] for name, (kept, size) in result.widths.items()],
        )
    output.table(
        "tiles",
        ["weight", "kept", "of"],
        [[name, str(layer.kept), str(layer.tiles)] for name, layer in result.layers.items()],
    )
    for name, why in result.dense.items():
        output.say(f"{name} stays dense: {why}")
    output.say(f"cut and masked model differ by at most {result.check_max_abs:.1e}")
    for note in result.notes:
        output.say(note)
