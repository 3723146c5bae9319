"""What tuning has measured, kept per processor on this machine.

A database is a folder with two files of JSON lines, in the format of TVM's own ``JSONDatabase``: functions, and what their
schedules took, each with the line number of its function. Lines are only ever added, so the files are also the journal of a
tuning: what ends it, even a lost power supply, costs the line that was being written at most. Nothing here needs TVM, and
nothing is unpickled: a function is the text of a JSON graph, a schedule the list of its instructions.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from edgeprune.backends.tvm.target import SERIES, TvmTarget
from edgeprune.boards import state_folder
from edgeprune.errors import CompileError
from edgeprune.files import replacing, write_text

WORKLOADS, RECORDS = "workloads.jsonl", "records.jsonl"
IDENTITY = "identity.json"
_LOCK = "lock"
_FORMAT = 1
_UNKNOWN = "unknown"

_log = logging.getLogger("edgeprune.backends.tvm")


@dataclass(frozen=True)
class Record:
    """One schedule of a function and what it took.

    Attributes:
        workload: Line number of the function.
        trace: The schedule's instructions and decisions, as TVM's ``Trace.as_json``.
        seconds: What the function took, median of several runs; None where it could not be built or run.
    """

    workload: int
    trace: Any
    seconds: float | None

    @property
    def searched(self) -> bool:
        """Whether the schedule was found by search: those make choices, the rule's makes none."""
        return any(str(instruction[0]).startswith("Sample") for instruction in self.trace[0])


class TuningDatabase:
    """The functions and records of one processor.

    Attributes:
        workloads: TVM's JSON of each function.
        records: In the order in which they were measured.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writable = False
        workloads, records = _lines(folder / WORKLOADS), _lines(folder / RECORDS)
        self.workloads: list[Any] = [entry for entry in workloads if isinstance(entry, list) and len(entry) == 2]
        # Records name functions by line: behind a line that is not understood nothing can be trusted.
        self.damaged = len(self.workloads) != len(workloads)
        if self.damaged:
            self.workloads = []
        found = [_record(entry, len(self.workloads)) for entry in records]
        self.records: list[Record] = [record for record in found if record is not None]

    def add_workload(self, entry: Any) -> int:
        """Keep a function; returns its line number."""
        self._append(WORKLOADS, entry)
        self.workloads.append(entry)
        return len(self.workloads) - 1

    def add_record(self, record: Record) -> None:
        """Keep what a schedule took."""
        # TVM's fields: trace, seconds of each run, target, arguments. The target is that of the folder.
        times = None if record.seconds is None else [record.seconds]
        self._append(RECORDS, [record.workload, [record.trace, times, None, None]])
        self.records.append(record)

    def best(self, workload: int, count: int = 1) -> list[Record]:
        """The quickest schedules of a function, best first; those that failed are left out."""
        ran = [record for record in self.records if record.workload == workload and record.seconds is not None]
        return sorted(ran, key=lambda record: record.seconds or 0.0)[:count]

    def trials(self, workload: int) -> int:
        """How many schedules of a function were tried."""
        return sum(record.workload == workload for record in self.records)

    def _append(self, name: str, entry: Any) -> None:
        if not self._writable:
            raise ValueError("a database is written to within `writing`")
        with (self._folder / name).open("a", encoding="ascii") as file:
            file.write(json.dumps(entry, separators=(",", ":"), ensure_ascii=True, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())


@contextlib.contextmanager
def writing(folder: Path, identity: dict[str, Any]) -> Iterator[TuningDatabase]:
    """The database of a folder, to add to; made where there is none, and mended where a line was cut off.

    Raises:
        CompileError: Another process tunes with it.
        OSError: The folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CompileError(
                f"one process at a time can tune for {identity['cpu_model']}, found another that does.",
                hint="the same command when it has ended",
            ) from error
        if _identity_in(folder) != identity:
            # What lies here is of another processor, or of no one knows which.
            for name in (WORKLOADS, RECORDS):
                (folder / name).unlink(missing_ok=True)
            write_text(folder / IDENTITY, json.dumps(identity, indent=1, sort_keys=True) + "\n")
        database = TuningDatabase(folder)
        if database.damaged:
            _log.warning("the tuning database in %s is damaged: it is begun anew", folder)
            (folder / RECORDS).unlink(missing_ok=True)
        count = len(database.workloads)
        _mended(folder / WORKLOADS, lambda number, entry: number < count)
        # Records of a function that was cut off would be of the next one that takes its line.
        _mended(folder / RECORDS, lambda number, entry: _record(entry, count) is not None)
        database._writable = True
        yield database


