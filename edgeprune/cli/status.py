"""``edgeprune status``: which release a board runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgeprune.cli.console import Output, command_line
from edgeprune.cli.options import BoardOption, JsonOption, VerboseOption

if TYPE_CHECKING:
    from edgeprune.deployment.status import BoardStatus


def status(board: BoardOption = "local", json_output: JsonOption = False, verbose: VerboseOption = False) -> None:
    """Say which release a board runs; while it is away, what it ran when it was last seen."""
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
    if found.previous is not None:
        out.say(f"rollback would put back {found.previous}")
    if found.releases:
        out.table(
            "",
            ["release", "model", "compiled", "size, MB"],
            [[one.folder, one.name, one.created, f"{one.size_bytes / 1e6:.2f}"] for one in found.releases],
        )
    data: dict[str, Any] = asdict(found)
    following = ["edgeprune", "rollback"] if found.previous is not None else ["edgeprune", "deploy", "ARTIFACT"]
    out.finish(data, next_command=command_line(*following, "--board", board))


def _age(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} seconds"
