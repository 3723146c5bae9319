"""``edgeprune deploy``: check an artifact on a board, then switch to it."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgeprune.boards.cores import counted
from edgeprune.budget import Budget
from edgeprune.cli.console import Output, command_line
from edgeprune.cli.options import BoardOption, JsonOption, LatencyOption, VerboseOption, was_given
from edgeprune.cli.record import deployment_record
from edgeprune.errors import ConfigError
from edgeprune.files import write_text

if TYPE_CHECKING:
    from edgeprune.deployment.result import Deployment

RECORD_HOLDS = "what was checked and measured"

_log = logging.getLogger("edgeprune.cli.deploy")


def deploy(
    context: typer.Context,
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
    threads: Annotated[
        int | None,
        typer.Option(
            "--threads", min=1, help="Threads of the runtime on the board; those that the artifact is for by default."
        ),
    ] = None,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Rounds of the latency comparison.")] = 20,
    keep: Annotated[int, typer.Option("--keep", min=2, help="Releases that the board keeps.")] = 3,
    percentile: Annotated[
        int,
        typer.Option(
            "--percentile", metavar="50|95|99", help="Of single inferences, for the budget; 50 is the median."
        ),
    ] = 50,
    health: Annotated[
        str | None,
        typer.Option(
            "--health", metavar="COMMAND", help="Run on the board each second after the switch; 0 is healthy."
        ),
    ] = None,
    reload: Annotated[
        str | None,
        typer.Option("--reload", metavar="COMMAND", help="Run on the board after each switch, there and back."),
    ] = None,
    health_window: Annotated[
        float | None,
        typer.Option(
            "--health-window",
            metavar="SECONDS",
            help="Until when the release must be confirmed, else the board itself goes back; a minute and more by default.",
        ),
    ] = None,
    steady: Annotated[
        float | None,
        typer.Option("--steady", metavar="SECONDS", help="How long --health must hold without a break; 10 by default."),
    ] = None,
    to: Annotated[
        list[str] | None,
        typer.Option("--to", metavar="GROUP|BOARD,...", help="Many boards instead: a group of boards.toml, or names."),
    ] = None,
    canary: Annotated[
        int, typer.Option("--canary", min=1, help="Of --to: boards that must run the release before all others.")
    ] = 1,
    max_failures: Annotated[int, typer.Option("--max-failures", min=1, help="Of --to: failed boards that end it.")] = 1,
    at_once: Annotated[int, typer.Option("--at-once", min=1, help="Of --to: boards at the same time.")] = 8,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what is lacking and what would be sent; leave nothing on the board.")
    ] = False,
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
    loaded = edgeprune.Artifact.load(artifact)
    options: dict[str, Any] = {
        "budget_ms": None if budget is None else budget.latency_ms,
        "budget_ratio": None if budget is None else budget.latency_ratio,
        "reference": reference,
        "dense_ms": dense_ms,
        "tolerance": tolerance,
        "threads": threads,
        "rounds": rounds,
        "keep": keep,
        "percentile": percentile,
        "health": health,
        "reload": reload,
        "health_window_s": health_window,
        "steady_s": steady,
    }
    facts: dict[str, Any] = {
        "budget": None if budget is None else str(budget),
        "tolerance": None if budget is None else tolerance,
        "percentile": percentile,
        "plan_hash": loaded.manifest.plan_hash,
    }
    if dry_run:
        # What the deployment would refuse for its own sake is refused now.
        from edgeprune.deployment.deploying import budget_of
        from edgeprune.deployment.trial import Health

        budget_of(options["budget_ms"], options["budget_ratio"], reference, tolerance)
        Health(health, reload, health_window, steady)
    if to:
        from edgeprune.cli.fleet import deploy_to_fleet

        if was_given(context, "board"):
            raise ConfigError("boards must be named with --board or with --to, found both.", hint="--to alone")
        if dry_run:
            from edgeprune.boards.config import BoardConfig
            from edgeprune.cli.rehearsal import rehearse_on_many

            rehearse_on_many(
                loaded, BoardConfig().members(to), output, reference=reference, threads=threads, budget=budget
            )
            return
        deploy_to_fleet(loaded, to, output, options, facts, canary=canary, max_failures=max_failures, at_once=at_once)
        return
    if alone := [name for name in ("canary", "max_failures", "at_once") if was_given(context, name)]:
        option = alone[0].replace("_", "-")
        raise ConfigError(f"--{option} is of many boards, found one, {board}.", hint="--to GROUP|BOARD,...")
    if dry_run:
        from edgeprune.cli.rehearsal import rehearse_on

        rehearse_on(loaded, board, output, reference=reference, threads=threads, budget=budget)
        return
    with output.step(f"deploy to {board}") as progress:
        done = edgeprune.deploy(loaded, board, progress=progress.staged, **options)
    output.table("", ["checked on the board", "result"], _rows(done, budget, tolerance))
    for note in done.notes:
        output.say(f"mind: {note}")
    data, record = keep_record(artifact, done, facts)
    if record is not None:
        output.wrote(record, RECORD_HOLDS)
    run = artifact.absolute().parent
    following = ("report", artifact.parent) if (run / REPORT_DATA).is_file() else ("status", "--board", board)
    output.finish(data, next_command=command_line("edgeprune", *following))


def keep_record(artifact: Path, done: Deployment, facts: Mapping[str, Any]) -> tuple[dict[str, Any], Path | None]:
    """Write what was checked and measured on one board beside the artifact; what was written, and where if it could be."""
    data = {**asdict(done), **facts}
    record = deployment_record(artifact, done.board)
    try:
        write_text(record, json.dumps(data, indent=2, default=str) + "\n")
    except OSError as error:  # the board runs the release all the same
        _log.warning("what was checked and measured could not be kept in %s: %s", record, error.strerror)
        return data, None
    return data, record


def told_latency(done: Deployment) -> str:
    """What was timed on the board, and where."""
    if done.measured_ms is None:
        return f"not measured: the processor of {done.board} is emulated"
    made_for = ""
    if done.made_for_threads is not None:
        same = done.made_for_threads == done.threads
        made_for = (
            ", as the artifact is for" if same else f"; the artifact is for {counted(done.made_for_threads, 'thread')}"
        )
    disturbance = f"; {done.disturbance}" if done.disturbance else ""
    where = f"measured on {done.board} with {counted(done.threads, 'thread')}{made_for}"
    return f"{done.measured_ms:.3f} ms, {where}{disturbance}"


def _rows(done: Deployment, budget: Budget | None, tolerance: float) -> list[list[str]]:
    rows = [
        ["release", f"{done.release}" + ("" if done.changed else " (ran already)")],
        ["parity", f"largest difference {done.parity.max_abs:.2g}"],
        *([f"parity of {name}", str(one)] for name, one in done.parity.tasks.items()),
        ["latency", told_latency(done)],
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
        was = "not measured" if done.measured_ms is None else "measured"
        return f"none was given: the latency was {was}, and held against nothing"
    assert done.latency_ms is not None  # a budget is refused where nothing is timed
    if budget.latency_ms is not None:
        held, limit = f"{done.latency_ms:.3f} ms", f"{budget.latency_ms * (1 + tolerance):.3f} ms"
        if done.ratio is not None:
            held += ", by the ratio to dense,"
        within = done.latency_ms <= budget.latency_ms
    else:
        held, limit = f"{done.ratio or 0.0:.1%}", f"{(budget.latency_ratio or 0.0) * (1 + tolerance):.1%}"
        within = (done.ratio or 0.0) <= (budget.latency_ratio or 0.0)
    verdict = "met" if within else "within the tolerance"
    if done.made_for_threads not in (None, done.threads):
        verdict += f" with {counted(done.threads, 'thread')} (mind below)"
    return f"{verdict}: {held} for {budget}; the upper end of the interval may be up to {limit} (--tolerance {tolerance:g})"
