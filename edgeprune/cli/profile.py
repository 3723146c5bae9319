"""``edgeprune profile``: measure the kernels of models on a board."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgeprune.cli.console import Output, command_line
from edgeprune.cli.options import (
    BackendOption,
    BoardOption,
    HostMeterOption,
    InputOption,
    InputsOption,
    JsonOption,
    MeterOption,
    SeedOption,
    ThreadsOption,
    VerboseOption,
    WeightsOption,
    given,
    input_flags,
    tile_of,
)
from edgeprune.cli.table_out import require_free
from edgeprune.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from edgeprune.latency.table import LatencyTable

_TELL_LOST_S = 5.0
_LONGER = 1.25
"""A run that takes so many times what was asked for says why."""


def profile(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL...", help="package.module:factory or file.py:factory, one or more of one input."),
    ],
    input_: InputOption = None,
    inputs: InputsOption = None,
    weights: WeightsOption = None,
    board: BoardOption = "local",
    backend: BackendOption = "onnxruntime",
    minutes: Annotated[
        float,
        typer.Option(
            "--minutes",
            help="Time for measuring on the board; more time, more kernels. Set-up (tracing, lowering, engines) comes on top "
            "where it takes more than half of it.",
        ),
    ] = 2.0,
    precision: Annotated[
        str, typer.Option("--precision", metavar="fp32|fp16|int8", help="Of the engines that are measured.")
    ] = "fp32",
    table: Annotated[
        Path | None,
        typer.Option("--table", help="Latency table to extend: only what it does not know is measured."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be measured, and measure nothing.")
    ] = False,
    sustained: Annotated[
        bool,
        typer.Option("--sustained", help="Also time networks in thermal equilibrium; up to twelve minutes more."),
    ] = False,
    percentiles: Annotated[
        bool,
        typer.Option("--percentiles", help="Also time 500 single inferences of each network, for prune --percentile."),
    ] = False,
    tiles: Annotated[
        list[str] | None,
        typer.Option(
            "--tiles",
            metavar="ROWSxCOLUMNS",
            help="Also measure what linear layers run without some tiles of this size, for prune --tiles; repeat.",
        ),
    ] = None,
    lock_clocks: Annotated[
        bool,
        typer.Option("--lock-clocks", help="Hold the clocks still, as the device type allows; they are put back."),
    ] = False,
    power_mode: Annotated[
        str | None,
        typer.Option(
            "--power-mode", metavar="NAME", help="A Jetson's power mode to measure in; the one before comes back."
        ),
    ] = None,
    threads: ThreadsOption = 1,
    seed: SeedOption = 0,
    energy: Annotated[
        bool, typer.Option("--energy", help="Measure the energy per inference of whole networks too, by replay.")
    ] = False,
    meter: MeterOption = None,
    host_meter: HostMeterOption = None,
    rail: Annotated[
        list[str] | None,
        typer.Option(
            "--rail", metavar="NAME", help="With --energy: a rail that is the board's, or part of it; repeat."
        ),
    ] = None,
    wait: Annotated[
        float,
        typer.Option(
            "--wait", metavar="MINUTES", help="How long a board that drops off the network meanwhile is waited for."
        ),
    ] = 5.0,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Latency table to write (Parquet); that of --table, else table.parquet."),
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Write over a table that is there.")] = False,
    json_output: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Measure on a board the kernels that models and their pruned versions run; writes a latency table.

    With --table, a further model is added to the table of another. Interrupted, the same command goes on where it stopped.
    """
    import edgeprune
    from edgeprune.backends import registry as backends
    from edgeprune.profiling.run import preview

    if meter is not None and not energy:
        raise ConfigError("--meter must come with --energy, found it alone.", hint="--energy --meter COMMAND")
    if host_meter is not None and (meter is not None or not energy):
        found = "--meter with it" if meter is not None else "it alone"
        hint = "--energy --host-meter COMMAND"
        raise ConfigError(f"--host-meter must come with --energy and without --meter, found {found}.", hint=hint)
    if rail and not energy:
        raise ConfigError("--rail must come with --energy, found it alone.", hint=f"--energy --rail {rail[0]}")
    if power_mode is not None and dry_run:
        raise ConfigError(
            "--dry-run leaves the board as it is, found --power-mode with it.", hint=f"sudo nvpmodel -m {power_mode}"
        )
    sizes = tuple(tile_of(text) for text in tiles or ())
    if not minutes > 0:
        raise ConfigError(f"--minutes must be greater than 0, found {minutes:g}.", hint="--minutes 2")
    if not 0 <= wait < math.inf:
        raise ConfigError(f"--wait must be 0 or more minutes, found {wait:g}.", hint="--wait 5")
    backends.get(backend)
    target_path = out or table or Path("table.parquet")
    require_free(target_path, replace=replace, extended=table)
    output = Output(json_output)
    base = None if table is None else edgeprune.LatencyTable.load(table)
    modules, examples = _modules(models, weights, input_, inputs, seed)
    arguments: dict[str, Any] = {
        "precision": precision,
        "table": base,
        "threads": threads,
        "seed": seed,
        "tiles": sizes,
    }
    if dry_run:
        with output.step(f"look at {board}") as progress, edgeprune.Board.open(board) as target:
            seen = preview(modules, examples, target, backend, minutes, progress=progress.timed, **arguments)
        output.say(str(seen))
        facts = {"wanted": seen.wanted, "known": seen.known, "to_measure": seen.to_measure}
        output.finish({**facts, "kernels": seen.kernels, "networks": seen.networks, "minutes": seen.minutes})
        return
    target_path.parent.mkdir(parents=True, exist_ok=True)
    begun_s = time.monotonic()
    with output.step(f"profile on {board}") as progress, edgeprune.Board.open(board) as target:
        measured = edgeprune.profile(
            modules,
            examples,
            target,
            backend,
            minutes,
            sustained=sustained,
            lock_clocks=lock_clocks,
            power_mode=power_mode,
            out=target_path,
            progress=progress.timed,
            told=progress.said,
            energy=energy,
            meter=meter,
            host_meter=host_meter,
            rails=rail,
            percentiles=percentiles,
            origins=[[model, *input_flags(input_, inputs)] for model in models],
            wait_s=60 * wait,
            **arguments,
        )
    run = _last_run(measured, base)
    _tell(output, measured, run, target_path)
    if run is not None and "protocol" in run:
        output.say(where_time_went(run, 60 * minutes, time.monotonic() - begun_s))
    output.finish(
        _facts(measured, target_path),
        next_command=command_line(
            *("edgeprune", "prune", models[-1], *input_flags(input_, inputs)),
            *given(weights=weights, seed=seed or None, backend=backend if backend != "onnxruntime" else None),
            *("--table", target_path, "--latency", "50%", "--board", board),
            *given(tiles="auto" if sizes else None, task="FACTORY" if sizes else None),
        ),
    )


