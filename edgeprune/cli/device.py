"""``edgeprune device``: the user's boards."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgeprune.cli.console import Output, command_line
from edgeprune.cli.device_setup import clean, setup
from edgeprune.cli.options import JsonOption, MeterOption, VerboseOption
from edgeprune.errors import ConfigError, HostKeyError

if TYPE_CHECKING:
    from edgeprune.boards.config import BoardEntry
    from edgeprune.boards.power import PowerSensor
    from edgeprune.spec import DeviceSpec

device = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Add, list, show, probe, set up, clean and remove boards.",
    rich_markup_mode="rich",
)
device.command()(setup)
device.command()(clean)

NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="What you call the board.")]


@device.command()
def add(
    name: NameArgument,
    ssh: Annotated[
        str, typer.Option("--ssh", metavar="user@host[:port]", help="Address, or an alias of ~/.ssh/config.")
    ],
    type_: Annotated[
        str | None, typer.Option("--type", help="Device type; `edgeprune device list --types` lists them.")
    ] = None,
    python: Annotated[str, typer.Option("--python", help="The board's Python, 3.6 or newer.")] = "python3",
    root: Annotated[
        str, typer.Option("--root", help="Folder on the board for everything of edgeprune.")
    ] = "~/.edgeprune",
    identity: Annotated[
        Path | None, typer.Option("--identity", help="Private key file; else the agent's keys.")
    ] = None,
    host_key: Annotated[
        str | None, typer.Option("--host-key", metavar="SHA256:...", help="Expected host key, instead of being asked.")
    ] = None,
    jump: Annotated[
        str | None,
        typer.Option(
            "--jump", metavar="[user@]host[:port]", help="Host to go through, as ssh -J; else ~/.ssh/config's."
        ),
    ] = None,
    signers: Annotated[
        Path | None,
        typer.Option(
            "--signers", help="Allowed signers (ssh-keygen's format): what they did not sign is not deployed."
        ),
    ] = None,
    cores: Annotated[
        str | None,
        typer.Option("--cores", metavar="LIST", help="Cores that engines are timed on, as taskset takes them: 4-7."),
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Overwrite a board of that name.")] = False,
    json_output: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Add a board that is reached over SSH; its host key is shown and must be accepted."""
    from edgeprune.boards.config import BoardConfig, check_name
    from edgeprune.boards.device_types import device_type

    out = Output(json_output)
    config = BoardConfig()
    # Everything that can be refused without the board is refused before the board is asked.
    if check_name(name) in config.list() and not replace:
        raise ConfigError(
            f"a new board's name must be free, {name!r} is taken.", hint=f"--replace, or device remove {name}"
        )
    if type_ is not None:
        device_type(type_)
    entry = _entry(
        {
            "ssh": ssh,
            "type": type_,
            "python": python,
            "root": root,
            "identity": None if identity is None else str(identity.expanduser().absolute()),
            "host_key": host_key,
            "jump": jump,
            "signers": None if signers is None else str(signers.expanduser().absolute()),
            "cores": cores,
        }
    )
    accepted = entry.model_copy(update={"host_key": _accepted_host_key(entry, out)})
    config.add(name, accepted, replace=replace)
    out.wrote(config.path, f"board {name}")
    out.finish({"name": name, **_entry_json(accepted)}, next_command=command_line("edgeprune", "device", "setup", name))


def _entry(fields: dict[str, str | None]) -> BoardEntry:
    from pydantic import ValidationError

    from edgeprune.boards.config import BoardEntry

    try:
        return BoardEntry.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        option = str(first["loc"][0]).replace("_", "-")
        reason = first["msg"].removeprefix("Value error, ")
        raise ConfigError(
            f"--{option} {first['input']!r} cannot be used: {reason.rstrip('.')}.", hint="edgeprune device add --help"
        ) from error


def _accepted_host_key(entry: BoardEntry, out: Output) -> str:
    """Fingerprint of the host key that the user accepts: given, or shown and confirmed."""
    from edgeprune.boards.ssh_config import jumps_of, resolve, with_overrides
    from edgeprune.boards.ssh_connection import show_host_key

    settings = with_overrides(resolve(entry.ssh), jumps=jumps_of(entry.jump) if entry.jump else ())
    with out.step(f"ask {settings.address} for its host key"):
        shown = show_host_key(settings, pinned=entry.host_key)
    if entry.host_key is not None:
        return entry.host_key
    hint = f"--host-key {shown.fingerprint}, when that is the board's key"
    question = f"{settings.address} shows the {shown.key_type} host key {shown.fingerprint}"
    if out.json_mode or not sys.stdin.isatty():
        asking = "--json asks nothing" if out.json_mode else "there is no terminal to ask on"
        raise HostKeyError(f"{question}, and it must be accepted before the board is added; {asking}.", hint=hint)
    if not typer.confirm(f"{question}\nIs that the board's key?", err=True):
        raise HostKeyError(f"{question}, and you did not accept it.", hint=hint)
    return shown.fingerprint


