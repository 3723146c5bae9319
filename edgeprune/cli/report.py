"""``edgeprune report``: one HTML file about a pruning run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from edgeprune.cli.console import Output
from edgeprune.cli.options import JsonOption, VerboseOption
from edgeprune.cli.record import DEPLOYMENT_SUFFIX, REPORT_NAME
from edgeprune.errors import ConfigError


def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of `edgeprune prune` or quickstart.")],
    out: Annotated[Path | None, typer.Option("--out", help="HTML file to write; DIR/report.html by default.")] = None,
    open_: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
    json_output: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Write one self-contained HTML file about a pruning run and the deployments beside it."""
    from edgeprune.report import page, pruning, stored

    output = Output(json_output)
    data = stored.load(folder / stored.FILE_NAME)
    deployed: dict[str, Path] = {}
    for path in sorted(folder.glob(f"*{DEPLOYMENT_SUFFIX}"), key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            deployment = json.loads(path.read_text(encoding="utf-8"))
            # Of the dense model, or of another run, it says nothing about this plan; of each board the newest one counts.
            if deployment["plan_hash"] == data.hashes["plan"] and deployment["board"] not in deployed:
                data = pruning.with_deployment(data, deployment)
                deployed[deployment["board"]] = path
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{path} must be written by edgeprune deploy, it is not valid.", hint=f"remove {path}, or deploy again"
            ) from error
    target = out if out is not None else folder / REPORT_NAME
    with output.step("write the report"):
        page.write(data, target)
    output.wrote(target, "report")
    if open_:
        typer.launch(target.resolve().as_uri())
    output.finish({"report": str(target), "deployments": {board: str(path) for board, path in deployed.items()}})
