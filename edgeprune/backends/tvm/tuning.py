"""Tuning: what is asked for, and the process that does it.

The search runs in a process of ours that imports nothing of the user's, so a script without a ``__main__`` guard is run once,
and a crash in the compiler is an error like others. What was measured is kept by the database as it comes: an interrupted
tuning goes on with it. Candidates are timed on this machine, by that process, or on a board: then it asks this one, which has the
link and waits where that is lost.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.backends.tvm import tuning_database
from edgeprune.backends.tvm.board_timing import BoardTiming
from edgeprune.backends.tvm.candidate_timing import environment_of_children
from edgeprune.backends.tvm.target import TvmTarget
from edgeprune.boards.host import host_cpu_model
from edgeprune.errors import CompileError, ConfigError

if TYPE_CHECKING:
    from edgeprune.boards.board import Board

Progress = Callable[[int, int, float, str], None]
"""Told (trials done, trials in all or 0, seconds left, what happens)."""

_UNITS = {"s": 1.0, "min": 60.0, "h": 3600.0}
_DURATION = re.compile(r"\s*(\d*\.?\d+)\s*(s|min|h)\s*")
_GRACE_S = 180.0
"""The process starts, and ends the trials that it has begun, beyond the time that was asked for."""
_MOST_PROCESSES = 8
_LOG_TAIL = 2000


@dataclass(frozen=True)
class Tuning:
    """What a tuning may take, and what it is told to.

    Args:
        seconds: Time for the search; starting and compiling come on top.
        trials: Candidates to build and time, of all functions together; None is as many as there is time for.
        seed: Of everything random. What a candidate takes is measured, so two tunings differ all the same.
        progress: Told how far it is.
        told: Told what it has brought, a sentence at a time.
        board: Open, where candidates are timed; None is this machine.

    Raises:
        ConfigError: There is no time, or there are no trials.
    """

    seconds: float
    trials: int | None = None
    seed: int = 0
    progress: Progress | None = None
    told: Callable[[str], None] | None = None
    board: Board | None = None

    def __post_init__(self) -> None:
        if not self.seconds > 0:
            raise ConfigError(f"the time for tuning must be positive, found {self.seconds:g} s.", hint="--tune 10min")
        if self.trials is not None and self.trials < 1:
            raise ConfigError(f"at least one trial must be allowed, found {self.trials}.", hint="--tune-trials 200")


@dataclass(frozen=True)
class Tuned:
    """What a tuning has brought.

    Attributes:
        functions: That could be tuned.
        known: Of them, those that the database knew before.
        started: Of the others, those that began with the schedules of similar widths.
        trials: Candidates that were built and timed, or failed to be.
        seconds: What the search took.
        rule_ms: What the functions of one inference take with the rule's schedules, added up, milliseconds.
        best_ms: The same with the best schedules that are known now.
        curve: (trials, milliseconds) after each round, of the same sum.
    """

    functions: int
    known: int
    started: int
    trials: int
    seconds: float
    rule_ms: float
    best_ms: float
    curve: tuple[tuple[int, float], ...]

    def __str__(self) -> str:
        return (
            f"tuned for {self.seconds:.0f} s, {self.trials} trials: {self.functions} functions, {self.known} of them known "
            f"before, {self.started} begun with schedules of similar widths; added up they take {self.best_ms:.3g} ms, "
            f"{self.rule_ms:.3g} ms by rule"
        )


def parse_duration(text: str) -> float:
    """Seconds of ``"90s"``, ``"10min"`` or ``"1.5h"``.

    Raises:
        ConfigError: It is no time.
    """
    found = _DURATION.fullmatch(text)
    if found is None:
        raise ConfigError(f"a time must be a number with s, min or h, found {text!r}.", hint="--tune 10min")
    return float(found.group(1)) * _UNITS[found.group(2)]


def require_here(target: TvmTarget) -> None:
    """Refuse to time for another processor than this machine's.

    Raises:
        CompileError: Candidates cannot be timed here, or the processor is not known by name.
    """
    if not target.runs_here or target.model not in (host_cpu_model(), "unknown"):
        raise CompileError(
            f"tuning times candidates on this machine, whose processor must be the board's, found a board with "
            f"{target.architecture}, {target.model}.",
            hint="edgeprune compile --tune --board NAME, which times on that board, or without --tune",
        )
    if target.model == "unknown":
        raise CompileError(
            "tuning keeps what it finds by the processor's name, which is not known here.", hint="--board local"
        )


def require_known(target: TvmTarget, board: Board) -> None:
    """Refuse to tune for a board whose processor has no name to keep the schedules by.

    Raises:
        CompileError: It has none.
    """
    if target.model == "unknown":
        raise CompileError(
            f"tuning keeps what it finds by the processor's name, which board {board.name} does not tell.",
            hint="compile without --tune",
        )


def tune(functions: Sequence[tuple[str, int]], target: TvmTarget, tuning: Tuning) -> Tuned:
    """Search schedules for functions; the database keeps what it finds.

    Args:
        functions: JSON of each function's module (`workloads.normalized`), and its calls in one inference.
        target: This host, or the tuning's board.
        tuning: What it may take.

    Raises:
        CompileError: The target is not this host and there is no board, another tuning for it is running, or the search has
            failed.
        RemoteError: The board is busy, or was lost and did not come back in time; what was measured is kept.
        BackendUnavailableError: The board has no TVM.
    """
    board = tuning.board
    if board is None:
        require_here(target)
    else:
        require_known(target, board)
    request: dict[str, Any] = {
        "target": target.llvm,
        "isa": list(target.isa),
        "folder": str(tuning_database.folder_of(target)),
        "identity": tuning_database.identity_of(target),
        "functions": list(functions),
        "seconds": tuning.seconds,
        "trials": tuning.trials,
        "seed": tuning.seed,
        "processes": max(1, min(_MOST_PROCESSES, len(os.sched_getaffinity(0)))),
        "where": "this machine" if board is None else f"board {board.name}",
        "linker": None if board is None else target.linker(),
        "engines": None,
    }
    last: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="edgeprune-"))
        log = stack.enter_context(tempfile.TemporaryFile())
        timing: BoardTiming | None = None
        if board is not None:
            stack.enter_context(board.hold("tune"))
            timing = stack.enter_context(BoardTiming(board, _waiting(tuning, last), tuning.told))
            request["engines"] = scratch
        process = subprocess.Popen(
            [sys.executable, "-c", "from edgeprune.backends.tvm.searching import main; main()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            # What a process that is ended has half built goes with the folder.
            env={**environment_of_children(), "TMPDIR": scratch},
            # Ctrl-C is for this process: it ends the others.
            start_new_session=True,
        )
        late = _Deadline(tuning.seconds + _GRACE_S, process)
        try:
            late.go_on()
            assert process.stdout is not None
            _say(process, request)
            for line in process.stdout:
                event = json.loads(line)
                if event["event"] == "time" and timing is not None:
                    # What the board takes is bounded by itself, and what it is waited for is not the search's.
                    late.pause()
                    before_s = timing.waited_s
                    times = timing.seconds([Path(engine) for engine in event["engines"]])
                    late.go_on()
                    _say(process, {"seconds": times, "waited_s": timing.waited_s - before_s})
                    continue
                last.clear()
                last.update(event)
                if event["event"] == "progress" and tuning.progress is not None:
                    tuning.progress(event["done"], event["total"], event["left_s"], event["message"])
            process.wait()
        finally:
            late.pause()
            _ended(process)
            for stream in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):
                    if stream is not None:
                        stream.close()
        log.seek(max(0, log.seek(0, os.SEEK_END) - _LOG_TAIL))
        tail = log.read().decode(errors="replace")
    return _outcome(last, process.returncode, tail)


class _Deadline:
    """Ends a process that takes longer than it may; while it waits for this one, its time stands still."""

    def __init__(self, seconds: float, process: subprocess.Popen[str]) -> None:
        self._left_s, self._process = seconds, process
        self._timer: threading.Timer | None = None
        self._since = 0.0

    def go_on(self) -> None:
        """Count."""
        self._since = time.monotonic()
        self._timer = threading.Timer(self._left_s, _ended, [self._process])
        self._timer.daemon = True
        self._timer.start()

    def pause(self) -> None:
        """Count no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._left_s = max(0.0, self._left_s - (time.monotonic() - self._since))
            self._timer = None


