"""What a board says of its power, and which rails together are the board's."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from edgeprune.boards.board import Board
from edgeprune.boards.device_types import device_type, device_types, read_device_file
from edgeprune.boards.local import LocalTransport
from edgeprune.boards.power import BoardPower, PowerAbsence, PowerSensor
from edgeprune.errors import DeviceFileError, PowerUnavailableError
from edgeprune.spec import DeviceSpec


def sensor(name: str, role: str = "unknown", kind: str = "power") -> PowerSensor:
    source, rail = name.split(" ", 1)
    return PowerSensor(name, rail, source, kind, role)


def power(*sensors: PowerSensor, device: str | None = None) -> BoardPower:
    return BoardPower(sensors, (), None if device is None else device_type(device))


ORIN_NANO = (sensor("ina3221 VDD_CPU_GPU_CV"), sensor("ina3221 VDD_IN", "total"), sensor("ina3221 VDD_SOC"))
AGX_ORIN = tuple(sensor(f"ina3221 {rail}") for rail in ("VDDQ_VDD2_1V8AO", "VDD_CPU_CV", "VDD_GPU_SOC", "VIN_SYS_5V0"))
THOR = (sensor("ina3221 VDD_GPU"), sensor("ina3221 VIN_SYS_5V0"), sensor("ina238 VIN", "total"))


@pytest.mark.parametrize(
    ("board", "rails", "words"),
    [
        (power(*ORIN_NANO, device="jetson-orin-nano"), ("VDD_IN",), "by its device file"),
        (power(*ORIN_NANO), ("VDD_IN",), "by its own definition"),
        (power(*AGX_ORIN, device="jetson-agx-orin"), ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"), "the sum for"),
        (power(*THOR, device="jetson-thor"), ("VIN",), "by its device file"),
        (power(sensor("rapl package-0", "share"), sensor("rapl package-0 core", "inside")), ("package-0",), "not seen"),
        (power(sensor("rapl package-0", "share"), sensor("rapl psys", "total")), ("psys",), "by its own definition"),
        (power(sensor("rapl package-0", "share"), sensor("rapl package-1", "share")), ("package-0", "package-1"), "+"),
        (power(sensor("meter meter", "total"), *ORIN_NANO, device="jetson-orin-nano"), ("meter",), "external meter"),
    ],
)
def test_a_total_stands_alone_and_shares_are_added(board: BoardPower, rails: tuple[str, ...], words: str) -> None:
    scope = board.scope()
    assert scope.rails == rails
    assert words in scope.covers


def test_of_two_sensors_of_one_rail_the_first_is_taken_and_they_are_never_added() -> None:
    board = power(
        sensor("nvml GPU 0", "share", "energy"), sensor("nvml GPU 0", "share"), sensor("nvidia-smi GPU 0", "share")
    )
    assert board.scope().sensors == (board.sensors[0],)


def test_rails_of_which_nobody_says_how_they_relate_are_not_added() -> None:
    with pytest.raises(
        PowerUnavailableError, match=r"which rails add up to the board's power, found VDDQ.*no device type"
    ):
        power(*AGX_ORIN).scope()
    # One rail of the sum cannot be read: the rest is not the board's.
    with pytest.raises(PowerUnavailableError, match=r"which rails add up"):
        power(*AGX_ORIN[:-1], device="jetson-agx-orin").scope()


def test_rails_that_are_asked_for_are_summed_unless_one_is_the_total() -> None:
    board = power(*ORIN_NANO, device="jetson-orin-nano")
    assert board.scope(["VDD_SOC", "VDD_CPU_GPU_CV"]).rails == ("VDD_SOC", "VDD_CPU_GPU_CV")
    with pytest.raises(
        PowerUnavailableError, match=r"a total must not be summed with its parts, found VDD_IN with 1 more"
    ):
        board.scope(["VDD_IN", "VDD_SOC"])
    with pytest.raises(PowerUnavailableError, match=r"rails must be among those that can be read .*found VDD_GPU"):
        board.scope(["VDD_GPU"])
    with pytest.raises(PowerUnavailableError, match=r"named once each"):
        board.scope(["VDD_SOC", "VDD_SOC"])
    host = power(
        sensor("rapl package-0", "share"), sensor("rapl package-0 core", "inside"), sensor("rapl dram", "share")
    )
    assert host.scope(["package-0", "dram"]).rails == ("package-0", "dram")
    assert host.scope(["package-0 core", "dram"]).rails == ("package-0 core", "dram")
    with pytest.raises(PowerUnavailableError, match=r"summed with its part, found package-0 with package-0 core"):
        host.scope(["package-0 core", "package-0"])


def test_a_board_without_sensors_says_what_was_looked_for_and_what_refuses() -> None:
    nothing = BoardPower((), (PowerAbsence("rapl", "no RAPL.", False), PowerAbsence("nvml", "no driver.", False)))
    with pytest.raises(PowerUnavailableError, match=r"found no sensor that is: nothing of rapl, nvml is there\."):
        nothing.scope()
    refusing = BoardPower(
        (), (PowerAbsence("rapl", "root alone may.", True), PowerAbsence("nvml", "no driver.", False))
    )
    with pytest.raises(PowerUnavailableError, match=r"found no sensor that is: root alone may\."):
        refusing.scope()


# Device files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", device_types(), ids=lambda spec: spec.name)
def test_a_device_has_a_total_or_rails_that_add_up_and_they_are_rails_of_it(spec: DeviceSpec) -> None:
    total, summed = spec.facts.get("total_power_rail"), spec.facts.get("summed_power_rails", [])
    assert total is None or not summed
    assert {*summed, *([total] if total else [])} <= set(spec.facts.get("power_rails", []))


RAILS = """
title = "A board"
architecture = "aarch64"
backends = ["onnxruntime"]
sources = ["its data sheet"]
[facts]
power_rails = ["ALL", "GPU", "CPU"]
"""


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('total_power_rail = "ALL"\nsummed_power_rails = ["GPU", "CPU"]', "must not both be given"),
        ('total_power_rail = "VIN"', "must be among power_rails, 'VIN' is not"),
        ('summed_power_rails = ["GPU", "SOC"]', "must be among power_rails, 'SOC' is not"),
        ('summed_power_rails = ["GPU", "GPU"]', "must name each rail once"),
        ('summed_power_rails = ["GPU"]', "at least 2 items"),
    ],
)
def test_a_device_file_that_would_sum_a_total_with_its_parts_is_refused(tmp_path: Path, line: str, words: str) -> None:
    path = tmp_path / "board.toml"
    path.write_text(RAILS + line + "\n")
    with pytest.raises(DeviceFileError, match=words):
        read_device_file(path)


# Boards -------------------------------------------------------------------------------------------------------------------


def told(board: Board, tree: Path, device: str | None = None) -> BoardPower:
    """What the runner says of a captured tree."""
    spec = None if device is None else device_type(device)
    return BoardPower.of(board.call("power", {"sysroot": str(tree)}), spec)


def test_the_runner_tells_sensors_with_first_readings_best_first(board: Board, tmp_path: Path) -> None:
    monitor = tmp_path / "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon1"
    monitor.mkdir(parents=True)
    for name, content in {"in1_label": "VDD_IN", "in1_input": "5000", "curr1_input": "1200"}.items():
        (monitor / name).write_text(content + "\n")
    program = tmp_path / "usr/bin/tegrastats"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\nwhile echo 'VDD_IN 6100mW/6000mW VDD_SOC 800mW/800mW'; do sleep 0.05; done\n")
    program.chmod(0o755)
    found = told(board, tmp_path, "jetson-orin-nano")
    assert [(sensor.name, sensor.value) for sensor in found.sensors] == [
        ("ina3221 VDD_IN", 6000.0),
        ("tegrastats VDD_IN", None),
        ("tegrastats VDD_SOC", None),
    ]
    assert found.scope().sensors == (found.sensors[0],)
    assert found.obstacles == ()


def test_this_machine_tells_its_power_or_why_it_cannot(board: Board) -> None:
    found = board.power()
    assert found.device == board.device
    assert {absence.source for absence in found.absences} | {sensor.source for sensor in found.sensors}
    if not found.sensors:
        with pytest.raises(PowerUnavailableError):
            found.scope()
        assert found.obstacles


def test_an_external_meter_is_what_its_command_prints(board: Board) -> None:
    found = board.power(meter="while echo 3.25; do sleep 0.02; done")
    assert found.scope().rails == ("meter",)
    refused = board.power(meter="echo not ready; exit 1")
    assert "not ready" in next(absence.reason for absence in refused.absences if absence.source == "meter")


@pytest.mark.parametrize("kind", ["polled", "streamed"])
def test_the_sampler_reads_until_its_input_ends(board: Board, tmp_path: Path, kind: str) -> None:
    zone = tmp_path / "tree/sys/class/powercap/intel-rapl:0"
    zone.mkdir(parents=True)
    (zone / "name").write_text("package-0\n")
    (zone / "energy_uj").write_text("5000000\n")
    board.power()  # brings the runner
    runner = next(Path(board.root, "runner").iterdir())
    request = {"action": "sample", "names": ["rapl package-0"], "interval_s": 0.02, "sysroot": str(tmp_path / "tree")}
    if kind == "streamed":
        request |= {"names": ["meter meter"], "meter": f"echo $$ > {tmp_path}/pid; while echo 2.5; do sleep 0.02; done"}
    child = subprocess.Popen(
        [sys.executable, str(runner), "power"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write(json.dumps({**request, "root": board.root}) + "\n")
    child.stdin.flush()
    events = [json.loads(child.stdout.readline()) for _ in range(5)]
    child.stdin.close()
    last = [json.loads(line) for line in child.stdout][-1]
    assert child.wait(timeout=10) == 0
    assert last == {"event": "result", "result": {"missed": {}}}
    name, value = request["names"][0], 5000.0 if kind == "polled" else 2500.0
    assert [event["values"] for event in events] == [{name: value}] * 5
    assert events[-1]["t_s"] > events[0]["t_s"]
    if kind == "streamed":
        pid = (tmp_path / "pid").read_text().split()[-1]
        state = Path(f"/proc/{pid}/stat")
        assert not state.exists() or re.search(r"\) Z", state.read_text())


SLOW_TO_PARSE = """
import sys, time
sys.path.insert(0, sys.argv[1])
import power
from power_source import Channel, Source

