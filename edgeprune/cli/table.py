"""``edgeprune table``: look at latency tables, check, compare, merge and filter them, import those of others."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgeprune.cli.console import Output, command_line
from edgeprune.cli.options import JsonOption, VerboseOption
from edgeprune.cli.prunable import unprunable
from edgeprune.cli.table_out import require_not_measured
from edgeprune.errors import ConfigError, TableFormatError
from edgeprune.latency.csv_kernels import KINDS

if TYPE_CHECKING:
    from edgeprune.latency.table import LatencyTable

table = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Import, check, compare, merge, filter and describe latency tables.",
    rich_markup_mode="rich",
)

TableArgument = Annotated[Path, typer.Argument(metavar="TABLE", help="Latency table (Parquet).")]

_ReplaceOption = Annotated[bool, typer.Option("--replace", help="Write over a table that was measured.")]
_FactOption = Annotated[
    list[str] | None,
    typer.Option("--fact", metavar="NAME=VALUE", help="Of the device, e.g. multiprocessors=80; JSON or text; repeat."),
]


@table.command("import")
def import_(
    file: Annotated[
        Path, typer.Argument(metavar="FILE.csv", help="Somebody else's table, with a line of column names.")
    ],
    kernel: Annotated[
        str,
        typer.Option(
            "--kernel", metavar="KIND", help=f"What the rows describe: {', '.join(KINDS)}; see docs/tables.md."
        ),
    ],
    device: Annotated[str, typer.Option("--device", help="What it was measured on.")],
    column: Annotated[
        list[str] | None,
        typer.Option("--column", metavar="FIELD=COLUMN", help="E.g. in_channels=cin; repeat per field."),
    ] = None,
    constant: Annotated[
        list[str] | None,
        typer.Option("--constant", metavar="FIELD=VALUE", help="E.g. precision=fp16; repeat per field."),
    ] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(
            "--where", metavar="COLUMN=VALUE", help="Keep the rows that hold this, leave out all others; repeat."
        ),
    ] = None,
    latency_ms: Annotated[
        str | None, typer.Option("--latency-ms", metavar="COLUMN", help="Column of times in milliseconds.")
    ] = None,
    latency_us: Annotated[
        str | None, typer.Option("--latency-us", metavar="COLUMN", help="Column of times in microseconds.")
    ] = None,
    latency_s: Annotated[
        str | None, typer.Option("--latency-s", metavar="COLUMN", help="Column of times in seconds.")
    ] = None,
    runtime: Annotated[str, typer.Option("--runtime", help="What executed the kernels.")] = "unknown",
    fact: _FactOption = None,
    skip_invalid: Annotated[
        bool, typer.Option("--skip-invalid", help="Leave out rows that cannot be used, and say how many and which.")
    ] = False,
    out: Annotated[Path, typer.Option("--out", help="Latency table to write (Parquet).")] = Path("table.parquet"),
    replace: _ReplaceOption = False,
    json_output: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Make a latency table of somebody else's CSV file."""
    import edgeprune

    output = Output(json_output)
    if out.suffix == ".csv" or (out.resolve() == file.resolve()):
        raise ConfigError(f"--out must not be a CSV file, found {out}.", hint=f"--out {out.with_suffix('.parquet')}")
    require_not_measured(out, replace=replace)
    with output.step(f"import {file.name}"):
        made = edgeprune.LatencyTable.from_csv(
            file,
            kernel=kernel,
            columns=_pairs("--column", column, "in_channels=cin"),
            constants=_pairs("--constant", constant, "precision=fp16"),
            where=_pairs("--where", where, "conv_type=Regular"),
            latency_ms=latency_ms,
            latency_us=latency_us,
            latency_s=latency_s,
            device=device,
            runtime=runtime,
            facts={name: _json_or_text(value) for name, value in _pairs("--fact", fact, "multiprocessors=80").items()},
            skip_invalid=skip_invalid,
        )
    (entry,) = made.header["imported"]
    left_out = f", {entry['left_out']} left out" if entry["left_out"] else ""
    output.say(
        f"{len(made.kernels)} kernels of {entry['rows']} rows{left_out}, {made.header['runtime']} on {made.device}"
    )
    reached = _look_at(output, made)
    out.parent.mkdir(parents=True, exist_ok=True)
    output.wrote(made.save(out), "latency table")
    output.finish(
        {"table": str(out), "hash": made.hash, "kernels": len(made.kernels), "imported": entry, "achieved": reached},
        next_command=command_line("edgeprune", "fit", out),
    )