def _waiting(tuning: Tuning, last: Mapping[str, Any]) -> Callable[[float], None]:
    """Tells that a board is waited for, beside how far the search is."""

    def tell(left_s: float) -> None:
        if tuning.progress is not None:
            message = f"the link is lost, waiting for the board for up to {left_s:.0f} s"
            tuning.progress(last.get("done", 0), last.get("total", 0), last.get("left_s", left_s), message)

    return tell


def _say(process: subprocess.Popen[str], what: Mapping[str, Any]) -> None:
    """Tell the process something; one that has ended says so by itself."""
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(json.dumps(what) + "\n")
        process.stdin.flush()


def _ended(process: subprocess.Popen[str]) -> None:
    """End a process and those that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _outcome(last: Mapping[str, Any], code: int | None, tail: str) -> Tuned:
    event = last.get("event")
    if event == "error":
        raise CompileError(str(last["message"]), hint=last["hint"])
    if event != "tuned":
        said = " ".join(tail.split())[-300:].rstrip(".") or f"exit code {code}"
        raise CompileError(
            f"the search for schedules must end by itself, found that it ended early: {said}.",
            hint="the same command: it goes on with what was measured",
        )
    return Tuned(
        **{name: last[name] for name in ("functions", "known", "started", "trials", "seconds", "rule_ms", "best_ms")},
        curve=tuple((int(trials), float(ms)) for trials, ms in last["curve"]),
    )
