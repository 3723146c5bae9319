"""The measuring process says what it finds as it goes, so that a hang or a crash loses nothing that was known by then."""

from __future__ import annotations

import gc
import json
import re
import time
import traceback
from pathlib import Path
from types import TracebackType
from typing import Any

_STATUS = Path("/proc/self/status")
_RESET_PEAK = Path("/proc/self/clear_refs")


class Record:
    """Facts as lines of JSON; a later line adds to the earlier ones.

    Attributes:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def say(self, **facts: Any) -> None:
        """Add facts."""
        with self.path.open("a") as file:
            file.write(json.dumps(facts) + "\n")

    def step(self, name: str) -> Step:
        """A step that the rest depends on: what it raises ends the process, after it was written down."""
        return Step(self, name, ends=True)

    def attempt(self, name: str) -> Step:
        """A step that nothing depends on: what it raises is written down."""
        return Step(self, name, ends=False)


class Step:
    """One timed step with the memory that it takes.

    Whatever a library raises here is the result of the benchmark, so every exception is one, not only those that are
    expected.
    """

    def __init__(self, record: Record, name: str, ends: bool) -> None:
        self.record, self.name, self.ends = record, name, ends
        self.failed = False

    def __enter__(self) -> Step:
        self.record.say(at=self.name)
        gc.collect()
        self._before_mb = _megabytes("VmRSS")
        _reset_peak()
        self._start = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        seconds = time.perf_counter() - self._start
        if error is not None:
            self.failed = True
            self.record.say(**{f"{self.name}_error": describe(error)}, at=None)
            return not self.ends and isinstance(error, Exception)
        figures = {"s": round(seconds, 4), "before_mb": self._before_mb, "peak_mb": _megabytes("VmHWM")}
        self.record.say(**{self.name: figures}, at=None)
        # The peak of an outer step is what it needs after this one.
        _reset_peak()
        return False


def read(path: Path) -> dict[str, Any]:
    """All facts of a process."""
    facts: dict[str, Any] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        facts.update(json.loads(line))
    return facts


def describe(error: BaseException) -> str:
    """Kind, first line and innermost place of an error, without folders."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {without_folders((lines or ['no message'])[0])[:300]}{place}"


def without_folders(text: str) -> str:
    """Files by their names alone: where this machine keeps them is no result."""
    return re.sub(r"(?<![\w.])/(?:[\w.+-]+/)+", "", text)


def _megabytes(field: str) -> float:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field):
            return round(int(line.split()[1]) / 1024, 1)
    raise LookupError(f"{_STATUS} has no {field}")


def _reset_peak() -> None:
    _RESET_PEAK.write_text("5")
