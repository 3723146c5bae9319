"""``edgeprune verify``: whether a board still holds what was deployed."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from edgeprune.cli.console import Output, command_line
from edgeprune.cli.options import BoardOption, JsonOption, ThreadsOption, VerboseOption


def verify(
    board: BoardOption = "local",
    release: Annotated[str, typer.Option("--release", help="current, previous, or a release's folder.")] = "current",
    parity: Annotated[bool, typer.Option("--parity", help="Also run the golden inputs on the board.")] = False,
    threads: ThreadsOption = 1,
    signers: Annotated[
        Path | None, typer.Option("--signers", help="Allowed signers, instead of those that the board was added with.")
    ] = None,
    json_output: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Compare a release on a board with its manifest, file by file; nothing is changed."""
    from edgeprune.deployment.verifying import verify as verify_release

    out = Output(json_output)
    with out.step(f"verify {board}"):
        found = verify_release(board, release=release, parity=parity, threads=threads, signers=signers)
    out.say(
        f"release {found.release} ({found.name}) on {found.board}: {found.files} files, {found.size_bytes / 1e6:.2f} MB, "
        "are what the manifest says"
    )
    out.say("nobody asks for a signature" if found.signer is None else f"signed by {found.signer}")
    if found.parity is not None:
        out.say(f"golden outputs on the board: largest difference {found.parity.max_abs:.2g}")
    out.finish(asdict(found), next_command=command_line("edgeprune", "status", "--board", board))
