"""``edgeprune clean``: old releases and what nothing needs, away from a board."""

from __future__ import annotations

from typing import Annotated

import typer

from edgeprune.cli.console import Output, command_line
from edgeprune.cli.options import BoardOption, JsonOption, VerboseOption


def clean(
    board: BoardOption = "local",
    keep: Annotated[
        int, typer.Option("--keep", min=1, help="Releases that stay; the current and the previous one always do.")
    ] = 3,
    json_output: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Remove old releases from a board, and uploads that nothing needs; `device clean` removes the environment."""
    from edgeprune.deployment.cleaning import clean_releases

    out = Output(json_output)
    with out.step(f"clean {board}"):
        found = clean_releases(board, keep=keep)
    out.say(f"removed {len(found.removed)} releases, {found.freed_bytes / 1e6:.2f} MB are free again")
    for folder in found.removed:
        out.say(f"  {folder}")
    out.finish(
        {"board": board, "removed": list(found.removed), "freed_bytes": found.freed_bytes, "kept": list(found.kept)},
        next_command=command_line("edgeprune", "status", "--board", board),
    )
