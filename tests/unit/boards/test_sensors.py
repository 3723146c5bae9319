"""State that is noted before and after a measurement: trees after the kernel's documents, texts after nvidia-smi's help."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import edgeprune.boards.onboard

ONBOARD = Path(edgeprune.boards.onboard.__file__).parent


@pytest.fixture(scope="module")
def onboard() -> Iterator[SimpleNamespace]:
    """The modules as they are on a board: beside each other, without a package."""
    names = ("tree", "gpus", "sensors")
    before = {name: sys.modules.get(name) for name in names}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ONBOARD))
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    for name, module in before.items():
        if module is None:
            sys.modules.pop(name, None)


def write(folder: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        path = folder / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


CPUFREQ = "/sys/devices/system/cpu/cpu0/cpufreq"
ORIN = {  # written out after Documentation/hwmon/sysfs-interface.rst and the Jetson Linux Developer Guide
    f"{CPUFREQ}/scaling_cur_freq": "1510400\n",
    f"{CPUFREQ}/scaling_min_freq": "1510400\n",
    f"{CPUFREQ}/scaling_max_freq": "1510400\n",
    f"{CPUFREQ}/scaling_governor": "schedutil\n",
    "/sys/class/devfreq/17000000.gpu/cur_freq": "306000000\n",
    "/sys/class/devfreq/17000000.gpu/min_freq": "306000000\n",
    "/sys/class/devfreq/17000000.gpu/max_freq": "624750000\n",
    "/sys/kernel/debug/bpmp/debug/clk/emc/rate": "2133000000\n",
    "/sys/class/hwmon/hwmon2/name": "pwmfan\n",
    "/sys/class/hwmon/hwmon2/pwm1": "77\n",
    "/sys/class/hwmon/hwmon2/pwm1_enable": "1\n",
    "/sys/class/hwmon/hwmon0/name": "pwm_tach\n",
    "/sys/class/hwmon/hwmon0/fan1_input": "1496\n",
    "/proc/loadavg": "0.20 0.10 0.09 1/180 2345\n",
}


def test_clocks_those_that_are_held_and_fans_are_noted(onboard: SimpleNamespace, tmp_path: Path) -> None:
    write(tmp_path, ORIN)
    found = onboard.sensors.conditions(onboard.tree.Tree(str(tmp_path)))
    assert found["clocks_khz"] == {"cpu0": 1510400, "17000000.gpu": 306000, "emc": 2133000}
    assert found["clocks_held"] == ["cpu0"]
    assert found["fans"] == {"pwmfan 1": {"pwm": 77}, "pwm_tach 1": {"rpm": 1496}}
    assert (found["governors"], found["load"], found["throttling"]) == (["schedutil"], 0.2, [])
    assert "gpus" not in found


def test_what_a_board_does_not_tell_is_left_out(onboard: SimpleNamespace, tmp_path: Path) -> None:
    found = onboard.sensors.conditions(onboard.tree.Tree(str(tmp_path)))
    assert (found["clocks_khz"], found["clocks_held"], found["fans"], found["load"]) == ({}, [], {}, None)


def test_what_a_module_does_against_its_supply_is_throttling(onboard: SimpleNamespace, tmp_path: Path) -> None:
    folder = "/sys/class/hwmon/hwmon3"  # written out after NVIDIA's driver of soctherm-oc-event
    events = {"oc1": ("0", "1"), "oc2": ("15", "0"), "oc3": ("37", "1")}
    counts = {f"{folder}/{name}_event_cnt": f"{count}\n" for name, (count, _) in events.items()}
    enabled = {f"{folder}/{name}_throt_en": f"{on}\n" for name, (_, on) in events.items()}
    write(tmp_path, {f"{folder}/name": "soctherm_oc\n", **counts, **enabled})
    said = (
        "too low a voltage or too high a current (oc3) made the module lower its clocks 37 times since it was started."
    )
    assert onboard.sensors.throttling(onboard.tree.Tree(str(tmp_path))) == [said]
    assert onboard.sensors.fans(onboard.tree.Tree(str(tmp_path))) == {}
    (tmp_path / folder.lstrip("/") / "oc3_event_cnt").write_text("-1\n")
    assert onboard.sensors.throttling(onboard.tree.Tree(str(tmp_path))) == []


ROWS = "0, 1980, 2619, 61, 0x0000000000000004\n1, 345, [N/A], 33, 0x0000000000000001\n"


@pytest.mark.parametrize("field", ["clocks_event_reasons.active", "clocks_throttle_reasons.active"])
def test_a_gpu_tells_what_holds_its_clocks_down(onboard: SimpleNamespace, tmp_path: Path, field: str) -> None:
    program = tmp_path / "usr" / "bin" / "nvidia-smi"
    program.parent.mkdir(parents=True)
    program.write_text(
        f'#!/bin/sh\ncase "$1" in *{field}) cat <<END\n{ROWS}END\n;; *) echo not a valid field; exit 2;; esac\n'
    )
    program.chmod(0o755)
    found = onboard.sensors.conditions(onboard.tree.Tree(str(tmp_path)))
    assert found["gpus"] == [
        {"index": 0, "sm_mhz": 1980, "memory_mhz": 2619, "celsius": 61, "reasons": 4},
        {"index": 1, "sm_mhz": 345, "celsius": 33, "reasons": 1},
    ]
    assert found["throttling"] == ["clocks of GPU 0 are held down by its power limit."]


def test_a_jetson_s_nvidia_smi_tells_nothing(onboard: SimpleNamespace) -> None:
    assert onboard.gpus.parse("0, [N/A], [N/A], [N/A], [N/A]\n") == []


@settings(max_examples=100, deadline=None)
@given(
    text=st.text(max_size=200) | st.lists(st.sampled_from([*"0123456789,x[]NA/-\n ", "0x"]), max_size=60).map("".join)
)
def test_no_text_breaks_the_parser(onboard: SimpleNamespace, text: str) -> None:
    for gpu in onboard.gpus.parse(text):
        assert all(isinstance(value, int) for value in gpu.values())
    onboard.gpus.throttling(onboard.gpus.parse(text))
