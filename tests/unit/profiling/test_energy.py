"""Energy by replay on this machine.

The replay, its idle windows, the sampler and the clocks are real. The meter is a *model*: a program that prints 2 W and
another 10 W for the time that the replaying process has a core, which it reads from the kernel. So the true energy of one
inference is known: 10 mJ per millisecond of processor time.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from edgeprune.boards.board import Board
from edgeprune.boards.power import PowerScope, PowerSensor
from edgeprune.errors import ConfigError, PowerUnavailableError, ShortWindowError
from edgeprune.latency.table import LatencyTable
from edgeprune.latency.table_rows import network_key, network_row
from edgeprune.profiling import host_meter
from edgeprune.profiling.energy import measure_energy, missed, needed_s
from edgeprune.profiling.host_meter import HostMeter
from edgeprune.profiling.power_trace import PowerTrace
from edgeprune.spec import Measurement

METER = """
import os, sys, time

def parent(pid):
    return int(open("/proc/%d/stat" % pid).read().rsplit(")", 1)[1].split()[1])

def on_core_s(pid):
    return int(open("/proc/%d/schedstat" % pid).read().split()[0]) / 1e9

pid = os.getpid()
while not open("/proc/%d/cmdline" % pid).read().rstrip("\\0").endswith("energy"):
    pid = parent(pid)
    if pid <= 1:
        pid = None
        break
last, before = time.monotonic(), on_core_s(pid) if pid else 0.0
while True:
    time.sleep(0.01)
    now, used = time.monotonic(), on_core_s(pid) if pid else 0.0
    share = (used - before) / (now - last)
    print("%.6f %.4f" % (time.time() - (now - last) / 2, 2.0 + 10.0 * share), flush=True)
    last, before = now, used
"""


@pytest.fixture
def meter(tmp_path: Path) -> str:
    program = tmp_path / "meter.py"
    program.write_text(METER)
    return f"{sys.executable} {program}"


@pytest.fixture
def short() -> dict[str, float]:
    return {"replay_s": 0.6, "idle_s": 0.4, "settle_s": 0.1, "least_s": 0.3, "least_updates": 10}


def test_energy_of_engines_follows_the_time_that_they_take(
    board: Board, conv_engine: Callable[..., bytes], meter: str, short: dict[str, float]
) -> None:
    engines: dict[str, bytes | Path] = {"small": conv_engine(8), "large": conv_engine(32, 32)}
    told: list[tuple[int, int]] = []
    found = measure_energy(
        board,
        engines,
        rounds=1,
        meter=meter,
        progress=lambda done, total, left_s, message: told.append((done, total)),
        **short,  # type: ignore[arg-type]
    )
    assert set(found) == {"small", "large"}
    for measurement in found.values():
        # Where something else has the core, wall time grows and power falls; their product is the processor time.
        assert measurement.energy_mj == pytest.approx(10 * measurement.run_ms * measurement.cores, rel=0.1)
        assert measurement.idle_mw == pytest.approx(2000, rel=0.1)
        assert measurement.gross_mj > measurement.energy_mj
        assert measurement.windows == 1
        assert measurement.rails == ("meter",)
        assert measurement.covers == "what the external meter measures"
    assert found["large"].energy_mj > 3 * found["small"].energy_mj
    assert told[-1] == (5, 5)


@pytest.mark.slow
def test_two_runs_agree_where_this_machine_has_a_readable_sensor(
    board: Board, conv_engine: Callable[..., bytes]
) -> None:
    try:
        board.power().scope()
    except PowerUnavailableError as error:
        pytest.skip(error.message)
    engine = {"a": conv_engine(64, 56)}
    first, second = (measure_energy(board, engine)["a"] for _ in range(2))
    assert second.energy_mj == pytest.approx(first.energy_mj, rel=0.05)


# As METER, but started beside the replay and not by it.
HOST_METER = """
import os, sys, time

def replaying():
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            words = open("/proc/%s/cmdline" % name, errors="replace").read().split(chr(0))
        except OSError:
            continue
        if words[-2:-1] == ["energy"] and words[1].startswith(sys.argv[1]):
            return int(name)

def on_core_s(pid):
    try:
        return int(open("/proc/%d/schedstat" % pid).read().split()[0]) / 1e9
    except OSError:
        return 0.0

pid, last, before = None, time.monotonic(), 0.0
while True:
    time.sleep(0.01)
    pid = pid or replaying()
    now, used = time.monotonic(), on_core_s(pid) if pid else 0.0
    share = (used - before) / (now - last)
    print("%.6f %.4f" % (time.time() - (now - last) / 2, 2.0 + 10.0 * min(1.0, max(0.0, share))), flush=True)
    last, before = now, used
