"""An external meter that hangs on this machine while a board runs: its readings, on the board's clock.

The reader is the one that follows a meter on a board (`edgeprune.boards.onboard.power_meter`), in a process of its own here. Two
machines have two clocks. The board tells of each window as soon as it has ended; the least that such a word comes later than its
end is how far the clocks are apart and the quickest way of the link: milliseconds too much, where windows last for seconds.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any

from edgeprune.boards.board import Board
from edgeprune.boards.local import LocalTransport
from edgeprune.boards.power import METER, BoardPower
from edgeprune.boards.runner_events import error_of, parse_event
from edgeprune.boards.runner_package import runner_package
from edgeprune.boards.storing import temporary
from edgeprune.errors import PowerUnavailableError

_FIRST_S, _PARTING_S = 20.0, 5.0


def look(command: str) -> BoardPower:
    """The meter as the only sensor that there is, or why it prints nothing.

    Args:
        command: Prints watts, one reading per line; see ``docs/power.md``.
    """
    with (
        tempfile.TemporaryDirectory(prefix="edgeprune-meter-") as root,
        Board(LocalTransport(), name="this machine", python=sys.executable, root=root) as here,
    ):
        found = here.power(meter=command)
    return BoardPower(
        tuple(sensor for sensor in found.sensors if sensor.source == METER),
        tuple(absence for absence in found.absences if absence.source == METER),
    )


class HostMeter:
    """Follows a meter of this machine for as long as a block lasts.

    Args:
        command: As of `look`.
        name: Of its sensor.

    Raises:
        PowerUnavailableError: It gives no reading.
    """

    def __init__(self, command: str, name: str) -> None:
        self.command, self.name = command, name
        self._late_s: list[float] = []
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> HostMeter:
        try:
            self._start()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def hear(self, board_s: float) -> None:
        """The board has just told what its clock said, seconds."""
        self._late_s.append(time.monotonic() - board_s)

    def readings(self) -> tuple[list[float], list[float]]:
        """Times on the board's clock, seconds, and milliwatts; none before the board was heard."""
        apart_s = min(self._late_s, default=None)
        told = [event for event in self._events() if event["event"] == "power" and self.name in event["values"]]
        if apart_s is None:
            return [], []
        return [event["t_s"] - apart_s for event in told], [event["values"][self.name] for event in told]

    def _start(self) -> None:
        runner = self._stack.enter_context(temporary(runner_package().content))
        self._said = self._stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115 - the stack closes it
        request = {"action": "sample", "names": [self.name], "meter": self.command, "root": str(runner.parent)}
        self._child = subprocess.Popen(
            [sys.executable, str(runner), "power"],
            stdin=subprocess.PIPE,
            stdout=self._said,
            stderr=subprocess.DEVNULL,
        )
        self._stack.callback(self._end)
        assert self._child.stdin is not None
        self._child.stdin.write(json.dumps(request).encode("ascii") + b"\n")
        self._child.stdin.flush()
        until_s = time.monotonic() + _FIRST_S
        while not any(event["event"] == "power" for event in self._events()):
            if self._child.poll() is not None or time.monotonic() > until_s:
                failed = next((event for event in self._events() if event["event"] == "error"), None)
                if failed is not None:
                    raise error_of(failed)
                raise PowerUnavailableError(
                    f"the meter's command must give a reading within {_FIRST_S:.0f} s, found none.",
                    hint="docs/power.md says what it must print",
                )
            time.sleep(0.02)

    def _end(self) -> None:
        assert self._child.stdin is not None
        # It ends the meter's command when its input ends; only one that hangs is killed.
        self._child.stdin.close()
        try:
            self._child.wait(_PARTING_S)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()

    def _events(self) -> Iterator[dict[str, Any]]:
        """What it has said so far, whole lines alone."""
        content = os.pread(self._said.fileno(), os.fstat(self._said.fileno()).st_size, 0)
        for line in content[: content.rfind(b"\n") + 1].decode("utf-8", "replace").splitlines():
            event = parse_event(line)
            if event is not None:
                yield event
