"""What a hint leaves open and the command line tells: which model with which inputs, which board, table and artifact."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup

from edgeprune.cli.console import command_line
from edgeprune.cli.options import input_flags
from edgeprune.errors import EdgepruneError

Given = dict[str, Any]
"""Parameters of a verb, by name."""


def filled(hint: str, words: Sequence[str]) -> str:
    """A hint with what the command line tells in place of its placeholders; those of which it tells nothing stay.

    Args:
        hint: What to try, with ``MODEL``, ``NAME`` or ``BOARD``, ``TABLE`` and ``ARTIFACT`` where commands have them.
        words: The command line, without the program's name.
    """
    wanted = [(pattern, told) for pattern, told in _OPEN if pattern.search(hint)]
    given = _given(words) if wanted else {}
    for pattern, told in wanted:
        if text := told(given):
            hint = pattern.sub(lambda found, text=text: f"{found[1]} {text}", hint)  # type: ignore[misc]  # a default
    return hint


def _given(words: Sequence[str]) -> Given:
    """What a command line says to its verb; nothing where it names none."""
    from edgeprune.cli.commands import root

    command, left = root(), list(words)
    while isinstance(command, TyperGroup):
        left = left[next((place for place, word in enumerate(left) if not word.startswith("-")), len(left)) :]
        if not left:
            return {}
        _, command, left = command.resolve_command(typer.Context(command, resilient_parsing=True), left)
    if command is None:
        return {}
    with command.make_context(command.name, left, resilient_parsing=True) as context:
        return {**context.params, "verb": command.name}


def _model(given: Given) -> str | None:
    """The one model, and its inputs: explaining it or measuring it takes both."""
    model = given.get("model")
    if models := given.get("models"):
        model = models[0] if len(models) == 1 else None
    if model is None:
        return None
    if Path(model).is_dir():
        return _model_of_run(Path(model))
    return command_line(model, *input_flags(given.get("input_"), given.get("inputs")))


def _model_of_run(folder: Path) -> str | None:
    """The model that a finished run pruned."""
    from edgeprune.cli.record import INPUTS_NAME, PruningRecord

    try:
        options = PruningRecord.load(folder).options
    except EdgepruneError:
        return None
    return command_line(options.model, *input_flags(None, folder / INPUTS_NAME))


def _board(given: Given) -> str | None:
    """The one board; what ``device add`` calls a board is none yet."""
    name = given.get("board") or (given.get("name") if given.get("verb") != "add" else None)
    return None if name in (None, "none") or given.get("to") else command_line(name)


def _path(name: str) -> Callable[[Given], str | None]:
    return lambda given: None if given.get(name) is None else command_line(given[name])


_OPEN: tuple[tuple[re.Pattern[str], Callable[[Given], str | None]], ...] = (
    (re.compile(r"\b(edgeprune (?:explain|profile|prune)) MODEL\b"), _model),
    (re.compile(r"(--board|\bdevice (?:setup|probe)) (?:NAME|BOARD)\b"), _board),
    (re.compile(r"(--table|\btable card) TABLE\b"), _path("table")),
    (re.compile(r"\b(edgeprune deploy) ARTIFACT\b"), _path("artifact")),
)
"""The placeholder behind each of some words, and where it is known from."""
