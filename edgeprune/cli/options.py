"""Options that several verbs share: one spelling, one meaning, one help line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from edgeprune.errors import ConfigError

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
VerboseOption = Annotated[bool, typer.Option("--verbose", help="Show the log, and a traceback where there is one.")]
BoardOption = Annotated[
    str, typer.Option("--board", help="local, a name from `edgeprune device list`, or ssh://user@host:port.")
]
BackendOption = Annotated[str, typer.Option("--backend", help="Compiler and runtime; `edgeprune doctor` lists them.")]
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="package.module:factory or file.py:factory.")]
InputOption = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        metavar="NAME=SHAPE[:DTYPE]",
        help="Example input at the deployment batch, e.g. x=1x3x32x32:float32, named as the parameter of forward, or in its "
        "order under other names; repeat per input.",
    ),
]
InputsOption = Annotated[
    Path | None, typer.Option("--inputs", metavar="FILE.npz", help="Example inputs as arrays, instead of --input.")
]
WeightsOption = Annotated[
    Path | None, typer.Option("--weights", help="State dict to load into the model: .safetensors, or .pt without code.")
]
LatencyOption = Annotated[
    str | None, typer.Option("--latency", metavar="12ms|50%", help="Latency budget: a time, or a share of dense.")
]
SeedOption = Annotated[int, typer.Option("--seed", help="Seed of everything random.")]
MeterOption = Annotated[
    str | None,
    typer.Option("--meter", metavar="COMMAND", help="Command on the board that prints an external meter's watts."),
]
HostMeterOption = Annotated[
    str | None,
    typer.Option(
        "--host-meter", metavar="COMMAND", help="Command on this machine that prints an external meter's watts."
    ),
]
ThreadsOption = Annotated[int, typer.Option("--threads", min=1, help="Threads of the runtime on the board.")]


def input_flags(specs: list[str] | None, file: Path | None) -> list[str]:
    """The options that give the same example inputs again, for the command that is printed as the next one."""
    flags = [word for text in specs or () for word in ("--input", text)]
    return flags if file is None else [*flags, "--inputs", str(file)]


def tile_of(text: str) -> tuple[int, int]:
    """``"64x128"`` as rows and columns.

    Raises:
        ConfigError: It is no such text.
    """
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None or not (int(match[1]) and int(match[2])):
        raise ConfigError(f"--tiles must be ROWSxCOLUMNS, outputs by inputs, found {text!r}.", hint="--tiles 64x128")
    return int(match[1]), int(match[2])


def was_given(context: typer.Context, name: str) -> bool:
    """Whether the user wrote an option, rather than that it has its default."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def given(**options: object) -> list[object]:
    """``--name value`` of the options that are not None, for the command that is printed as the next one."""
    return [word for name, value in options.items() if value is not None for word in (f"--{name}", value)]