"""


def test_a_meter_that_hangs_on_this_machine_is_read_here(
    board: Board, conv_engine: Callable[..., bytes], tmp_path: Path, short: dict[str, float]
) -> None:
    (tmp_path / "meter.py").write_text(HOST_METER)
    command = f"{sys.executable} {tmp_path / 'meter.py'} {board.root}"
    engines: dict[str, bytes | Path] = {"small": conv_engine(8), "large": conv_engine(32, 32)}
    # Two programs and two clocks: where the machine has other work, a window's edges are some milliseconds off.
    longer = {**short, "replay_s": 1.5}
    found = measure_energy(board, engines, rounds=1, host_meter=command, **longer)  # type: ignore[arg-type]
    for measurement in found.values():
        assert measurement.energy_mj == pytest.approx(10 * measurement.run_ms * measurement.cores, rel=0.1)
        assert measurement.idle_mw == pytest.approx(2000, rel=0.1)
        assert measurement.covers == "what the external meter measures"
    assert found["large"].energy_mj > 3 * found["small"].energy_mj
    ended = time.monotonic() + 10
    while time.monotonic() < ended and any(str(tmp_path).encode() in line for line in _command_lines()):
        time.sleep(0.05)
    assert not [line for line in _command_lines() if str(tmp_path).encode() in line], "its command was ended"


def _command_lines() -> list[bytes]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                found.append((entry / "cmdline").read_bytes())
    return found


def test_readings_of_this_machine_come_on_the_board_s_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    meter = HostMeter("unused", "meter meter")
    told = [{"event": "power", "t_s": 1000.0 + second, "values": {"meter meter": 5.0 * second}} for second in range(3)]
    monkeypatch.setattr(meter, "_events", lambda: iter([{"event": "other"}, *told]))
    assert meter.readings() == ([], []), "the board was not heard yet"
    heard = iter([1010.0, 1020.5, 1030.02])
    monkeypatch.setattr(host_meter, "time", SimpleNamespace(monotonic=lambda: next(heard)))
    for board_s in (10.0, 20.0, 30.0):
        meter.hear(board_s)
    times, values = meter.readings()
    assert times == pytest.approx([0.0, 1.0, 2.0]), "by the word that came quickest"
    assert values == [0.0, 5.0, 10.0]


def test_a_meter_here_that_prints_nothing_or_hangs_on_both_machines_is_refused(
    board: Board, conv_engine: Callable[..., bytes]
) -> None:
    with pytest.raises(PowerUnavailableError, match=r"must print watts, one reading per line.*no such meter"):
        measure_energy(board, {"a": conv_engine(8)}, host_meter="echo no such meter; exit 1")
    with pytest.raises(ConfigError, match="must hang on the board or on this machine, found a command for each"):
        measure_energy(board, {"a": conv_engine(8)}, host_meter="echo 1", meter="echo 1")


def test_a_window_that_is_too_short_is_refused_with_everything_replayed(
    board: Board, conv_engine: Callable[..., bytes], meter: str
) -> None:
    with pytest.raises(
        ShortWindowError, match=r"a window of meter meter must last 5 s beside its averaging window, found 0\.2"
    ):
        measure_energy(board, {"a": conv_engine(8)}, rounds=1, meter=meter, replay_s=0.2, idle_s=0.2, settle_s=0.05)


def test_without_a_sensor_nothing_is_replayed(board: Board, conv_engine: Callable[..., bytes]) -> None:
    power = board.power()
    if power.sensors:
        pytest.skip("this machine tells its power")
    with pytest.raises(PowerUnavailableError, match=r"the board's power must be readable"):
        measure_energy(board, {"a": conv_engine(8)}, power=power)


def test_a_meter_that_falls_silent_is_refused_and_ended(
    board: Board, conv_engine: Callable[..., bytes], tmp_path: Path, short: dict[str, float]
) -> None:
    pids = tmp_path / "pids"
    meter = f"echo $$ >> {pids}; for i in 1 2 3 4 5 6 7 8 9 10; do echo 3.5; sleep 0.02; done; exec sleep 100"
    with pytest.raises(ShortWindowError, match=r"must hold 10 renewals of meter meter|may pass without a reading"):
        measure_energy(board, {"a": conv_engine(8)}, rounds=1, meter=meter, **short)  # type: ignore[arg-type]
    assert pids.read_text().split()
    assert not [pid for pid in pids.read_text().split() if Path("/proc", pid).exists()]


def test_what_happened_while_energy_was_measured_is_said(
    board: Board,
    conv_engine: Callable[..., bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    short: dict[str, float],
) -> None:
    """A real replay; the firmware is a program that tells of throttling from its second answer on, as a Raspberry Pi's does."""
    folder, asked = tmp_path / "bin", tmp_path / "asked"
    folder.mkdir()
    (folder / "vcgencmd").write_text(
        f'#!/bin/sh\n[ "$1" = get_throttled ] || exit 1\n'
        f'if test -e "{asked}"; then echo throttled=0x40004; else echo throttled=0x0; fi\n: > "{asked}"\n'
    )
    (folder / "vcgencmd").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    meter = "while echo 3.25; do sleep 0.01; done"
    power = board.power(meter=meter)
    asked.unlink(missing_ok=True)
    found = measure_energy(board, {"a": conv_engine(8)}, rounds=1, meter=meter, power=power, **short)  # type: ignore[arg-type]
    assert found["a"].doubts[-1] == (
        "while it was measured, the firmware reports that the processor is throttled now (throttled=0x40004)."
    )


