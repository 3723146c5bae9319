"""Building and timing candidates, in processes of their own: what a search draws may crash a compiler, or never end.

The processes run this file, and nothing of the user's: whether a script of theirs guards what it does at import is all one.
They speak JSON lines; what TVM and LLVM print goes to standard error.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any

BUILD_S, RUN_S = 12.0, 8.0
"""A candidate that takes longer to be built, or to be timed, is none."""
_START_S = 120.0
_REPEATS, _LEAST_MS = 5, 4.0
_MOST_BUILT = 250
"""LLVM keeps what it has compiled: a process ends after so many."""


class TimingProcess:
    """One process that builds candidates and times them.

    Args:
        target: As `TvmTarget.llvm` tells it.
        linker: C compiler that makes libraries of candidates for a board; None, where they are timed here.
    """

    def __init__(self, target: Mapping[str, Any], linker: str | None = None) -> None:
        self._target, self._linker = target, linker
        self._process: subprocess.Popen[bytes] | None = None
        self._received = b""
        self._built = 0

    def start(self) -> None:
        """Start the process, if it does not run; it answers before it is needed."""
        if self._process is not None:
            return
        environment = {**environment_of_children(), "TVM_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from edgeprune.backends.tvm.candidate_timing import main; main()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env=environment,
        )
        self._received, self._built = b"", 0
        self._send({"target": dict(self._target), "linker": self._linker})

    def ready(self) -> bool:
        """Whether the process could be started and knows the target."""
        self.start()
        return bool(self._answer(_START_S).get("ready"))

    def build(self, text: str, engine: Path | None = None) -> None:
        """Begin to build a module, given as TVM's JSON, maybe into the file of an engine; `built` tells what came of it."""
        if self._built >= _MOST_BUILT:
            self.close()
        if self._process is None and not self.ready():
            return
        self._built += 1
        self._send({"build": text, "engine": None if engine is None else str(engine)})

    def built(self) -> bool:
        """Wait until the module is built; False where it cannot be."""
        return self._process is not None and bool(self._answer(BUILD_S).get("built"))

    def seconds(self) -> float | None:
        """What the module that was built takes, seconds, median of several runs; None where it cannot run."""
        if self._process is None:
            return None
        self._send({"run": True})
        times = self._answer(RUN_S).get("seconds")
        return median(times) if times else None

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout):
                if stream is not None:
                    stream.close()
            self._process = None

    def _send(self, request: Mapping[str, Any]) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            content = memoryview(json.dumps(request).encode() + b"\n")
            while content:
                content = content[self._process.stdin.write(content) or 0 :]
        except OSError:
            self.close()

    def _answer(self, within_s: float) -> dict[str, Any]:
        """The next line; empty, and the process ended, where none comes in time."""
        if self._process is None or self._process.stdout is None:
            return {}
        deadline = time.monotonic() + within_s
        with selectors.DefaultSelector() as waiting:
            waiting.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._received:
                left_s = deadline - time.monotonic()
                part = b""
                if left_s > 0 and waiting.select(left_s):
                    part = os.read(self._process.stdout.fileno(), 1 << 16)
                if not part:
                    self.close()
                    return {}
                self._received += part
        line, _, self._received = self._received.partition(b"\n")
        found: dict[str, Any] = json.loads(line)
        return found


class Timing:
    """Several processes: they build at the same time, and are timed one after the other, so that none disturbs another.

    Args:
        target: As `TvmTarget.llvm` tells it.
        processes: How many.
        linker: See `TimingProcess`.

    Attributes:
        waited_s: How long a board was waited for, seconds; not for this machine.
    """

    def __init__(self, target: Mapping[str, Any], processes: int, linker: str | None = None) -> None:
        self._processes = [TimingProcess(target, linker) for _ in range(processes)]
        self.waited_s = 0.0

    def __enter__(self) -> Timing:
        for process in self._processes:
            process.start()
        for process in self._processes:
            process.ready()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            process.close()

    def seconds(self, modules: Sequence[Any]) -> list[float | None]:
        """What each module takes, seconds; None where it cannot be built or run."""
        found: list[float | None] = []
        for part in self._built(modules):
            found += [None if process is None else process.seconds() for process in part]
        return found

    def _built(
        self, modules: Sequence[Any], engines: Sequence[Path | None] | None = None
    ) -> Iterator[list[TimingProcess | None]]:
        """Build modules, as many at once as there are processes; gives the process of each, None where it cannot be built."""
        import tvm

        files: Sequence[Path | None] = [None] * len(modules) if engines is None else engines
        for begin in range(0, len(modules), len(self._processes)):
            part = slice(begin, begin + len(self._processes))
            building = list(zip(modules[part], files[part], self._processes, strict=False))
            for module, file, process in building:
                process.build(tvm.ir.save_json(module), file)
            yield [process if process.built() else None for _, _, process in building]


