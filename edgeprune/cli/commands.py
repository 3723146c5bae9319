"""The table of verbs. A verb's module is imported when the verb is called, so that ``edgeprune --help`` stays quick."""

from __future__ import annotations

from importlib import import_module
from typing import Annotated, Any, NamedTuple

import typer
from typer.core import TyperCommand, TyperGroup


class Verb(NamedTuple):
    """One row of the table: where the verb is, and the line that ``edgeprune --help`` shows for it."""

    target: str
    help: str
    panel: str


_START, _STEPS, _BOARDS, _LOOK = "Start", "Steps, in order", "Boards", "Look"

VERBS: dict[str, Verb] = {
    "quickstart": Verb(
        "edgeprune.cli.quickstart:quickstart", "The whole way on an embedded model and data set, in minutes.", _START
    ),
    "doctor": Verb("edgeprune.cli.doctor:doctor", "Say what this machine and a board lack, and what mends it.", _START),
    "profile": Verb("edgeprune.cli.profile:profile", "Measure a model's kernels on a board: latency table.", _STEPS),
    "fit": Verb("edgeprune.cli.fit:fit", "Fit the latency predictor to a table and show its errors.", _STEPS),
    "prune": Verb("edgeprune.cli.prune:prune", "Prune a model to a latency budget.", _STEPS),
    "compile": Verb("edgeprune.cli.compile:compile", "Compile a model to an artifact for boards.", _STEPS),
    "deploy": Verb("edgeprune.cli.deploy:deploy", "Check an artifact on a board, then switch to it.", _STEPS),
    "report": Verb("edgeprune.cli.report:report", "Write one HTML file about a pruning run.", _STEPS),
    "device": Verb("edgeprune.cli.device:device", "Add, list, show, probe, set up, clean and remove boards.", _BOARDS),
    "status": Verb("edgeprune.cli.status:status", "Say which release a board runs.", _BOARDS),
    "verify": Verb("edgeprune.cli.verify:verify", "Say whether a board still holds what was deployed.", _BOARDS),
    "clean": Verb("edgeprune.cli.clean:clean", "Remove old releases, and what nothing needs.", _BOARDS),
    "rollback": Verb("edgeprune.cli.rollback:rollback", "Switch a board back to its former release.", _BOARDS),
    "layers": Verb("edgeprune.cli.layers:layers", "Say what each kernel of an artifact takes on a board.", _LOOK),
    "table": Verb("edgeprune.cli.table:table", "Import, check, compare, merge and describe latency tables.", _LOOK),
    "explain": Verb("edgeprune.cli.explain:explain", "Say what of a model can be pruned, and why not the rest.", _LOOK),
}


def _command(name: str) -> Any:
    verb = VERBS[name]
    module, _, attribute = verb.target.partition(":")
    target = getattr(import_module(module), attribute)
    if not isinstance(target, typer.Typer):
        function, target = target, typer.Typer(add_completion=False)
        target.command(name)(function)
    command = typer.main.get_command(target)
    command.name = name
    return command


class LazyGroup(TyperGroup):
    """Shows the table's lines as help, and imports a verb only when the command line names it."""

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        for name, verb in VERBS.items():
            self.commands[name] = TyperCommand(name, help=verb.help, rich_help_panel=verb.panel)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] in VERBS:
            self.commands[args[0]] = _command(args[0])
        return super().resolve_command(ctx, args)


def _print_version(wanted: bool) -> None:
    if wanted:
        import edgeprune

        typer.echo(f"edgeprune {edgeprune.__version__}")
        raise typer.Exit


def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Profile a board once, prune against a latency budget, deploy the compiled engine.

    Start with [bold]edgeprune quickstart[/bold]. A model is given as [italic]package.module:factory[/italic] or
    [italic]file.py:factory[/italic], a board as [italic]local[/italic], a name from
    [italic]edgeprune device list[/italic], or [italic]ssh://user@host:port[/italic].
    """


def root() -> Any:
    """The top command, ready for ``main(args)``."""
    app = typer.Typer(cls=LazyGroup, add_completion=False, no_args_is_help=True, rich_markup_mode="rich")
    app.callback()(_options)
    return typer.main.get_command(app)