@device.command("list")
def list_(
    types: Annotated[bool, typer.Option("--types", help="List device types instead of boards.")] = False,
    json_output: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """List the boards that are configured, or the device types that are known."""
    from edgeprune.boards.config import BoardConfig
    from edgeprune.boards.device_types import device_types

    out = Output(json_output)
    if types:
        known = device_types()
        rows = [[spec.name, spec.title, spec.architecture, ", ".join(spec.backends)] for spec in known]
        out.table("", ["type", "device", "architecture", "backends"], rows)
        out.finish(
            {"types": [_type_json(spec) for spec in known]},
            next_command="edgeprune device add NAME --ssh user@host --type TYPE",
        )
        return
    config = BoardConfig()
    boards = config.list()
    rows = [["local", "this machine", "", ""]]
    rows += [[name, entry.ssh, entry.type or "", entry.root] for name, entry in boards.items()]
    out.table("", ["board", "address", "type", "root"], rows)
    groups = config.groups()
    for name, members in groups.items():
        out.say(f"group {name}: {', '.join(members)}")
    out.say(f"configured in {config.path}" if boards else f"no boards in {config.path} yet")
    out.finish(
        {
            "config": str(config.path),
            "boards": {name: _entry_json(entry) for name, entry in boards.items()},
            "groups": groups,
        },
        next_command=None if boards else "edgeprune device add NAME --ssh user@host",
    )


@device.command()
def show(name: NameArgument, json_output: JsonOption = False, verbose: VerboseOption = False) -> None:
    """Show how a board is configured and what is known of its type; the board is not contacted."""
    from edgeprune.boards.config import BoardConfig
    from edgeprune.boards.device_types import device_type
    from edgeprune.boards.reaching import DEFAULT_ROOT, LOCAL, ROOT_VARIABLE

    out = Output(json_output)
    probing = command_line("edgeprune", "device", "probe", name)
    if name == LOCAL:
        root = os.environ.get(ROOT_VARIABLE) or DEFAULT_ROOT
        out.say("local is this machine: it has no settings and need not be added")
        settings: dict[str, str | None] = {"address": "this machine", "python": sys.executable, "root": root}
        out.table("", ["setting", "value"], [[key, value] for key, value in settings.items()])
        out.finish({"name": name, **settings, "device": None}, next_command=probing)
        return
    entry = BoardConfig().get(name)
    spec = device_type(entry.type) if entry.type is not None else None
    out.table("", ["setting", "value"], [[key, value or ""] for key, value in _entry_json(entry).items()])
    if spec is not None:
        out.table(spec.title, ["fact", "value"], [[key, _fact(value)] for key, value in spec.facts.items()])
        out.say("sources:")
        for source in spec.sources:
            out.say(f"  {source}")
    out.finish(
        {"name": name, **_entry_json(entry), "device": None if spec is None else _type_json(spec)},
        next_command=probing,
    )


@device.command()
def probe(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A board, local, or ssh://user@host:port.")] = "local",
    meter: MeterOption = None,
    json_output: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Ask a board what it is and runs, what it lacks, and what could disturb a measurement."""
    from dataclasses import asdict

    import edgeprune
    from edgeprune.cli.power import energy_sentence
    from edgeprune.report.collecting import board_facts

    out = Output(json_output)
    with out.step(f"probe {name}"), edgeprune.Board.open(name) as board:
        fingerprint = board.probe()
        power = board.power(meter=meter)
        address, root = board.transport.address, board.root
    out.table(
        f"{name} ({address})", ["property", "value"], [[key, value] for key, value in board_facts(fingerprint).items()]
    )
    energy = energy_sentence(power)
    if power.sensors:
        out.table(
            "power", ["sensor", "kind", "renewed every", "averages over"], [_sensor(one) for one in power.sensors]
        )
    out.say(energy)
    for sentence in fingerprint.absences:
        out.say(f"lacks: {sentence}")
    for sentence in fingerprint.disturbances:
        out.say(f"could disturb a measurement: {sentence}")
    out.finish(
        {
            "name": name,
            "address": address,
            "root": root,
            "fingerprint": asdict(fingerprint),
            "power": {
                "sensors": [asdict(sensor) for sensor in power.sensors],
                "absences": [asdict(absence) for absence in power.absences],
                "energy": energy,
            },
        },
        next_command=command_line("edgeprune", "doctor", "--board", name)
        if fingerprint.runtimes
        else command_line("edgeprune", "device", "setup", name),
    )


@device.command()
def remove(name: NameArgument, json_output: JsonOption = False, verbose: VerboseOption = False) -> None:
    """Remove a board from the configuration; nothing on the board itself changes."""
    from edgeprune.boards.config import BoardConfig

    out = Output(json_output)
    config = BoardConfig()
    entry = config.get(name)
    config.remove(name)
    out.wrote(config.path, f"without {name}")
    out.finish({"name": name, **_entry_json(entry)}, next_command="edgeprune device list")


def _sensor(sensor: PowerSensor) -> list[str]:
    times = ["not told" if value is None else f"{value * 1e3:g} ms" for value in (sensor.period_s, sensor.window_s)]
    return [sensor.name, sensor.kind, *times]


def _entry_json(entry: BoardEntry) -> dict[str, Any]:
    return dict(entry.model_dump())


def _type_json(spec: DeviceSpec) -> dict[str, Any]:
    return {
        "name": spec.name,
        "title": spec.title,
        "architecture": spec.architecture,
        "backends": list(spec.backends),
        "facts": dict(spec.facts),
        "sources": list(spec.sources),
    }


def _fact(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_fact(inner)}" for key, inner in value.items())
    if isinstance(value, list | tuple):
        return "; ".join(_fact(inner) for inner in value)
    return str(value)