@table.command()
def layers(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="ENGINE...",
            help="Artifacts of `compile --backend tensorrt`, or exports of trtexec: LAYERS.json,PROFILE.json[,TIMES.json].",
        ),
    ],
    device: Annotated[str, typer.Option("--device", help="What they were measured on.")],
    runtime_version: Annotated[
        str | None, typer.Option("--runtime-version", help="Release of TensorRT, where exports do not say it.")
    ] = None,
    fact: _FactOption = None,
    out: Annotated[Path, typer.Option("--out", help="Latency table to write (Parquet).")] = Path("table.parquet"),
    replace: _ReplaceOption = False,
    json_output: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Make a latency table of the layers of engines that TensorRT has built, as they were recorded; nothing is measured."""
    from edgeprune.backends.tensorrt.layer_table import layer_table

    output = Output(json_output)
    if out.suffix != ".parquet":
        raise ConfigError(f"--out must be a Parquet file, found {out}.", hint=f"--out {out.with_suffix('.parquet')}")
    require_not_measured(out, replace=replace)
    facts = {name: _json_or_text(value) for name, value in _pairs("--fact", fact, "multiprocessors=80").items()}
    with output.step("read layers"):
        made = layer_table(sources, device=device, version=runtime_version, facts=facts)
    entries = made.header["imported"]
    for entry in entries:
        left_out = f", {entry['left_out']} without a time or sizes left out" if entry["left_out"] else ""
        output.say(f"{entry['source']}: {entry['rows']} layers{left_out}")
    counts = f"{len(made.kernels)} different ones and {len(made.networks)} whole engines"
    output.say(f"{counts}, tensorrt on {made.device}, as recorded")
    reached = _look_at(output, made)
    out.parent.mkdir(parents=True, exist_ok=True)
    output.wrote(made.save(out), "latency table")
    output.finish(
        {"table": str(out), "hash": made.hash, "kernels": len(made.kernels), "imported": entries, "achieved": reached},
        next_command=command_line("edgeprune", "fit", out),
    )


@table.command()
def diff(
    first: TableArgument, second: TableArgument, json_output: JsonOption = False, verbose: VerboseOption = False
) -> None:
    """Say whether two tables may be compared, what differs, and by how much their kernels in common do."""
    import edgeprune

    output = Output(json_output)
    found = edgeprune.LatencyTable.load(first).diff(edgeprune.LatencyTable.load(second))
    output.say(found.summary())
    rows = [
        [what, *(_short(value) for value in difference)]
        for what, differences in (("device", found.identity), ("protocol", found.protocol))
        for difference in differences
    ]
    if rows:
        output.table("what differs", ["", "field", "first", "second"], rows)
    counts = [
        ["only in the first", found.only_first],
        ["only in the second", found.only_second],
        ["in both", found.common],
    ]
    output.table("", ["rows", "count"], counts)
    if found.ratios:
        output.table(
            "second over first, rows in both",
            ["family", "rows", "median", "10 %", "90 %", "noise %"],
            [
                [
                    row.family,
                    row.count,
                    *(f"{value:.3f}" for value in (row.median, row.low, row.high)),
                    f"{row.noise_percent:.1f}",
                ]
                for row in found.ratios
            ],
        )
    output.finish(
        {
            "may_be_merged": found.may_be_merged,
            "summary": found.summary(),
            "identity": [difference._asdict() for difference in found.identity],
            "protocol": [difference._asdict() for difference in found.protocol],
            "only_first": found.only_first,
            "only_second": found.only_second,
            "common": found.common,
            "ratios": [asdict(row) for row in found.ratios],
        }
    )


@table.command()
def validate(file: TableArgument, json_output: JsonOption = False, verbose: VerboseOption = False) -> None:
    """Check that a table is whole, of a schema that is known, what its hash says, and holds only what can be."""
    import edgeprune
    from edgeprune.latency.rates import impossible_rate
    from edgeprune.latency.table_card import flagged

    output = Output(json_output)
    found = edgeprune.LatencyTable.load(file)
    impossible = impossible_rate({kernel: found.measurements[kernel.key].min_ms for kernel in found.kernels})
    if impossible is not None:
        raise TableFormatError(
            f"{file} must hold times that a device can {impossible.text}.",
            hint=f"times of a table are milliseconds, these seem to be {impossible.unit}",
        )
    flags = {flag: len(keys) for flag, keys in sorted((found.header.get("flags") or {}).items()) if keys}
    output.say(
        f"{file} is valid: schema {found.header['schema']}, {len(found.kernels)} kernels and {len(found.networks)} networks, "
        f"{found.header['runtime']} on {found.device}, {found.header['precision']}, {found.header['threads']} thread(s)"
    )
    for flag, count in flags.items():
        output.say(f"{flagged(count)} as {flag}")
    output.finish(
        {
            "table": str(file),
            "schema": found.header["schema"],
            "hash": found.hash,
            "kernels": len(found.kernels),
            "networks": len(found.networks),
            "flags": flags,
        }
    )


@table.command()
def merge(
    files: Annotated[list[Path], typer.Argument(metavar="TABLE TABLE...", help="Latency tables (Parquet).")],
    out: Annotated[Path, typer.Option("--out", help="Latency table to write (Parquet); may be one of them.")],
    json_output: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Join tables of one device, runtime, thread count and precision; what several hold keeps the rounds of all."""
    import edgeprune

    output = Output(json_output)
    if len(files) < 2:
        raise ConfigError(
            f"there must be at least two tables to merge, found {len(files)}.",
            hint=command_line("edgeprune", "table", "merge", *files, "OTHER.parquet", "--out", out),
        )
    found, *others = (edgeprune.LatencyTable.load(file) for file in files)
    for other in others:
        found = found.merge(other)
    _write(output, found, out)


