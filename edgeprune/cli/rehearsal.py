"""``edgeprune deploy --dry-run``: what a deployment would do, to one board or to many."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from edgeprune.cli.console import Output, command_line
from edgeprune.errors import EdgepruneError

if TYPE_CHECKING:
    from edgeprune.budget import Budget
    from edgeprune.deployment.artifact import Artifact
    from edgeprune.deployment.rehearsing import Rehearsal


def rehearse_on(
    artifact: Artifact,
    board: str,
    out: Output,
    *,
    reference: Path | None,
    threads: int | None,
    budget: Budget | None,
) -> None:
    """Say what a deployment to one board would do, and end the verb."""
    from edgeprune.deployment.rehearsing import rehearse

    with out.step(f"look at {board}"):
        found = rehearse(artifact, board, reference=reference, threads=threads, budget=budget)
    rows = [[need.field, need.needed, need.found] for need in found.requirements]
    out.table("", ["the artifact needs", "needed", "found"], rows)
    if found.missing:
        rows = [[name, f"{size / 1e6:.2f}"] for name, size in found.missing.items()]
        out.table("", ["the board lacks", "size, MB"], rows)
    out.say(_sentence(found))
    for note in found.notes:
        out.say(f"mind: {note}")
    out.finish(
        {"dry_run": True, **asdict(found)}, next_command=command_line("edgeprune", *_without_dry_run(sys.argv[1:]))
    )


def rehearse_on_many(
    artifact: Artifact,
    boards: Sequence[str],
    out: Output,
    *,
    reference: Path | None,
    threads: int | None,
    budget: Budget | None,
) -> None:
    """The same of each of many boards; ends with the gravest of their exit codes."""
    from edgeprune.deployment.rehearsing import rehearse

    rows: list[list[str]] = []
    data: list[dict[str, Any]] = []
    worst = 0
    for board in boards:
        try:
            with out.step(f"look at {board}"):
                found = rehearse(artifact, board, reference=reference, threads=threads, budget=budget)
        except EdgepruneError as error:
            worst = max(worst, error.exit_code)
            rows.append([board, error.message + ("" if error.hint is None else f" Try: {error.hint}")])
            data.append({"board": board, "error": type(error).__name__, "message": error.message, "hint": error.hint})
        else:
            rows.append([board, " ".join((_sentence(found), *found.notes))])
            data.append({**asdict(found), "board": board})
    out.table("", ["board", "found"], rows)
    following = None if worst else command_line("edgeprune", *_without_dry_run(sys.argv[1:]))
    out.finish({"dry_run": True, "boards": data, "exit_code": worst}, next_command=following)
    if worst:
        raise typer.Exit(worst)


def _sentence(found: Rehearsal) -> str:
    now = "no release" if found.runs is None else found.runs
    runs = "runs this release already" if found.again else f"runs {now}"
    return (
        f"{found.board} {runs}; {found.bytes_to_send / 1e6:.2f} MB would be sent, {found.new_bytes / 1e6:.2f} MB written of "
        f"{found.free_bytes / 1e6:.0f} MB free there. Nothing was sent."
    )


def _without_dry_run(words: Sequence[str]) -> list[str]:
    return [word for word in words if word not in ("--dry-run", "--json")]