class BoardsTiming(Timing):
    """Builds candidates for a board, and asks for them to be timed there by who has the link to it.

    Args:
        target: The board's.
        processes: How many build.
        linker: C compiler for that target.
        folder: Where the engines of candidates lie until they are timed.
        ask: Given their paths, tells ``seconds`` (of each, or None) and ``waited_s`` (for the board, meanwhile).
    """

    def __init__(
        self,
        target: Mapping[str, Any],
        processes: int,
        linker: str,
        folder: Path,
        ask: Callable[[Sequence[str]], Mapping[str, Any]],
    ) -> None:
        super().__init__(target, processes, linker)
        self._folder, self._ask = folder, ask

    def seconds(self, modules: Sequence[Any]) -> list[float | None]:
        """See `Timing.seconds`."""
        files = [self._folder / f"candidate{number}.so" for number in range(len(modules))]
        good = [process is not None for part in self._built(modules, files) for process in part]
        there = [str(file) for file, fine in zip(files, good, strict=True) if fine]
        told: Mapping[str, Any] = self._ask(there) if there else {"seconds": [], "waited_s": 0.0}
        self.waited_s += float(told["waited_s"])
        times = iter(told["seconds"])
        for file in files:
            file.unlink(missing_ok=True)
        return [next(times) if fine else None for fine in good]


def environment_of_children() -> dict[str, str]:
    """The environment of processes of our own: they find the modules that this one finds."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def main() -> None:
    """Serve until the other side is gone."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)
        import numpy as np
        import tvm
        from tvm.s_tir.meta_schedule.arg_info import ArgInfo

        from edgeprune.backends.tvm.candidate_engine import engine_of

        dice = np.random.default_rng(0)
        target: Any = None
        linker = ""
        ready: tuple[Any, list[Any]] | None = None

        def answer(request: Mapping[str, Any]) -> dict[str, Any]:
            nonlocal target, linker, ready
            if "target" in request:
                target, linker = tvm.target.Target(request["target"]), request["linker"] or ""
                return {"ready": True}
            if "build" in request:
                ready = None
                module = tvm.ir.load_json(request["build"])
                if request["engine"] is not None:
                    Path(request["engine"]).write_bytes(engine_of(module, target, linker))
                    return {"built": True}
                built = tvm.compile(module, target=target).mod
                told = [argument.as_json() for argument in ArgInfo.from_prim_func(module["main"])]
                arguments = [_argument(dice, tuple(shape), dtype) for _, dtype, shape in told]
                ready = (built, [tvm.runtime.tensor(array) for array in arguments])
                return {"built": True}
            assert ready is not None
            built, tensors = ready
            clock = built.time_evaluator(
                "main", tvm.runtime.cpu(), number=1, repeat=_REPEATS, min_repeat_ms=int(_LEAST_MS)
            )
            return {"seconds": [float(value) for value in clock(*tensors).results]}

        for line in sys.stdin:
            # Whatever becomes of the other side: what hangs here ends by itself.
            signal.alarm(round(BUILD_S + RUN_S))
            try:
                told = answer(json.loads(line))
            # A candidate that TVM cannot build says so in any of its classes: it is not one, and the next is asked for.
            except Exception as error:  # noqa: BLE001
                told = {"error": " ".join(str(error).split())[-300:]}
            answers.write(json.dumps(told) + "\n")
            answers.flush()
            signal.alarm(0)


def _argument(dice: Any, shape: tuple[int, ...], dtype: str) -> Any:
    """An array whose numbers stay numbers: zeros or not-a-numbers would be computed in another time."""
    if dtype.startswith("float"):
        return dice.uniform(0.1, 1.0, size=shape).astype(dtype)
    return dice.integers(0, 2, size=shape).astype(dtype)
