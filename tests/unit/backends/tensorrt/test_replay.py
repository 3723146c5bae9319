"""Percentiles and energy of engines that trtexec runs: *replayed*, by a stand-in.

Windows, processes and clocks are real. Times are those that were recorded; the stand-in keeps a core busy for as long as it is
told to infer. The meter is a *model*: a program that prints 2 W and another 10 W for the time that the stand-in has a core, so
the true energy of one inference is known: 10 mJ per millisecond of processor time.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx")

from edgeprune.boards.board import Board
from edgeprune.errors import BackendError, ShortWindowError
from edgeprune.profiling.energy import measure_energy
from edgeprune.profiling.percentiles import PERCENTILES, percentiles

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
def engine(stand_in, build, model, tmp_path: Path) -> Path:
    stand_in("10.3.0")
    build(model, tmp_path / "engine.plan")
    return tmp_path / "engine.plan"


@pytest.fixture
def meter(tmp_path: Path) -> str:
    (tmp_path / "meter.py").write_text(METER)
    return f"{sys.executable} {tmp_path / 'meter.py'} {tmp_path / 'bin' / 'trtexec.json'}"


def test_percentiles_are_those_of_single_queries(engine: Path, queries_ms: list[float]) -> None:
    with Board.open("local") as board:
        found = percentiles(board, {"a": engine}, runtime="tensorrt", threads=1, rounds=2, runs=50)["a"]
    assert (found["rounds"], found["runs"]) == (2, 2 * len(queries_ms))
    assert found["median_ms"] == pytest.approx(np.median(queries_ms))
    for percent in PERCENTILES:
        assert found["ms"][str(percent)] == pytest.approx(np.percentile(queries_ms, percent))
        assert found["ratio"][str(percent)] == pytest.approx(found["ms"][str(percent)] / found["median_ms"])


@pytest.mark.parametrize("version", ["10.3.0", "11.1.0"])
def test_energy_is_that_of_the_replay_and_not_of_what_loads_the_engine(
    stand_in, build, model, tmp_path: Path, meter: str, queries_ms: list[float], version: str
) -> None:
    stand_in(version)
    build(model, tmp_path / "engine.plan")
    stand_in(version, real_time=True)
    with Board.open("local") as board:
        engines: dict[str, bytes | Path] = {"a": tmp_path / "engine.plan"}
        found = measure_energy(board, engines, runtime="tensorrt", rounds=1, meter=meter, **SHORT)["a"]
    # What a query takes is told by the program, over all of the replay.
    assert found.run_ms == pytest.approx(fmean(queries_ms), rel=1e-3)
    assert found.runs >= 1000 * SHORT["replay_s"] / found.run_ms - 1
    # Where something else has the core, power falls with the processor time that the replay has.
    assert found.energy_mj == pytest.approx(10 * found.run_ms * found.cores, rel=0.1)
    assert found.cores > 0.3, "a process of its own is one of ours"
    assert found.idle_mw == pytest.approx(2000, rel=0.1)


def test_an_engine_that_ends_before_its_window_does_is_refused(engine: Path, meter: str) -> None:
    # This one takes no time.
    with Board.open("local") as board, pytest.raises(BackendError, match="must go on until its window ends"):
        measure_energy(board, {"a": engine}, runtime="tensorrt", rounds=1, meter=meter, **SHORT)


def test_a_replay_that_fails_says_what_trtexec_does(stand_in, engine: Path, meter: str) -> None:
    program = stand_in("10.3.0")
    ends = "echo '[E] Error[1]: Error Code 1: Cuda Runtime (out of memory)' >&2; exit 1"
    program.write_text(
        program.read_text().replace("exec", f'case "$*" in *--duration=0*|*--help*) ;; *) {ends} ;; esac\nexec', 1)
    )
    with Board.open("local") as board, pytest.raises(BackendError, match=r"found: Error\[1\].*out of memory"):
        measure_energy(board, {"a": engine}, runtime="tensorrt", rounds=1, meter=meter, **SHORT)


def test_a_query_that_is_longer_than_its_window_is_refused(stand_in, build, model, tmp_path: Path, meter: str) -> None:
    slow = tmp_path / "slow.json"
    slow.write_text('[{"latencyMs": 700.0, "computeMs": 700.0}]')
    stand_in("10.3.0")
    build(model, tmp_path / "engine.plan")
    stand_in("10.3.0", real_time=True, times=slow)
    with Board.open("local") as board, pytest.raises(ShortWindowError, match="at least one run"):
        measure_energy(board, {"a": tmp_path / "engine.plan"}, runtime="tensorrt", rounds=1, meter=meter, **SHORT)
