"""``edgeprune prune``: prune a model to a latency budget."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from edgeprune.cli.console import Output, command_line
from edgeprune.cli.options import (
    BackendOption,
    InputOption,
    InputsOption,
    JsonOption,
    LatencyOption,
    SeedOption,
    VerboseOption,
    WeightsOption,
    tile_of,
    was_given,
)
from edgeprune.criteria.registry import CRITERIA
from edgeprune.errors import ConfigError
from edgeprune.recovery.distillation.registry import DISTILLATIONS

_WITH_RESUME = {"resume", "out", "board", "json_output", "verbose"}
_NEEDS = {
    "distill": "task",
    "ema": "task",
    "amp": "task",
    "calibrate_damage": "task",
    "blocks": "task",
    "refit": "task",
    "refit_biases": "task",
    "soft_masking": "task",
    "netadapt": "task",
    "pagcp": "task",
    "tap": "distill",
    "reallocate_every": "soft_masking",
    "channels": "tiles",
    "power_weight": "tiles",
}
"""Options that do nothing without another one."""


def prune(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="package.module:factory or file.py:factory.")
    ] = None,
    table: Annotated[
        Path | None, typer.Option("--table", help="Latency table, or predictor settings of `edgeprune fit`.")
    ] = None,
    latency: LatencyOption = None,
    params: Annotated[
        str | None, typer.Option("--params", metavar="40%|1.2M", help="Budget of parameters, beside or instead.")
    ] = None,
    macs: Annotated[
        str | None,
        typer.Option("--macs", metavar="50%|300M", help="Budget of multiply-accumulates, beside or instead."),
    ] = None,
    energy: Annotated[
        str | None,
        typer.Option("--energy", metavar="30mJ|60%", help="Budget of energy per inference, beside or instead."),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option("--memory", metavar="8MB|50%", help="Budget of weights and live activations, beside or instead."),
    ] = None,
    precision: Annotated[
        str | None, typer.Option("--precision", metavar="fp32|fp16|int8", help="Of the latency that is meant.")
    ] = None,
    percentile: Annotated[
        int,
        typer.Option("--percentile", metavar="50|95|99", help="Of single inferences; 50 is the median."),
    ] = 50,
    sustained: Annotated[
        bool, typer.Option("--sustained", help="The latency that is meant is the one in thermal equilibrium.")
    ] = False,
    input_: InputOption = None,
    inputs: InputsOption = None,
    weights: WeightsOption = None,
    task: Annotated[
        str | None, typer.Option("--task", metavar="FILE.py:FACTORY", help="Data, loss and metric (edgeprune.Task).")
    ] = None,
    limit: Annotated[
        list[str] | None,
        typer.Option(
            "--limit",
            metavar="NAME=2%|2pp|0.8",
            help="How much worse than the dense model's the metric of an objective may become, or its worst value; repeat.",
        ),
    ] = None,
    board: Annotated[
        str, typer.Option("--board", help="Where plans are measured; none leaves it predicted only.")
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
    tiles: Annotated[
        str | None,
        typer.Option(
            "--tiles",
            metavar="ROWSxCOLUMNS|auto",
            help="Remove tiles of linear layers (of a transformer) instead of channels; needs a task and one budget; "
            "auto: sizes layer by layer, by their predicted latency.",
        ),
    ] = None,
    channels: Annotated[
        bool,
        typer.Option(
            "--channels", help="Beside --tiles: heads, head dimensions and hidden units too, in one allocation."
        ),
    ] = False,
    power_weight: Annotated[
        float,
        typer.Option(
            "--power-weight",
            metavar="1.0",
            min=0,
            help="With --tiles: weigh modelled power too; 1 balances it and damage.",
        ),
    ] = 0.0,
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
    blocks: Annotated[
        bool,
        typer.Option("--blocks", help="Let whole residual blocks go, by the loss without each; needs a task."),
    ] = False,
    allocator: Annotated[
        str,
        typer.Option(
            "--allocator", help="How widths are chosen: exact, blockdrop, global_threshold, greedy, knapsack, uniform."
        ),
    ] = "exact",
    epochs: Annotated[int, typer.Option("--epochs", min=0, help="Of fine-tuning on the task.")] = 3,
    lr: Annotated[float, typer.Option("--lr", help="Learning rate of fine-tuning.")] = 1e-3,
    distill: Annotated[
        list[str] | None,
        typer.Option(
            "--distill",
            metavar="|".join(DISTILLATIONS.builtin),
            help="Let the dense model teach the pruned one by this loss; repeat to add several.",
        ),
    ] = None,
    tap: Annotated[
        list[str] | None,
        typer.Option(
            "--tap", metavar="MODULE", help="Where --distill compares features, not at the ends of stages; repeat."
        ),
    ] = None,
    ema: Annotated[
        float | None, typer.Option("--ema", metavar="0.999", help="Keep a moving average of the weights while tuning.")
    ] = None,
    amp: Annotated[
        str | None,
        typer.Option("--amp", metavar="bfloat16|float16", help="Mixed precision while tuning; float16 on CUDA only."),
    ] = None,
    refit: Annotated[
        bool, typer.Option("--refit", help="Refit layers by least squares before they are tuned; needs a task.")
    ] = False,
    refit_biases: Annotated[
        bool,
        typer.Option(
            "--refit-biases", help="Biases make up for the mean of what was removed, before tuning; needs a task."
        ),
    ] = False,
    soft_masking: Annotated[
        int,
        typer.Option(
            "--soft-masking",
            metavar="EPOCHS",
            min=0,
            help="So many of --epochs train under masks that may change, before the cut; needs a task.",
        ),
    ] = 0,
    reallocate_every: Annotated[
        int,
        typer.Option("--reallocate-every", metavar="STEPS", min=2, help="Steps between allocations of soft masking."),
    ] = 50,
    netadapt: Annotated[
        bool,
        typer.Option(
            "--netadapt", help="Search widths greedily with short tunings, for long; a baseline; needs a task."
        ),
    ] = False,
    pagcp: Annotated[
        int,
        typer.Option(
            "--pagcp",
            metavar="ROUNDS",
            min=0,
            help="Search widths layer by layer under --limit of every objective, in so many rounds; needs a task.",
        ),
    ] = 0,
    hold_limits: Annotated[
        bool,
        typer.Option(
            "--hold-limits",
            help="Limits must hold before tuning already; where they cannot with the latency, say what can and stop.",
        ),
    ] = False,
    seed: SeedOption = 0,
    out: Annotated[Path, typer.Option("--out", help="Folder to write.")] = Path("pruned"),
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on with the run in --out that was interrupted, or whose last plan no board has measured yet.",
        ),
    ] = False,
    json_output: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Prune a model to a latency budget: choose widths by predicted milliseconds, cut, check, tune, measure.

    With a board, a plan that misses the budget there, or leaves much of it unused, is followed by another one. Without a task
    the criterion uses no data, nothing is tuned, and accuracy is not measured.
    """
    from edgeprune.cli.pruning_run import begin, go_on
    from edgeprune.cli.record import PruneOptions, absolute_reference
    from edgeprune.cli.tiles_run import begin_tiles, require_together

    output = Output(json_output)
    if resume:
        refused = [name for name in context.params if name not in _WITH_RESUME and was_given(context, name)]
        if refused:
            raise ConfigError(
                f"--resume goes on with the settings of the run in {out}, found {', '.join(map(_spelled, refused))} too.",
                hint=command_line("edgeprune", "prune", "--resume", "--out", out),
            )
        go_on(out, board if was_given(context, "board") else None, output)
        return
    tile: tuple[int, int] | Literal["auto"] | None = None
    if tiles is not None:
        tile = "auto" if tiles == "auto" else tile_of(tiles)
    if model is None or (table is None and tile is None) or not any((latency, params, macs, energy, memory)):
        budget = latency or params or macs or energy or memory
        needed = {"MODEL": model, "--table": table or tiles, "--latency (or another budget)": budget}
        missing = ", ".join(name for name, value in needed.items() if value is None)
        raise ConfigError(
            f"prune needs a model, a table and a budget, found no {missing}.", hint="edgeprune prune --help"
        )
    for option, other in _NEEDS.items():
        if was_given(context, option) and not was_given(context, other):
            hint = "--task FILE.py:FACTORY" if other == "task" else "edgeprune prune --help"
            raise ConfigError(f"{_spelled(option)} needs {_spelled(other)}, found none.", hint=hint)
    options = PruneOptions(
        model=absolute_reference(model),
        table=None if table is None else table.absolute(),
        latency=latency,
        params=params,
        macs=macs,
        energy=energy,
        memory=memory,
        precision=precision,
        percentile=percentile,
        sustained=sustained,
        input=tuple(input_ or ()),
        inputs=None if inputs is None else inputs.absolute(),
        weights=None if weights is None else weights.absolute(),
        task=None if task is None else absolute_reference(task),
        board=board,
        backend=backend,
        keep=tuple(keep or ()),
        min_width=_numbers("--min-width", min_width),
        multiple_of=_numbers("--multiple-of", multiple_of),
        same_as=_pairs("--same-as", same_as),
        criterion=criterion,
        calibrate_damage=calibrate_damage,
        blocks=blocks,
        allocator=allocator,
        epochs=epochs,
        lr=lr,
        distill=tuple(distill or ()),
        tap=tuple(tap or ()),
        ema=ema,
        amp=_precision(amp),
        refit=refit,
        refit_biases=refit_biases,
        soft_masking=soft_masking,
        reallocate_every=reallocate_every,
        netadapt=netadapt,
        limit=tuple(limit or ()),
        pagcp=pagcp,
        hold_limits=hold_limits,
        tiles=tile,
        channels=channels,
        power_weight=power_weight,
        seed=seed,
    )
    if tile is not None:
        require_together([name for name in context.params if was_given(context, name)], options)
        begin_tiles(options, out, output)
        return
    _require_known(criterion, allocator, backend, task)
    begin(options, out, output)


def _require_known(criterion: str | None, allocator: str, backend: str, task: str | None) -> None:
    """What only needs the command line is told before the model is loaded and traced."""
    from edgeprune.allocation import registry as allocators
    from edgeprune.backends import registry as backends
    from edgeprune.criteria import registry as criteria

    backends.get(backend)
    if criterion is not None:
        chosen = criteria.get(criterion)
        if task is None:
            chosen.require(None)
    allocators.get(allocator)


def _precision(text: str | None) -> Literal["bfloat16", "float16"] | None:
    if text is None:
        return None
    if text == "bfloat16":
        return "bfloat16"
    if text == "float16":
        return "float16"
    raise ConfigError(f"--amp must be bfloat16 or float16, found {text!r}.", hint="--amp bfloat16")


def _spelled(name: str) -> str:
    return "MODEL" if name == "model" else "--" + name.strip("_").replace("_", "-")


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
