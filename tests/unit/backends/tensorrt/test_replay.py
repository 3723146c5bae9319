"""Percentiles and energy of engines that trtexec runs: *replayed*, by a stand-in.

Windows, processes and clocks are real. Times are those that were recorded; the stand-in keeps a core busy for as long as it is
told to infer. The meter is a *model*: a program that prints 2 W and another 10 W for the time that the stand-in has a core, so
the true energy of one inference is known: 10 mJ per millisecond of processor time.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx")

from edgeprune.boards.board import Board
from edgeprune.errors import BackendError
from edgeprune.profiling.energy import measure_energy
from edgeprune.profiling.percentiles import PERCENTILES, percentiles
from edgeprune.testing import trtexec, trtexec_says

ONBOARD = Path(trtexec.__file__).parents[1] / "boards" / "onboard"

METER = """
import os, sys, time

def replaying():
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            words = open("/proc/%s/cmdline" % name, errors="replace").read().split(chr(0))
        except OSError:
            continue
        if sys.argv[1] in words[2:3] and any(word.startswith("--loadEngine") for word in words):
            return int(name)

def on_core_s(pid):
    try:
        return int(open("/proc/%d/schedstat" % pid).read().split()[0]) / 1e9
    except OSError:
        return None

pid, last, before = None, time.monotonic(), None
while True:
    time.sleep(0.01)
    if before is None:
        pid = replaying()
    now, used = time.monotonic(), on_core_s(pid) if pid else None
    share = 0.0 if used is None or before is None else (used - before) / (now - last)
    print("%.6f %.4f" % (time.time() - (now - last) / 2, 2.0 + 10.0 * min(1.0, share)), flush=True)
    last, before = now, used
"""
SHORT: dict[str, Any] = {"replay_s": 0.6, "idle_s": 0.4, "settle_s": 0.2, "least_s": 0.3, "least_updates": 10}


@pytest.fixture
def queries_ms(recorded) -> list[float]:
    """What the recorded queries took, milliseconds."""
    return [query["computeMs"] for query in json.loads(recorded("resnet18.times.json"))]


@pytest.fixture
def engine(model, tmp_path: Path) -> Callable[[str], Path]:
    """An engine as the stand-in of a release makes one, without building it."""

    def made(version: str) -> Path:
        release = bytes([*map(int, version.split(".")), 0])
        path = tmp_path / "engine.plan"
        path.write_bytes(trtexec_says.MAGIC + bytes(trtexec_says.HEADER - 8) + release + model.content)
        return path

    return made


@pytest.fixture
def meter(tmp_path: Path) -> str:
    (tmp_path / "meter.py").write_text(METER)
    return f"{sys.executable} {tmp_path / 'meter.py'} {tmp_path / 'bin' / 'trtexec.json'}"


def test_percentiles_are_those_of_single_queries(stand_in, engine, queries_ms: list[float]) -> None:
    stand_in("8.6.1")
    with Board.open("local") as board:
        found = percentiles(board, {"a": engine("8.6.1")}, runtime="tensorrt", threads=1, rounds=2, runs=50)["a"]
    assert (found["rounds"], found["runs"]) == (2, 2 * len(queries_ms))
    assert found["median_ms"] == pytest.approx(np.median(queries_ms))
    for percent in PERCENTILES:
        assert found["ms"][str(percent)] == pytest.approx(np.percentile(queries_ms, percent))
        assert found["ratio"][str(percent)] == pytest.approx(found["ms"][str(percent)] / found["median_ms"])


def test_energy_is_that_of_the_replay_and_not_of_what_loads_the_engine(
    stand_in, engine, meter: str, queries_ms: list[float]
) -> None:
    stand_in("10.3.0", real_time=True)
    with Board.open("local") as board:
        engines: dict[str, bytes | Path] = {"a": engine("10.3.0")}
        found = measure_energy(board, engines, runtime="tensorrt", rounds=1, meter=meter, **SHORT)["a"]
    # What a query takes is told by the program, over all of the replay.
    assert found.run_ms == pytest.approx(fmean(queries_ms), rel=1e-3)
    assert found.runs >= 1000 * SHORT["replay_s"] / found.run_ms - 1
    # Where something else has the core, power falls with the processor time that the replay has, which the kernel tells in steps
    # of 10 ms: two of them in a window of 600.
    assert found.energy_mj == pytest.approx(10 * found.run_ms * found.cores, rel=0.1, abs=10 * found.run_ms * 0.035)
    assert found.cores > 0.1, "a process of its own is one of ours"
    assert found.idle_mw == pytest.approx(2000, rel=0.1)


def test_an_engine_that_ends_before_its_window_does_is_refused(stand_in, engine, meter: str) -> None:
    # This one takes no time.
    stand_in("11.1.0")
    with Board.open("local") as board, pytest.raises(BackendError, match="must go on until its window ends"):
        measure_energy(board, {"a": engine("11.1.0")}, runtime="tensorrt", rounds=1, meter=meter, **SHORT)


def test_a_replay_that_fails_says_what_trtexec_does(stand_in, engine, meter: str) -> None:
    program = stand_in("10.3.0")
    ends = "echo '[E] Error[1]: Error Code 1: Cuda Runtime (out of memory)' >&2; exit 1"
    program.write_text(
        program.read_text().replace("exec", f'case "$*" in *--duration=0*|*--help*) ;; *) {ends} ;; esac\nexec', 1)
    )
    with Board.open("local") as board, pytest.raises(BackendError, match=r"found: Error\[1\].*out of memory"):
        measure_energy(board, {"a": engine("10.3.0")}, runtime="tensorrt", rounds=1, meter=meter, **SHORT)


def test_a_window_ends_with_the_last_run_that_it_holds_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ONBOARD))
    import energy  # the folder is no package of this process

    window = {"phase": "replay", "start_s": 100.0, "end_s": 101.0, "runs": 0}
    found = energy.whole_runs(window, 0.3)
    assert (found["runs"], found["end_s"]) == (3, pytest.approx(100.9))
    # One that is longer than its window has no run, which the host refuses.
    assert energy.whole_runs(window, 1.5) == window