def parse(line):
    time.sleep(0.5)
    return None, {"meter meter": 1.0}

channel = Channel("meter", "meter", "power", "total")
source = Source([channel], stream=["/bin/sh", "-c", "echo 1; exec sleep 30"], parse=parse)
polled = Source([Channel("other", "other", "power", "total")], read=lambda: time.sleep(0.2) or {})
events = []
events.append(power.sample([source, polled], 0.02, events.append))
time.sleep(1.0)
print(events)
"""


def test_a_reading_that_comes_after_the_end_does_not_follow_the_result(board: Board) -> None:
    board.power()  # brings the runner
    runner = next(Path(board.root, "runner").iterdir())
    done = subprocess.run(
        [sys.executable, "-c", SLOW_TO_PARSE, str(runner)], input="", capture_output=True, text=True, timeout=60
    )
    assert (done.stdout.strip(), done.stderr) == ("[{'missed': {'other other': 1}}]", "")


def test_a_channel_that_is_not_there_is_named(board: Board, tmp_path: Path) -> None:
    with pytest.raises(PowerUnavailableError, match=r"power sensor rapl psys must be readable, found none that is"):
        board.call("power", {"action": "sample", "names": ["rapl psys"], "sysroot": str(tmp_path)})


def test_power_over_another_transport_object_is_the_same(root: Path) -> None:
    with Board(LocalTransport(), name="bare", python=sys.executable, root=str(root)) as bare:
        assert bare.power().device is None


LINE_PER_GPU = """
import sys
sys.path.insert(0, sys.argv[1])
import power
from power_source import Channel, Source

def parse(line):
    return None, {"GPU " + line: 1.0}

channels = [Channel("GPU", str(index), "power", "share") for index in (0, 1)]
source = Source(channels, stream=["/bin/sh", "-c", "while echo 0 && echo 1; do sleep 0.01; done"], parse=parse)
print(power.sample([source], 0.02, lambda event: print(*event["values"], flush=True)))
"""


def test_what_one_line_of_a_program_does_not_hold_is_not_missing(board: Board) -> None:
    board.power()  # brings the runner
    runner = next(Path(board.root, "runner").iterdir())
    child = subprocess.Popen(
        [sys.executable, "-c", LINE_PER_GPU, str(runner)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdin is not None
    assert child.stdout is not None
    told = {child.stdout.readline().strip() for _ in range(4)}
    child.stdin.close()
    assert told == {"GPU 0", "GPU 1"}
    assert child.stdout.read().splitlines()[-1] == "{'missed': {}}"
    assert child.wait(timeout=10) == 0
