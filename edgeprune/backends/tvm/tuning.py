"""Tuning: what is asked for, and the process that does it.

The search runs in a process of ours that imports nothing of the user's, so a script without a ``__main__`` guard is run once,
and a crash in the compiler is an error like others. What was measured is kept by the database as it comes: an interrupted
tuning goes on with it.
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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgeprune.backends.tvm import tuning_database
from edgeprune.backends.tvm.candidate_timing import environment_of_children
from edgeprune.backends.tvm.target import TvmTarget
from edgeprune.boards.host import host_cpu_model
from edgeprune.errors import CompileError, ConfigError

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

    Raises:
        ConfigError: There is no time, or there are no trials.
    """

    seconds: float
    trials: int | None = None
    seed: int = 0
    progress: Progress | None = None
    told: Callable[[str], None] | None = None

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
            hint="edgeprune compile --tune on the board itself, or without --tune",
        )
    if target.model == "unknown":
        raise CompileError(
            "tuning keeps what it finds by the processor's name, which is not known here.", hint="--board local"
        )


def tune(functions: Sequence[tuple[str, int]], target: TvmTarget, tuning: Tuning) -> Tuned:
    """Search schedules for functions; the database keeps what it finds.

    Args:
        functions: JSON of each function's module (`workloads.normalized`), and its calls in one inference.
        target: This host.
        tuning: What it may take.

    Raises:
        CompileError: The target is not this host, another tuning for it is running, or the search has failed.
    """
    require_here(target)
    request = {
        "target": target.llvm,
        "isa": list(target.isa),
        "folder": str(tuning_database.folder_of(target)),
        "identity": tuning_database.identity_of(target),
        "functions": list(functions),
        "seconds": tuning.seconds,
        "trials": tuning.trials,
        "seed": tuning.seed,
        "processes": max(1, min(_MOST_PROCESSES, len(os.sched_getaffinity(0)))),
    }
    last: dict[str, Any] = {}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, "-c", "from edgeprune.backends.tvm.searching import main; main()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment_of_children(),
            # Ctrl-C is for this process: it ends the others.
            start_new_session=True,
        )
        late = threading.Timer(tuning.seconds + _GRACE_S, _ended, [process])
        late.daemon = True
        try:
            late.start()
            assert process.stdin is not None
            assert process.stdout is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(json.dumps(request) + "\n")
                process.stdin.close()
            for line in process.stdout:
                last = json.loads(line)
                if last["event"] == "progress" and tuning.progress is not None:
                    tuning.progress(last["done"], last["total"], last["left_s"], last["message"])
            process.wait()
        finally:
            late.cancel()
            _ended(process)
        log.seek(max(0, log.seek(0, os.SEEK_END) - _LOG_TAIL))
        tail = log.read().decode(errors="replace")
    return _outcome(last, process.returncode, tail)


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