def _modules(
    references: list[str], weights: Path | None, specs: list[str] | None, file: Path | None, seed: int
) -> tuple[dict[str, nn.Module], dict[str, Any]]:
    """Models and example inputs by what was typed of them, without folders, which names them in the table."""
    from edgeprune.cli.inputs import example_inputs
    from edgeprune.cli.loading import load_model

    if weights is not None and len(references) > 1:
        raise ConfigError(
            f"--weights belongs to one model, found {len(references)}.",
            hint="leave it out: latencies do not depend on weights",
        )
    short = [reference.rpartition("/")[2] for reference in references]
    names = short if len(set(short)) == len(short) else references
    if len(set(names)) < len(names):
        raise ConfigError(f"each model must be given once, found {', '.join(references)}.")
    modules = {
        name: load_model(reference, weights, seed=seed) for name, reference in zip(names, references, strict=True)
    }
    return modules, {name: example_inputs(module, specs, file, seed=seed) for name, module in modules.items()}


def _last_run(table: LatencyTable, base: LatencyTable | None) -> Mapping[str, Any] | None:
    """What the table says of the run that just ended; None where that had nothing to measure."""
    if base is None:
        return table.header
    runs = table.header.get("runs", ())
    return runs[-1] if len(runs) > len(base.header.get("runs", ())) else None


