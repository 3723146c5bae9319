"""``edgeprune status``: which release a board runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import typer

from edgeprune.cli.console import Output, command_line
from edgeprune.cli.options import BoardOption, JsonOption, VerboseOption
from edgeprune.errors import RemoteError

if TYPE_CHECKING:
    from edgeprune.deployment.status import BoardStatus, Release


def status(board: BoardOption = "local", json_output: JsonOption = False, verbose: VerboseOption = False) -> None:
    """Say which release a board runs; while it is away, what it ran when it was last seen (and exit code 3)."""
    from edgeprune.deployment import status as deployment

    out = Output(json_output)
    show(deployment.status(board), board, out)


def show(found: BoardStatus, board: str, out: Output) -> None:
    """Print a board's releases and end the verb."""
    from dataclasses import asdict

    if not found.online:
        out.say(f"{found.board} is away ({found.error}); this is what it ran {_age(found.age_s)} ago")
    if found.current is None:
        out.say(f"{found.board} runs no release")
    else:
        health = "" if found.confirmed else ", which has not passed its health check"
        out.say(f"{found.board} runs {found.current}{health}")
        if found.current.tasks:
            rows = [[name, said] for name, said in found.current.tasks.items()]
            out.table("", ["task", "difference to the golden outputs on this board"], rows)
    if found.window is not None:
        out.say(_trial(found.window))
    if found.previous is not None:
        out.say(f"kept before it: {found.previous}")
    if found.releases:
        out.table(
            "",
            ["release", "state", "model", "engine", "latency", "threads", "budget", "compiled", "size, MB"],
            [
                [
                    *(one.folder, one.state, one.name, f"{one.backend} {one.precision}".strip(), *_cost(one)),
                    *(one.created, f"{one.size_bytes / 1e6:.2f}"),
                ]
                for one in found.releases
            ],
        )
    data: dict[str, Any] = asdict(found)
    # Going back is a choice, not the next step: whoever follows the printed commands must not undo what they deployed.
    back = None if found.previous is None else command_line("edgeprune", "rollback", "--board", board)
    if back is not None:
        out.say(f"to go back to it: {back}")
    deploying = command_line("edgeprune", "deploy", "ARTIFACT", "--board", board)
    out.finish({**data, "rollback": back}, next_command=deploying if found.current is None else None)
    if not found.online:
        raise typer.Exit(RemoteError.exit_code)


def _cost(release: Release) -> tuple[str, str, str]:
    """Latency, threads, and budget of a release: as its deployment found them on the board, else as its manifest has them."""
    checked, measured, predicted = release.checked, release.measured, release.predicted
    if checked.get("measured_ms"):
        which = "" if checked.get("percentile", 50) == 50 else f" (p{checked['percentile']})"
        share = f", {checked['ratio']:.1%} of dense" if checked.get("ratio") else ""
        latency, cost = f"{checked['measured_ms']:.3f} ms here{which}{share}", checked
    elif measured.get("latency_ms"):
        latency, cost = f"{measured['latency_ms']:.3f} ms {str(measured['conditions']).partition(' (')[0]}", measured
    elif predicted.get("latency_ms"):
        latency, cost = f"{predicted['latency_ms']:.3f} ms predicted", predicted
    else:
        latency, cost = "-", {}
    return latency, str(cost.get("threads") or "-"), str(checked.get("budget") or "-")


def _trial(window: Mapping[str, Any]) -> str:
    if window["left_s"] is None:
        return "it is on trial, and nobody guards it any more: the next run that holds the board puts the former release back"
    health = ""
    if window["checks"]:
        health = f"; its health command was run {window['checks']} times and "
        health += "holds" if window["complaint"] is None else window["complaint"]
    return f"it is on trial: the board puts the former release back in {window['left_s']:.0f} s unless it is confirmed{health}"


def _age(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} seconds"
