"""How verbs speak: text for people, or exactly one JSON object; errors are always one line on standard error."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

PLAIN_EVERY_S = 30.0
"""Where there is no terminal, a long step says this often how far it is, seconds."""

_state: dict[str, str | None] = {"step": None}


_reserved: dict[str, int] = {}


def reserve_stdout() -> None:
    """Keep standard output for the one JSON object: whatever else is printed goes to standard error.

    That holds for native libraries and child processes too, which know descriptor 1 and not `sys.stdout`.
    """
    sys.stdout = sys.stderr
    with suppress(OSError):  # closed by whoever started us
        _reserved["descriptor"] = os.dup(1)
        os.dup2(2, 1)


def current_step() -> str | None:
    """What is being done right now, for the line that Ctrl-C leaves."""
    return _state["step"]


def report_error(
    kind: str, message: str, *, hint: str | None, exit_code: int, json_mode: bool, prefix: str = "error: "
) -> None:
    """Write an error: one line on standard error, and with ``--json`` one object on standard output too."""
    # Where a message ends in what another library said, its full stop may be missing.
    whole = message if message.rstrip().endswith((".", "?", "!")) else f"{message.rstrip()}."
    line = message if hint is None else f"{whole} Try: {hint}"
    sys.stderr.write(f"{prefix}{' '.join(line.split())}\n")
    sys.stderr.flush()
    if json_mode:
        print_json({"error": kind, "message": " ".join(message.split()), "hint": hint, "exit_code": exit_code})


def print_json(data: Mapping[str, Any]) -> None:
    """Write one JSON object to the real standard output; what JSON has no number for (NaN, infinity) becomes null."""
    finite = json.loads(json.dumps(data, default=_plain), parse_constant=lambda _: None)
    text = json.dumps(finite, indent=2, allow_nan=False) + "\n"
    if "descriptor" in _reserved:
        with open(_reserved["descriptor"], "w", encoding="utf-8", closefd=False) as stream:
            stream.write(text)
    else:
        sys.stdout.write(text)
        sys.stdout.flush()


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, set | frozenset):
        return sorted(value)
    if hasattr(value, "tolist"):  # NumPy scalars and arrays
        return value.tolist()
    raise TypeError(f"cannot write a {type(value).__name__} as JSON")


def command_line(*words: object) -> str:
    """A command that can be pasted into a shell."""
    return shlex.join(str(word) for word in words)


class Progress:
    """What the library tells while a step runs: a bar with the time left on a terminal, a plain line now and then elsewhere.

    Args:
        text: The step.
        bar: Of rich, on a terminal.
        say: Writes a line of its own; None is silent.
        clock: Seconds.
    """

    def __init__(
        self,
        text: str,
        bar: Any = None,
        say: Callable[[str], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._text, self._bar, self._say, self._clock = text, bar, say, clock
        self._task = None if bar is None else bar.add_task(text, total=None, left="")
        self._begun_s = self._said_s = clock()
        self._share = 0.0

    def said(self, text: str) -> None:
        """A sentence that stays."""
        if self._say is not None:
            self._say(text)

    def timed(self, done: int, total: int, left_s: float, message: str) -> None:
        """Items done, items in all (0 and 0 where nothing is counted), seconds left (0 where that is unknown), what happens.

        Items may come in stages that count anew, or end before all are done: the share is that of the time, since anything
        else was told of, and never falls.
        """
        passed_s = self._clock() - self._begun_s
        if left_s > 0:
            self._share = max(self._share, min(passed_s / (passed_s + left_s), 0.99))
        minutes, seconds = divmod(max(0, round(left_s)), 60)
        told = f"{message} ({done} of {total})" if total else message
        left = f"about {minutes}:{seconds:02d} left" if total and left_s > 0 else ""
        self._write(told, round(1000 * self._share), 1000, left)

    def share(self, done: int, total: int) -> None:
        """Units done (steps, bytes) and units in all."""
        self._show(None, done, total)

    def staged(self, state: str, done: int, total: int, message: str) -> None:
        """State, units done and in all (0 and 0 where nothing is counted), what happens."""
        self._show(message or state, done, total)

    def stepped(self, step: str, done: int, total: int) -> None:
        """What is being done, units done and in all."""
        self._show(step, done, total)

    def told(self, step: str, message: str) -> None:
        """A step of unknown length and what happens in it."""
        self._show(message or step, None, None)

    def _show(self, message: str | None, done: int | None, total: int | None) -> None:
        """What is not timed; time is counted anew after it."""
        self._begun_s, self._share = self._clock(), 0.0
        self._write(message, done, total)

    def _write(self, message: str | None, done: int | None, total: int | None, left: str = "") -> None:
        label = f"{self._text}: {message}" if message else self._text
        if self._bar is not None:
            changed: dict[str, Any] = {} if message is None else {"description": label}
            counts = {} if total is None else {"completed": done, "total": total or None}
            self._bar.update(self._task, left=left, **changed, **counts)
        elif self._say is not None and self._clock() - self._said_s >= PLAIN_EVERY_S:
            self._said_s = self._clock()
            share = f"{done / total:.0%}" if done is not None and total else ""
            self._say("  " + ", ".join(part for part in (label, share, left) if part))


class Output:
    """One verb's voice.

    Args:
        json_mode: Silence everything but the JSON object of `finish`.
    """

    def __init__(self, json_mode: bool = False) -> None:
        self.json_mode = json_mode
        self._files: list[dict[str, str]] = []

    @property
    def _console(self) -> Console:
        from rich.console import Console

        console = Console(highlight=False, markup=False, soft_wrap=True, emoji=False)
        if not console.is_terminal:
            console.width = 140  # a file or a pipe: tables must not be cut at 80 columns
        return console

    def say(self, text: str = "") -> None:
        """A line for people."""
        if not self.json_mode:
            self._console.print(text)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """A table for people; cells that are numbers stand to the right."""
        if self.json_mode:
            return
        from rich import box
        from rich.table import Table

        table = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for index, column in enumerate(columns):
            numeric = bool(rows) and all(_numeric(row[index]) for row in rows)
            table.add_column(column, justify="right" if numeric else "left", overflow="fold")
        for row in rows:
            table.add_row(*(str(cell) for cell in row))
        self._console.print(table, soft_wrap=False)

    def wrote(self, path: Path, what: str) -> None:
        """Tell of a file or folder that was written."""
        self._files.append({"path": str(path), "what": what})
        self.say(f"wrote {path} ({what})")

    @contextmanager
    def step(self, text: str) -> Iterator[Progress]:
        """A step that takes time: a bar with the time left on a terminal; elsewhere a line as it begins, and now and then."""
        _state["step"] = text
        if self.json_mode:
            yield Progress(text)
        elif not sys.stderr.isatty():
            self.say(text)
            yield Progress(text, say=self.say)
        else:
            from rich.console import Console
            from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Bar

            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=30),
                TaskProgressColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[left]}", markup=False),
            )
            with Bar(*columns, console=Console(stderr=True, highlight=False), transient=True) as bar:
                yield Progress(text, bar, say=lambda line: bar.console.print(line, markup=False))
            self.say(text)
        _state["step"] = None

    def finish(self, data: Mapping[str, Any], *, next_command: str | None = None) -> None:
        """End the verb: the JSON object, or the next command for people."""
        if self.json_mode:
            print_json({**data, "files": self._files, "next": next_command})
        elif next_command is not None:
            self.say(f"next: {next_command}")


def _numeric(cell: object) -> bool:
    text = str(cell).strip().rstrip("%").replace(",", "")
    if text in ("", "-"):
        return True
    try:
        float(text)
    except ValueError:
        return False
    return True
