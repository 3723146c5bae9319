"""``edgeprune layers``: what each kernel of an artifact takes on a board."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from edgeprune.cli.console import Output, command_line
from edgeprune.cli.options import BoardOption, JsonOption, ThreadsOption, VerboseOption


def layers(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="Folder that `edgeprune compile` wrote.")],
    board: BoardOption = "local",
    threads: ThreadsOption = 1,
    json_output: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Trace an engine on a board with its runtime's own trace: kernels in the order in which they run, and their shares.

    Nothing is switched there. A trace takes time itself, so kernels add up to another time than an inference takes.
    """
    import edgeprune
    from edgeprune.deployment.kernel_times import kernel_times

    out = Output(json_output)
    loaded = edgeprune.Artifact.load(artifact)
    with out.step(f"trace it on {board}"):
        found = kernel_times(loaded, board, threads=threads)
    rows = [
        (one.module or one.name, one.op or "", f"{one.us:.1f}", f"{100 * one.share:.1f} %") for one in found.kernels
    ]
    out.table("kernels", ("layer", "kernel", "us", "share"), rows)
    out.say(
        f"{len(found.kernels)} kernels add up to {found.sum_ms:.3g} ms as they are traced; without a trace an inference takes "
        f"{found.whole_ms:.3g} ms"
    )
    out.finish(
        {
            "board": board,
            "kernels": [asdict(one) for one in found.kernels],
            "sum_ms": found.sum_ms,
            "whole_ms": found.whole_ms,
        },
        next_command=command_line("edgeprune", "deploy", artifact, "--board", board, "--dry-run"),
    )
