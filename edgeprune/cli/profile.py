"""``edgeprune profile``: measure a model's kernels on a board."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgeprune.cli.console import Output, command_line
from edgeprune.cli.options import (
    BackendOption,
    BoardOption,
    InputOption,
    InputsOption,
    JsonOption,
    MeterOption,
    ModelArgument,
    SeedOption,
    ThreadsOption,
    VerboseOption,
    WeightsOption,
    given,
    input_flags,
)
from edgeprune.errors import ConfigError


def profile(
    model: ModelArgument,
    input_: InputOption = None,
    inputs: InputsOption = None,
    weights: WeightsOption = None,
    board: BoardOption = "local",
    backend: BackendOption = "onnxruntime",
    minutes: Annotated[
        float,
        typer.Option(
            "--minutes", help="Time for measuring; more time, more kernels. Start-up and slow lowering are not counted."
        ),
    ] = 2.0,
    threads: ThreadsOption = 1,
    seed: SeedOption = 0,
    energy: Annotated[
        bool, typer.Option("--energy", help="Measure the energy per inference of whole networks too, by replay.")
    ] = False,
    meter: MeterOption = None,
    out: Annotated[Path, typer.Option("--out", help="Latency table to write (Parquet).")] = Path("table.parquet"),
    json_output: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Measure on a board the kernels that a model and its pruned versions run; writes a latency table.

    Interrupted, the same command goes on where it stopped.
    """
    import edgeprune
    from edgeprune.cli.inputs import example_inputs
    from edgeprune.cli.loading import load_model

    if meter is not None and not energy:
        raise ConfigError("--meter must come with --energy, found it alone.", hint="--energy --meter COMMAND")
    output = Output(json_output)
    module = load_model(model, weights, seed=seed)
    example = example_inputs(module, input_, inputs, seed=seed)
    out.parent.mkdir(parents=True, exist_ok=True)
    with output.step(f"profile on {board}") as progress, edgeprune.Board.open(board) as target:
        table = edgeprune.profile(
            module,
            example,
            target,
            backend,
            minutes,
            threads=threads,
            seed=seed,
            out=out,
            progress=progress.counted,
            told=progress.said,
            energy=energy,
            meter=meter,
        )
    header = table.header
    dense_ms = header["reference"]["median_ms"]
    output.say(
        f"{len(table.kernels)} kernels and {len(table.networks)} networks measured on {header['board']} "
        f"with {header['runtime']}, {header['threads']} thread(s); the dense model takes {dense_ms:.3f} ms"
    )
    for sentence in header["fingerprint"].get("disturbances", ()):
        output.say(f"could have disturbed the measurement: {sentence}")
    if drifted := header["drift"]["drifted_rows"]:
        output.say(f"{drifted} of {len(table)} rows were measured while the board was disturbed, repeats included")
    dense = table.energy.get("dense")
    if dense is not None:
        output.say(
            f"the dense model takes {dense['energy_mj']:.3g} ± {dense['error_mj']:.2g} mJ per inference above idle "
            f"({dense['gross_mj']:.3g} mJ with idle) on {dense['covers']}"
        )
        for sentence in dense["doubts"]:
            output.say(f"doubtful: {sentence}")
    output.wrote(out, "latency table")
    output.finish(
        {
            "table": str(out),
            "hash": table.hash,
            "board": header["board"],
            "runtime": header["runtime"],
            "kernels": len(table.kernels),
            "networks": len(table.networks),
            "dense_ms": dense_ms,
            "drift": header["drift"],
            "energy": table.energy,
            "unsupported": header["unsupported"],
        },
        next_command=command_line(
            *("edgeprune", "prune", model, *input_flags(input_, inputs)),
            *given(weights=weights, seed=seed or None, backend=backend if backend != "onnxruntime" else None),
            *("--table", out, "--latency", "50%", "--board", board),
        ),
    )