@table.command("filter")
def filter_(
    file: TableArgument,
    out: Annotated[Path, typer.Option("--out", help="Latency table to write (Parquet).")],
    kind: Annotated[list[str] | None, typer.Option("--kind", help="kernel or network; repeat.")] = None,
    op: Annotated[list[str] | None, typer.Option("--op", help="Operation, e.g. FusedConv; repeat.")] = None,
    family: Annotated[list[str] | None, typer.Option("--family", help="E.g. conv, gemm or network; repeat.")] = None,
    precision: Annotated[list[str] | None, typer.Option("--precision", help="fp32, fp16 or int8; repeat.")] = None,
    json_output: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Keep the rows that meet every condition."""
    import edgeprune

    output = Output(json_output)
    given = {"kind": kind, "op": op, "family": family, "precision": precision}
    conditions = {name: values for name, values in given.items() if values}
    if not conditions:
        raise ConfigError("there must be a condition to filter by, found none.", hint="--family conv --family network")
    whole = edgeprune.LatencyTable.load(file)
    found = whole.filter(**conditions)
    if not len(found):
        held = {name: sorted({str(row[name]) for row in whole.rows}) for name in conditions}
        raise ConfigError(
            f"a filtered table must hold at least one row, found none of {len(whole)} that meets every condition.",
            hint="; ".join(f"--{name} {'|'.join(values)}" for name, values in held.items()),
        )
    _write(output, found, out)


@table.command()
def card(
    file: TableArgument,
    out: Annotated[Path | None, typer.Option("--out", help="Markdown file to write; printed by default.")] = None,
    json_output: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Describe a table in Markdown: device, conditions, what it holds, how well it repeats."""
    import edgeprune
    from edgeprune.files import write_text

    output = Output(json_output)
    text = edgeprune.LatencyTable.load(file).card()
    if out is None:
        output.say(text.rstrip("\n"))
    else:
        if out.suffix == ".parquet" or (out.resolve() == file.resolve()):
            raise ConfigError(f"--out must not be the table, found {out}.", hint=f"--out {out.with_suffix('.md')}")
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, text)
        output.wrote(out, "data card")
    output.finish({"table": str(file), "card": text})


def _look_at(output: Output, made: LatencyTable) -> dict[str, Any]:
    """Say what an imported table's device would achieve, where a wrong unit is seen, and what prune lacks of it."""
    from edgeprune.latency.rates import achieved

    found = achieved({kernel: made.measurements[kernel.key].rounds_ms for kernel in made.kernels})
    output.say(str(found))
    lacking = unprunable(made)
    if lacking is not None:
        output.say(lacking)
    return found._asdict()


def _write(output: Output, made: LatencyTable, out: Path) -> None:
    output.say(
        f"{len(made.kernels)} kernels and {len(made.networks)} networks, {made.header['runtime']} on {made.device}"
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    output.wrote(made.save(out), "latency table")
    output.finish(
        {"table": str(out), "hash": made.hash, "kernels": len(made.kernels), "networks": len(made.networks)},
        # Of networks alone nothing can be fitted.
        next_command=command_line("edgeprune", *(("fit",) if made.kernels else ("table", "card")), out),
    )


def _pairs(option: str, values: list[str] | None, example: str) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for text in values or ():
        name, equals, value = text.partition("=")
        if not (equals and name):
            raise ConfigError(f"{option} must be NAME=VALUE, found {text!r}.", hint=f"{option} {example}")
        if name in pairs:
            raise ConfigError(f"{option} must name {name} once, found it twice.", hint=f"one {option} {name}=...")
        pairs[name] = value
    return pairs


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _short(value: object) -> str:
    text = "-" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