def test_a_sensor_that_fails_now_and_then_is_said_to_and_one_that_hardly_does_is_not() -> None:
    sensor = PowerSensor("ina3221 VDD_IN", "VDD_IN", "ina3221", "power")
    traces = {sensor.name: PowerTrace(sensor, np.arange(95.0), np.full(95, 4000.0))}
    assert list(missed({sensor.name: 5}, traces)) == [
        "ina3221 VDD_IN gave no value in 5 of 100 readings; they are left out."
    ]
    assert list(missed({"another sensor": 5}, traces)) == []
    traces = {sensor.name: PowerTrace(sensor, np.arange(995.0), np.full(995, 4000.0))}
    assert list(missed({sensor.name: 5}, traces)) == []


@pytest.mark.parametrize("arguments", [{"rounds": 0}, {"replay_s": 0.0}, {"settle_s": -1.0}])
def test_impossible_settings_are_refused(
    board: Board, conv_engine: Callable[..., bytes], arguments: dict[str, float]
) -> None:
    with pytest.raises(ConfigError):
        measure_energy(board, {"a": conv_engine(8)}, **arguments)  # type: ignore[arg-type]


def test_windows_are_as_long_as_the_slowest_sensor_needs(board: Board) -> None:
    def length_s(**fields: object) -> float:
        return needed_s(PowerScope((PowerSensor("s", "rail", "x", **fields),), ""))  # type: ignore[arg-type]

    assert length_s(kind="energy", period_s=0.001) == pytest.approx(6.25)
    assert length_s(kind="power", period_s=1.0) == pytest.approx(25.0)
    assert length_s(kind="average", period_s=0.1, window_s=1.0) == pytest.approx(7.25)
    assert length_s(kind="power") == pytest.approx(25.0)


def test_a_table_keeps_the_energy_of_its_networks_whatever_they_are_called_after_a_merge(tmp_path: Path) -> None:
    def table(key: str, energy_mj: float | None) -> LatencyTable:
        from edgeprune.spec import Kernel

        kernel = Kernel.from_key(key)
        measurement = Measurement(1.0, 1.1, 0.9, 0.01, (1.0, 1.0), 10)
        row = network_row("dense", [kernel], measurement)
        header = {"identity": {"cpu_model": "x"}, "runtime": "onnxruntime", "threads": 1, "precision": "fp32"}
        told = {} if energy_mj is None else {"energy": {network_key(row["kernels"]): {"energy_mj": energy_mj}}}
        return LatencyTable.from_rows({**header, **told}, [row])

    relu, sigmoid = _kernel_keys()
    first, second = table(relu, 3.0), table(sigmoid, 5.0)
    loaded = LatencyTable.load(first.save(tmp_path / "table.parquet"))
    assert loaded.energy == {"dense": {"energy_mj": 3.0}}
    merged = loaded.merge(second)
    assert len(merged.energy) == 2
    assert merged.energy["dense"] == {"energy_mj": 3.0}
    assert {record["energy_mj"] for record in merged.energy.values()} == {3.0, 5.0}
    assert table(relu, None).energy == {}


def _kernel_keys() -> tuple[str, str]:
    from edgeprune.spec import Kernel

    return tuple(  # type: ignore[return-value]
        Kernel(op=op, family="elementwise", inputs=((1, 8, 4, 4),), output=(1, 8, 4, 4), precision="fp32").key
        for op in ("Relu", "Sigmoid")
    )