def where_time_went(run: Mapping[str, Any], asked_s: float, whole_s: float) -> str:
    """One sentence.

    Args:
        run: Of a table's header: what is said of one run.
        asked_s: What measuring was to take, seconds.
        whole_s: From the command to the table, seconds.
    """
    spent_s = run["protocol"].get("spent_s", 0.0)
    earlier_s, lost_s = run["protocol"].get("earlier_s", 0.0), run["drift"].get("lost_s", 0.0)
    shares = [f"{earlier_s:.0f} s of it before it was interrupted"] * (earlier_s >= 1)
    shares += [f"{lost_s:.0f} s of it waiting for others who use the board's core"] * (lost_s >= 1)
    if spent_s > _LONGER * asked_s:
        shares.append("since two rounds are measured whatever they take")
    told = ", ".join([f"measuring took {spent_s:.0f} s of the {asked_s:.0f} s asked for", *shares])
    here = "the command" if earlier_s < 1 else "this command"
    return f"{told}; with set-up and fits {here} took {whole_s:.0f} s"


def _tell(output: Output, table: LatencyTable, run: Mapping[str, Any] | None, path: Path) -> None:
    header, last = table.header, run or {}
    timed = {network.name: network.measurement.median_ms for network in table.networks}
    dense = [
        (entry["name"], timed[entry["dense"]]) for entry in header.get("models", ()) if entry.get("dense") in timed
    ]
    takes = "the dense model takes" if len(dense) == 1 else "dense models take"
    times = ", ".join(f"{ms:.3f} ms" if len(dense) == 1 else f"{name or 'the first'} {ms:.3f} ms" for name, ms in dense)
    output.say(
        f"{len(table.kernels)} kernels and {len(table.networks)} networks measured on {header['board']} "
        f"with {header['runtime']}, {header['threads']} thread(s); {takes} {times}"
    )
    for sentence in (last.get("fingerprint") or {}).get("disturbances", ()):
        output.say(f"could have disturbed the measurement: {sentence}")
    if refused := header["unsupported"]:
        names = ", ".join(sorted({str(json.loads(key)["op"]) for key in refused}))
        reason = next(iter(refused.values()))
        output.say(
            f"{len(refused)} kernels do not run alone and were left out ({names}): they are predicted from others of their "
            f"kind, with a wider interval where there are none; the first one: {reason}"
        )
    if (lost_s := last.get("drift", {}).get("lost_s", 0.0)) >= _TELL_LOST_S:
        output.say(
            f"{lost_s:.0f} s were lost to others who use the board's core: fewer kernels fit into the time; "
            "with more --minutes, or when it is quiet, the table gets better"
        )
    if drifted := header["drift"]["drifted_rows"]:
        output.say(
            f"{drifted} of {len(table)} rows were never measured undisturbed; "
            "with more --minutes, or when the board is quiet, fewer are"
        )
    for entry in header.get("models", ()):
        _tell_energy(output, entry["name"], table.energy.get(entry["dense"]))
    output.wrote(path, "latency table")


def _tell_energy(output: Output, model: str, dense: dict[str, Any] | None) -> None:
    if dense is None:
        return
    output.say(
        f"the dense model {model} takes {dense['energy_mj']:.3g} ± {dense['error_mj']:.2g} mJ per inference above idle "
        f"({dense['gross_mj']:.3g} mJ with idle) on {dense['covers']}"
    )
    for sentence in dense["doubts"]:
        output.say(f"doubtful: {sentence}")


def _facts(table: LatencyTable, path: Path) -> dict[str, Any]:
    header = table.header
    return {
        "table": str(path),
        "hash": table.hash,
        "board": header["board"],
        "runtime": header["runtime"],
        "kernels": len(table.kernels),
        "networks": len(table.networks),
        "models": header.get("models", []),
        "dense_ms": header["reference"]["median_ms"],
        "drift": header["drift"],
        "energy": table.energy,
        "percentiles": header.get("percentiles"),
        "unsupported": header["unsupported"],
        "clocks": header.get("runs", [header])[-1].get("clocks"),
        "sustained": header.get("sustained"),
    }
