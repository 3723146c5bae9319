"""``edgeprune quickstart``: the whole way on an embedded model and data set."""

from __future__ import annotations

import os
import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from edgeprune.cli.console import Output, command_line
from edgeprune.cli.options import JsonOption, SeedOption, VerboseOption


def quickstart(
    board: Annotated[str, typer.Option("--board", help="local, a configured name, or ssh://user@host:port.")] = "local",
    latency: Annotated[str, typer.Option("--latency", metavar="12ms|50%", help="Latency budget.")] = "50%",
    out: Annotated[Path, typer.Option("--out", help="Folder to write.")] = Path("edgeprune-quickstart"),
    seed: SeedOption = 0,
    minutes: Annotated[
        float, typer.Option("--minutes", help="Time for profiling, without start-up and lowering.")
    ] = 1.0,
    tolerance: Annotated[
        float, typer.Option("--tolerance", help="Share by which the latency gate may exceed the budget.")
    ] = 0.05,
    epochs: Annotated[
        int, typer.Option("--epochs", min=0, help="Of fine-tuning, the pruned model and the uniform one beside it.")
    ] = 1,
    open_: Annotated[bool, typer.Option("--open", help="Open the report in a browser.")] = False,
    json_output: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Train, profile, prune to a latency budget, compile, deploy: a small residual CNN on handwritten digits.

    Interrupted, it goes on where it was when the same command is given again.
    """
    from edgeprune.budget import Budget

    output = Output(json_output)
    budget = Budget.parse(latency)
    # OpenMP threads that spin while they wait make training ten times slower on a machine that is busy otherwise.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with output.step("start"):
        from edgeprune.quickstart import flow
    outcome = flow.run(flow.Settings(board, budget, out, seed, minutes, tolerance, epochs), output.step)
    summary = outcome.summary
    found = (outcome.board[name] for name in ("cpu", "memory", "os", "runtimes"))
    output.say(f"board {summary['board']}: {'; '.join(found)}")
    output.say(f"predictor: {outcome.fit}")
    for sentence in outcome.disturbances:
        output.say(f"note on the board: {sentence}")
    output.table(
        f"budget {summary['budget_ms']:.3f} ms, board {summary['board']}",
        ["", "accuracy", "measured, ms", "of dense", "parameters"],
        [
            [row.name, f"{row.accuracy:.2%}", f"{row.latency_ms:.3f}", f"{row.ratio:.1%}", f"{row.parameters:,}"]
            for row in outcome.candidates
        ],
    )
    error = summary["pruned_predicted_ms"] / summary["pruned_measured_ms"] - 1
    output.say(f"predicted {summary['pruned_predicted_ms']:.3f} ms before compiling, {error:+.1%} of measured")
    for note in outcome.notes:
        output.say(note)
    ratio, asked = summary["pruned_ratio"], summary["budget_ms"] / summary["dense_ms"]
    output.say(
        f"measured on {summary['board']}: {ratio:.1%} of the dense latency, {asked:.1%} were asked for; "
        f"release {summary['release']} runs there"
    )
    output.say(
        f"of {summary['test_images']} held-out images {summary['only_pruned_right']} are recognized by the pruned model and not "
        f"by the uniform one, {summary['only_uniform_right']} the other way round"
    )
    output.wrote(out / "summary.json", "summary")
    output.wrote(out / "report.html", "report")
    if open_:
        webbrowser.open((out / "report.html").resolve().as_uri())
    output.finish(dict(summary), next_command=command_line("edgeprune", "status", "--board", board))
