"""``edgeprune deploy --to``: many boards in waves, a live table of them, and a report that grows with each."""

from __future__ import annotations

import json
import logging
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from edgeprune.cli.console import Output, command_line
from edgeprune.cli.deploy import RECORD_HOLDS, keep_record
from edgeprune.files import write_text

if TYPE_CHECKING:
    from edgeprune.deployment.artifact import Artifact
    from edgeprune.deployment.fleet import Outcome

SUFFIX = ".fleet.json"

_log = logging.getLogger("edgeprune.cli.fleet")


def deploy_to_fleet(
    artifact: Artifact,
    to: Sequence[str],
    output: Output,
    options: Mapping[str, Any],
    facts: Mapping[str, Any],
    *,
    canary: int,
    max_failures: int,
    at_once: int,
) -> None:
    """Deploy to every board that is meant, and end the verb with the gravest of their exit codes.

    Args:
        artifact: What is deployed.
        to: As the user wrote it, see `edgeprune.boards.config.BoardConfig.members`.
        output: The verb's voice.
        options: Of `edgeprune.deploy`.
        facts: Kept in every board's record.
        canary: See `edgeprune.deployment.fleet.deploy_to`, as the next two.
        max_failures: Failed boards that end it.
        at_once: Boards at the same time.
    """
    from edgeprune.boards.config import BoardConfig
    from edgeprune.deployment.fleet import deploy_to

    boards = BoardConfig().members(to)
    path = artifact.folder.absolute().with_name(artifact.folder.absolute().name + SUFFIX)
    known: dict[str, dict[str, Any]] = {board: {"board": board, "state": "not tried"} for board in boards}
    records: list[Path] = []
    table = _Table(boards)

    def on_outcome(outcome: Outcome) -> None:
        known[outcome.board] = asdict(outcome)
        # At once: an interrupt must not take with it what was measured on the boards before.
        if outcome.deployment is not None:
            record = keep_record(artifact.folder, outcome.deployment, facts)[1]
            records.extend([] if record is None else [record])
        table.ended(outcome)
        if not table.live:
            output.say(f"{outcome.board}: {outcome.state}" + (f" ({outcome.message})" if outcome.message else ""))
        _keep(path, {"artifact": artifact.id, "release": artifact.release, "boards": known})

    with output.step(f"deploy to {len(boards)} boards") if not table.wanted(output) else table.shown():
        report = deploy_to(
            artifact,
            boards,
            canary=canary,
            max_failures=max_failures,
            at_once=at_once,
            progress=table.staged,
            on_outcome=on_outcome,
            **options,
        )
    for record in records:
        output.wrote(record, RECORD_HOLDS)
    rows = [[outcome.board, outcome.state, f"{outcome.seconds:.0f}", _found(outcome)] for outcome in report.outcomes]
    output.table("", ["board", "state", "seconds", "found"], rows)
    if report.stopped is not None:
        output.say(f"went no further: {report.stopped}")
    if path.exists():
        output.wrote(path, "what became of each board")
    failed = [outcome.board for outcome in report.outcomes if outcome.failure]
    following = command_line("edgeprune", "status", "--board", (failed or boards)[0])
    if report.exit_code and not failed:  # only boards that are away are left
        following = command_line("edgeprune", *sys.argv[1:])
    output.finish(
        {
            "artifact": report.artifact,
            "release": report.release,
            "stopped": report.stopped,
            "boards": [known[board] for board in boards],
            "exit_code": report.exit_code,
        },
        next_command=following,
    )
    if report.exit_code:
        raise typer.Exit(report.exit_code)


def _keep(path: Path, data: Mapping[str, Any]) -> None:
    try:
        write_text(path, json.dumps(data, indent=2, default=str) + "\n")
    except OSError as error:  # the boards run what they run all the same
        _log.warning("what became of the boards could not be kept in %s: %s", path, error.strerror)


def _found(outcome: Outcome) -> str:
    done = outcome.deployment
    if done is not None:
        timed = "not timed (emulated)" if done.measured_ms is None else f"{done.measured_ms:.3f} ms"
        found = f"{timed}, largest difference {done.parity.max_abs:.2g}"
        return " ".join((found, *(f"Mind: {note}" for note in done.notes)))
    return " ".join(part for part in (outcome.message, outcome.hint and f"Try: {outcome.hint}") if part)


class _Table:
    """What each board is at, for a terminal.

    Args:
        boards: All of them.
    """

    def __init__(self, boards: Sequence[str]) -> None:
        self._rows = dict.fromkeys(boards, ("waiting", ""))
        self._lock = threading.Lock()
        self.live = False

    def wanted(self, output: Output) -> bool:
        """Whether there is a terminal to draw on."""
        return not output.json_mode and sys.stderr.isatty()

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Draw it as long as the block lasts; what draws it asks for the rows four times a second."""
        from rich.console import Console
        from rich.live import Live

        self.live = True
        console = Console(stderr=True, highlight=False)
        with Live(console=console, get_renderable=self._drawn, refresh_per_second=4, transient=True):
            yield

    def staged(self, board: str, state: str, done: int, total: int, message: str) -> None:
        """Of a board that is being deployed to; from any thread."""
        share = f" {done / total:.0%}" if total else ""
        with self._lock:
            self._rows[board] = (state, message + share)

    def ended(self, outcome: Outcome) -> None:
        """Of a board that is through."""
        with self._lock:
            self._rows[outcome.board] = (outcome.state, _found(outcome))

    def _drawn(self) -> Any:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for column in ("board", "state", ""):
            table.add_column(column, overflow="fold")
        with self._lock:
            rows = [(board, *cells) for board, cells in self._rows.items()]
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        return table