def identity_of(target: TvmTarget) -> dict[str, Any]:
    """What must be equal for schedules to be worth the same: TVM's series, and the processor with the switches of its code."""
    return {
        "format": _FORMAT,
        "series": SERIES,
        "architecture": target.architecture,
        "cpu_model": target.model,
        "target": {key: value for key, value in target.llvm.items() if key != "mtriple"},
    }


def root() -> Path:
    """Where the databases of all processors lie."""
    return state_folder.folder() / "tvm-tuning"


def folder_of(target: TvmTarget) -> Path:
    """Where the database of a target lies, whether there is one or not."""
    identity = identity_of(target)
    readable = re.sub(r"[^A-Za-z0-9]+", "-", target.model).strip("-")[:40]
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    return root() / f"{readable}-{digest}"


def found(target: TvmTarget) -> TuningDatabase | None:
    """The database of a target, to read; None, and a notice where there are only those of other processors."""
    if target.model == _UNKNOWN:
        return None
    folder = folder_of(target)
    if _identity_in(folder) == identity_of(target):
        database = TuningDatabase(folder)
        if database.records:
            return database
    others = sorted(
        {
            str(identity["cpu_model"])
            for one in (root().iterdir() if root().is_dir() else ())
            if (identity := _identity_in(one)) is not None
            and (identity.get("architecture"), identity.get("series")) == _kind(target)
            and identity.get("cpu_model") != target.model
            and (one / RECORDS).exists()
        }
    )
    if others:
        _log.warning(
            "a tuning database of another processor is not used, since its schedules were timed there: this is for %s, found %s; "
            "--tune makes one for it",
            target.model,
            ", ".join(others),
        )
    return None


def _kind(target: TvmTarget) -> tuple[str, str]:
    identity = identity_of(target)
    return identity["architecture"], identity["series"]


def _identity_in(folder: Path) -> dict[str, Any] | None:
    try:
        told = json.loads((folder / IDENTITY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return told if isinstance(told, dict) and "cpu_model" in told else None


def _lines(path: Path) -> list[Any]:
    """The entries of a file of JSON lines; a last line that was cut off is not there, one within is None."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    entries: list[Any] = []
    for line in text.split("\n")[:-1]:
        try:
            entries.append(json.loads(line))
        except ValueError:
            entries.append(None)
    return entries


def _record(entry: Any, workloads: int) -> Record | None:
    """A line of the records; None of one that says nothing, or names a function that is not there."""
    try:
        index, (trace, times, *_) = entry
        if not (isinstance(index, int) and 0 <= index < workloads and len(trace) == 2):
            return None
        return Record(index, trace, median(map(float, times)) if times else None)
    except (TypeError, ValueError):
        return None


def _mended(path: Path, wanted: Callable[[int, Any], bool]) -> None:
    """Leave only whole lines that are wanted (line number, entry): the next line must begin one of its own."""
    if not path.exists():
        return
    content = path.read_bytes()
    lines = content.split(b"\n")[:-1]
    kept = [line for number, (line, entry) in enumerate(zip(lines, _lines(path), strict=True)) if wanted(number, entry)]
    whole = b"".join(line + b"\n" for line in kept)
    if whole != content:
        with replacing(path) as partial:
            partial.write_bytes(whole)
