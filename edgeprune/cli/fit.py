"""``edgeprune fit``: fit the latency predictor and show its errors beside the noise ceiling."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgeprune.backends import registry as backends
from edgeprune.cli.console import Output, command_line
from edgeprune.cli.options import JsonOption, SeedOption, VerboseOption, given
from edgeprune.cli.prunable import unprunable
from edgeprune.errors import ConfigError

if TYPE_CHECKING:
    from edgeprune.latency.fit_report import FitReport
    from edgeprune.latency.predictor import Predictor

_COLUMNS = (
    ("family", "family"),
    ("n", "measured"),
    ("median_error_percent", "median error %"),
    ("noise_median_percent", "repeats to %"),
    ("within_5_percent", "within 5 %"),
    ("noise_within_5_percent", "repeats within 5 %"),
    ("within_10_percent", "within 10 %"),
    ("noise_within_10_percent", "repeats within 10 %"),
    ("coverage_percent", "in interval %"),
    ("width_percent", "interval width %"),
)
_WEAK_COLUMNS = (
    ("family", "family"),
    ("region", "kernels"),
    ("n", "measured"),
    ("median_error_percent", "median error %"),
    ("noise_median_percent", "repeats to %"),
    ("elsewhere_median_percent", "median error elsewhere %"),
    ("within_10_percent", "within 10 %"),
)
_EDGES = 10
"""Rows of the table of stair edges."""


def fit(
    table: Annotated[Path, typer.Argument(metavar="TABLE", help="Latency table of `edgeprune profile`.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="File to write (JSON); beside the table by default.")
    ] = None,
    transfer_from: Annotated[
        Path | None,
        typer.Option(
            "--transfer-from", metavar="TABLE", help="Another device's table, for a TABLE of 10 to 200 kernels."
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            "--report", metavar="FILE.html", help="Also draw it: staircases, predicted vs measured, residuals, drift."
        ),
    ] = None,
    level: Annotated[float, typer.Option("--level", help="Of the prediction intervals.")] = 0.9,
    seed: SeedOption = 0,
    json_output: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Fit the predictor to a latency table; prints cross-validated errors beside what measurements repeat to."""
    import edgeprune

    output = Output(json_output)
    target = out if out is not None else table.with_suffix(".json")
    if target.suffix != ".json":  # the table is copied beside the settings, and must not be written over
        raise ConfigError(f"--out must be a .json file, found {target}.", hint=f"--out {target.with_suffix('.json')}")
    if report is not None and report.suffix not in (".html", ".htm"):
        raise ConfigError(
            f"--report must be a .html file, found {report}.", hint=f"--report {report.with_suffix('.html')}"
        )
    with output.step("fit"):
        source = None if transfer_from is None else edgeprune.LatencyTable.load(transfer_from)
        predictor = edgeprune.fit(edgeprune.LatencyTable.load(table), seed=seed, level=level, transfer_from=source)
        found = predictor.report()
    rows = found.rows()
    output.table(
        "errors on what was held out, and how well measurements repeat themselves",
        [title for _, title in _COLUMNS],
        [[_cell(row[key]) for key, _ in _COLUMNS] for row in named(rows)],
    )
    output.say(found.summary())
    for sentence in besides(found):
        output.say(sentence)
    if found.energy is None:
        output.say("energy is not predicted: the table holds none (edgeprune profile --energy)")
    if found.weak:
        output.table(
            "weak regions: kernels that are missed by more than the rest of their family",
            [title for _, title in _WEAK_COLUMNS],
            [[_cell(row[key]) for key, _ in _WEAK_COLUMNS] for row in found.weak],
        )
    else:
        output.say("weak regions: none; no kind of kernel is missed by significantly more than the rest of its family")
    if found.edges:
        output.table(
            f"edges of the staircase that were measured: the largest of {len(found.edges)}",
            ["model", "group", "from width", "ms below", "ms from there"],
            [
                [edge["model"], edge["group"], edge["width"], f"{edge['below_ms']:.4f}", f"{edge['at_ms']:.4f}"]
                for edge in found.edges[:_EDGES]
            ],
        )
    lacking = unprunable(predictor.table)
    if lacking is not None:
        output.say(lacking)
    target.parent.mkdir(parents=True, exist_ok=True)
    output.wrote(predictor.save(target), "the fit, for prune --table; keep the table beside it")
    if report is not None:
        from edgeprune.report import fitted, page

        with output.step("write the report"):
            page.write(fitted.from_predictor(predictor), report)
        output.wrote(report, "report")
    output.finish(
        {
            "predictor": str(target),
            "table_hash": predictor.table_hash,
            "level": level,
            "errors": rows,
            "energy": found.energy,
            "weak": list(found.weak),
            "edges": list(found.edges),
            "left_out": list(found.left_out),
            "transferred_from": found.transferred_from,
        },
        next_command=_next(predictor, table),
    )


def _next(predictor: Predictor, table: Path) -> str:
    """What to run next: `prune`, where the table can be pruned with."""
    if unprunable(predictor.table) is not None:
        return command_line("edgeprune", "table", "card", table)
    return command_line(
        *("edgeprune", "prune", *_model(predictor)),
        *given(backend=_backend(predictor)),
        *("--table", table, "--latency", "50%"),
    )


def named(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of a report as they are shown: with their precision where a table has kernels of several."""
    several = len({row["precision"] for row in rows}) > 1
    return [{**row, "family": f"{row['family']}, {row['precision']}" if several else row["family"]} for row in rows]


def besides(found: FitReport) -> Iterator[str]:
    """What a person should know besides the table of errors."""
    total = found.end_to_end
    if total is not None and None not in (total["median_error_percent"], total["sum_median_error_percent"]):
        yield (
            f"end to end: the plain sum of its kernels misses a network by {total['sum_median_error_percent']:.1f} % in the "
            f"median, the calibrated one by {total['median_error_percent']:.1f} %"
        )
        if total["median_error_percent"] > total["sum_median_error_percent"]:
            yield (
                "warning: what whole networks taught is worse than nothing here, as after a short or much disturbed run; profile "
                "for longer, or on a board that does nothing else, before pruning with this table"
            )
    if found.left_out:
        yield (
            "left out of the calibration, since the table holds nothing to judge one of their kernels by: "
            + ", ".join(found.left_out)
        )


def _backend(predictor: Predictor) -> str | None:
    """The backend where it has to be said: one that can be pruned for, and is not the default."""
    runtime = str(predictor.table.header["runtime"])
    return runtime if runtime in backends.names() and runtime != "onnxruntime" else None


def _model(predictor: Predictor) -> list[str]:
    """How a command line names the newest model of the table and its inputs; a placeholder where the table does not say."""
    models = predictor.table.header.get("models", ())
    origins = [entry["origin"] for entry in models if "origin" in entry]
    return list(origins[-1]) if origins else ["MODEL"]


def _cell(value: object) -> str:
    return "-" if value is None else f"{value:.1f}" if isinstance(value, float) else str(value)
