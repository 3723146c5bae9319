"""``edgeprune rollback``: switch a board back to its former release."""

from __future__ import annotations

from edgeprune.cli.console import Output
from edgeprune.cli.options import BoardOption, JsonOption, VerboseOption


def rollback(board: BoardOption = "local", json_output: JsonOption = False, verbose: VerboseOption = False) -> None:
    """Switch a board back to the release before; nothing is uploaded."""
    from edgeprune.cli.status import show
    from edgeprune.deployment import status as deployment

    out = Output(json_output)
    with out.step(f"roll back {board}"):
        found = deployment.rollback(board)
    show(found, board, out)
