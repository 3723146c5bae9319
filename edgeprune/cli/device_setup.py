"""``edgeprune device setup`` and ``edgeprune device clean``: a runtime on a board, and away with it."""

from __future__ import annotations

from typing import Annotated

import typer

from edgeprune.cli.console import Output, command_line
from edgeprune.cli.options import BackendOption, JsonOption, VerboseOption

NameArgument = Annotated[str, typer.Argument(metavar="BOARD", help="A board, local, or ssh://user@host:port.")]


def setup(
    board: NameArgument,
    backend: BackendOption = "onnxruntime",
    runtime_version: Annotated[
        str | None,
        typer.Option("--runtime-version", help="Version of the runtime; this machine's, or the newest that fits."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Choose and download the wheels here, and send nothing.")
    ] = False,
    json_output: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Give a board a runtime in a private environment: no root, no network and no pip are needed there."""
    from edgeprune.deployment.environment import set_up

    out = Output(json_output)
    with out.step(f"set up {board}") as progress:
        found = set_up(
            board, backend=backend, runtime_version=runtime_version, dry_run=dry_run, progress=progress.staged
        )
    out.say(f"{found.target}: {', '.join(f'{name} {version}' for name, version in sorted(found.packages.items()))}")
    sizes = f"{found.bytes_sent / 1e6:.1f} MB sent, {found.bytes_unpacked / 1e6:.1f} MB there"
    following = command_line("edgeprune", "doctor", "--board", board)
    if found.python is None:
        out.say(f"nothing was sent: it would be {sizes}")
        following = command_line(
            *("edgeprune", "device", "setup", board),
            *(() if backend == "onnxruntime" else ("--backend", backend)),
            *(() if runtime_version is None else ("--runtime-version", runtime_version)),
        )
    else:
        state = "uses it from now on" if found.changed else "used it already"
        out.say(f"an inference there agrees with this machine; board {board} {state}: {found.python} ({sizes})")
    out.finish(
        {
            "board": board,
            "backend": found.backend,
            "version": found.version,
            "target": {
                "python": found.target.python,
                "abi": found.target.abi,
                "platforms": list(found.target.platforms),
                "libc": found.target.libc,
            },
            "packages": dict(found.packages),
            "bytes_sent": found.bytes_sent,
            "bytes_unpacked": found.bytes_unpacked,
            "dry_run": found.python is None,
            "python": found.python,
            "changed": found.changed,
            "parity": None if found.parity is None else found.parity.as_json(),
        },
        next_command=following,
    )


def clean(
    board: NameArgument,
    releases: Annotated[
        bool,
        typer.Option("--releases", help="Also every release, the current one too, and edgeprune's folder itself."),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be removed, and remove nothing.")] = False,
    json_output: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Remove the private environment from a board, and uploads that nothing needs; releases only when asked to."""
    from edgeprune.deployment.cleaning import clean as clean_board

    out = Output(json_output)
    with out.step(f"clean {board}"):
        found = clean_board(board, releases=releases, dry_run=dry_run)
    word = "would remove" if dry_run else "removed"
    for path, size in found.removed.items():
        out.say(f"{word} {path} ({size / 1e6:.1f} MB)")
    if not found.removed:
        out.say("there is nothing to remove")
    if found.current is not None:
        out.say(f"release {found.current} stays; --releases removes releases too")
    following = ["clean", board, *(["--releases"] if releases else [])] if dry_run else ["setup", board]
    out.finish(
        {
            "board": board,
            "dry_run": dry_run,
            "removed": [{"path": path, "bytes": size} for path, size in found.removed.items()],
            "current": found.current,
        },
        next_command=command_line("edgeprune", "device", *following),
    )
