"""``edgeprune deploy``: check an artifact on a board, then switch to it."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgeprune.cli.console import Output, command_line
from edgeprune.cli.options import BoardOption, JsonOption, LatencyOption, ThreadsOption, VerboseOption
from edgeprune.cli.record import deployment_record
from edgeprune.files import write_text
from edgeprune.spec import Budget

if TYPE_CHECKING:
    from edgeprune.deployment.result import Deployment

_log = logging.getLogger("edgeprune.cli.deploy")


def deploy(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="Folder that `edgeprune compile` wrote.")],
    board: BoardOption = "local",
    latency: LatencyOption = None,
    reference: Annotated[
        Path | None,
        typer.Option("--reference", help="Artifact of the dense model: timed interleaved, never released."),
    ] = None,
    dense_ms: Annotated[
        float | None, typer.Option("--dense-ms", help="Dense latency that a budget in ms was chosen against.")
    ] = None,
    tolerance: Annotated[float, typer.Option("--tolerance", help="Share by which the budget may be exceeded.")] = 0.05,
    threads: ThreadsOption = 1,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Rounds of the latency comparison.")] = 20,
    keep: Annotated[int, typer.Option("--keep", min=2, help="Releases that the board keeps.")] = 3,
    percentile: Annotated[
        int,
        typer.Option(
            "--percentile", metavar="50|95|99", help="Of single inferences, for the budget; 50 is the median."
        ),
    ] = 50,
    json_output: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Send an artifact to a board, check its numbers and milliseconds there, then switch to it.

    Until both checks have passed, what runs on the board is left alone; a release that fails after the switch is rolled
    back.
    """
    import edgeprune
    from edgeprune.report.stored import FILE_NAME as REPORT_DATA

    output = Output(json_output)
    budget = None if latency is None else Budget.parse(latency)
    with output.step(f"deploy to {board}") as progress:
        loaded = edgeprune.Artifact.load(artifact)
        done = edgeprune.deploy(
            loaded,
            board,
            budget_ms=None if budget is None else budget.latency_ms,
            budget_ratio=None if budget is None else budget.latency_ratio,
            reference=reference,
            dense_ms=dense_ms,
            tolerance=tolerance,
            threads=threads,
            rounds=rounds,
            keep=keep,
            percentile=percentile,
            progress=progress.staged,
        )
    output.table("", ["checked on the board", "result"], _rows(done, budget, tolerance))
    record = deployment_record(artifact, done.board)
    data = {
        **asdict(done),
        "budget": None if budget is None else str(budget),
        "tolerance": None if budget is None else tolerance,
        "percentile": percentile,
        "plan_hash": loaded.manifest.plan_hash,
    }
    try:
        write_text(record, json.dumps(data, indent=2, default=str) + "\n")
        output.wrote(record, "what was checked and measured")
    except OSError as error:  # the board runs the release all the same
        _log.warning("what was checked and measured could not be kept in %s: %s", record, error.strerror)
    run = record.parent
    following = ("report", artifact.parent) if (run / REPORT_DATA).is_file() else ("status", "--board", board)
    output.finish(data, next_command=command_line("edgeprune", *following))


def _rows(done: Deployment, budget: Budget | None, tolerance: float) -> list[list[str]]:
    rows = [
        ["release", f"{done.release}" + ("" if done.changed else " (ran already)")],
        ["parity", f"largest difference {done.parity.max_abs:.2g}"],
        *([f"parity of {name}", str(one)] for name, one in done.parity.tasks.items()),
        ["latency", f"{done.measured_ms:.3f} ms, measured on {done.board}"],
    ]
    if done.ratio is not None and done.dense_ms is not None:
        interval = f" ({done.ratio_low:.1%} to {done.ratio_high:.1%})" if done.ratio_low and done.ratio_high else ""
        rows.append(["of dense", f"{done.ratio:.1%}{interval} of {done.dense_ms:.3f} ms, interleaved"])
    rows.append(["budget", _verdict(done, budget, tolerance)])
    rows.append(["sent", f"{done.bytes_sent / 1e6:.2f} MB"])
    rows.append(["former release", done.previous or "none"])
    return rows


def _verdict(done: Deployment, budget: Budget | None, tolerance: float) -> str:
    if budget is None:
        return "none was given: the latency was measured, and held against nothing"
    if budget.latency_ms is not None:
        held, limit = f"{done.latency_ms:.3f} ms", f"{budget.latency_ms * (1 + tolerance):.3f} ms"
        if done.ratio is not None:
            held += ", by the ratio to dense,"
        within = done.latency_ms <= budget.latency_ms
    else:
        held, limit = f"{done.ratio or 0.0:.1%}", f"{(budget.latency_ratio or 0.0) * (1 + tolerance):.1%}"
        within = (done.ratio or 0.0) <= (budget.latency_ratio or 0.0)
    verdict = "met" if within else "within the tolerance"
    return f"{verdict}: {held} for {budget}; the upper end of the interval may be up to {limit} (--tolerance {tolerance:g})"
