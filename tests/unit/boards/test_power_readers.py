"""What the on-board power readers make of file trees and of what programs print.

Nothing here comes from a board of ours: *documented* texts are as a manual, a driver's source or a public issue has them,
*written-out* ones are made by hand after a documented format. The NVIDIA library is a stub of the documented functions,
compiled here.
"""

from __future__ import annotations

import importlib
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import edgeprune.boards.onboard
from edgeprune.boards.board import Board

ONBOARD = Path(edgeprune.boards.onboard.__file__).parent
NAMES = [*sorted(path.stem for path in ONBOARD.glob("power*.py")), "tree"]


@pytest.fixture(scope="module")
def onboard() -> Iterator[SimpleNamespace]:
    """The readers as they are on a board: modules beside each other, without a package."""
    known = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ONBOARD))
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in NAMES})
    for name in set(sys.modules) - known:
        if getattr(sys.modules[name], "__file__", None) and Path(str(sys.modules[name].__file__)).parent == ONBOARD:
            del sys.modules[name]


def write(folder: Path, files: dict[str, str | bytes], programs: dict[str, str] | None = None) -> Path:
    """A captured tree; None as content makes a folder, which nobody can read as a file."""
    for name, content in {**files, **(programs or {})}.items():
        path = folder / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        if name in (programs or {}):
            path.chmod(0o755)
    return folder


def unreadable(folder: Path, name: str) -> None:
    """A file that not even root can read as one."""
    (folder / name.lstrip("/")).mkdir(parents=True)


def found(onboard: SimpleNamespace, reader: str, folder: Path, **request: Any) -> tuple[list[Any], list[Any]]:
    sources, absences = getattr(onboard, reader).find(onboard.tree.Tree(str(folder)), request)
    return sources, absences


def readings(sources: list[Any]) -> dict[str, float]:
    return {name: value for source in sources for name, value in source.read().items()}


def channels(sources: list[Any]) -> dict[str, Any]:
    return {channel.name: channel for source in sources for channel in source.channels}


# INA3221, INA238 and other hardware monitors -----------------------------------------------------------------------------

INA = "/sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon1"
ORIN_NANO: dict[str, str | bytes] = {  # written out after Linux, Documentation/hwmon/ina3221.rst
    f"{INA}/in1_label": "VDD_IN\n",
    f"{INA}/in1_input": "5008\n",
    f"{INA}/curr1_input": "1200\n",
    f"{INA}/in2_label": "VDD_CPU_GPU_CV\n",
    f"{INA}/in2_input": "5000\n",
    f"{INA}/curr2_input": "300\n",
    f"{INA}/in3_label": "NC\n",
    f"{INA}/in3_input": "0\n",
    f"{INA}/curr3_input": "0\n",
    f"{INA}/in7_label": "sum of shunt voltages\n",
    f"{INA}/in7_input": "0\n",
}


def test_an_ina3221_is_read_by_its_labels_as_volts_times_amperes(onboard: SimpleNamespace, tmp_path: Path) -> None:
    sources, absences = found(onboard, "power_ina3221", write(tmp_path, ORIN_NANO))
    assert absences == []
    assert readings(sources) == pytest.approx({"ina3221 VDD_IN": 6009.6, "ina3221 VDD_CPU_GPU_CV": 1500.0})
    kinds = {name: (channel.kind, channel.role, channel.period_s) for name, channel in channels(sources).items()}
    assert kinds == {
        "ina3221 VDD_IN": ("power", "total", None),
        "ina3221 VDD_CPU_GPU_CV": ("power", "unknown", None),
    }


def test_the_chip_says_itself_over_what_time_it_averages(onboard: SimpleNamespace, tmp_path: Path) -> None:
    folder = write(tmp_path, {**ORIN_NANO, f"{INA}/update_interval": "84\n", f"{INA}/samples": "16\n"})
    total = channels(found(onboard, "power_ina3221", folder)[0])["ina3221 VDD_IN"]
    assert (total.kind, total.period_s, total.window_s) == ("average", 0.084, 0.084)
    assert "ina3221.rst" in total.stated


def test_an_input_that_cannot_be_read_is_an_absence_and_the_others_stay(
    onboard: SimpleNamespace, tmp_path: Path
) -> None:
    folder = write(tmp_path, {name: content for name, content in ORIN_NANO.items() if not name.endswith("curr1_input")})
    unreadable(folder, f"{INA}/curr1_input")
    sources, absences = found(onboard, "power_ina3221", folder)
    assert list(channels(sources)) == ["ina3221 VDD_CPU_GPU_CV"]
    assert absences == [
        {
            "source": "ina3221",
            "reason": f"power sensor ina3221 VDD_IN exists, but its user may not read {INA}/curr1_input.",
            "there": True,
        }
    ]


def test_a_reading_that_fails_later_is_left_out_and_no_zero(onboard: SimpleNamespace, tmp_path: Path) -> None:
    folder = write(tmp_path, ORIN_NANO)
    sources, _ = found(onboard, "power_ina3221", folder)
    (folder / INA.lstrip("/") / "in1_input").write_text("")
    assert readings(sources) == {"ina3221 VDD_CPU_GPU_CV": 1500.0}


def test_the_sensors_of_jetpack_4_tell_milliwatts(onboard: SimpleNamespace, tmp_path: Path) -> None:
    device = "/sys/bus/i2c/drivers/ina3221x/6-0040/iio:device0"  # documented: L4T Development Guide 32.x, Jetson Nano
    rails = {"POM_5V_IN": 2946, "POM_5V_GPU": 0, "POM_5V_CPU": 366}
    files: dict[str, str | bytes] = {}
    for index, (rail, power_mw) in enumerate(rails.items()):
        files |= {f"{device}/rail_name_{index}": f"{rail}\n", f"{device}/in_power{index}_input": f"{power_mw}\n"}
    sources, absences = found(onboard, "power_ina3221", write(tmp_path, files))
    assert absences == []
    assert readings(sources) == {f"ina3221 {rail}": float(power_mw) for rail, power_mw in rails.items()}
    assert [channel.role for channel in channels(sources).values()] == ["total", "unknown", "unknown"]


def test_the_ina238_of_a_thor_is_the_total_in_microwatts(onboard: SimpleNamespace, tmp_path: Path) -> None:
    monitor = "/sys/class/hwmon/hwmon4"  # documented: jetson-stats pull request 900; Documentation/hwmon/ina238.rst
    files: dict[str, str | bytes] = {
        f"{monitor}/name": "ina238\n",
        f"{monitor}/label": "VIN\n",
        f"{monitor}/power1_input": "23400000\n",
        f"{monitor}/curr1_input": "1170\n",
        "/sys/class/power_supply/ucsi-source-psy-1/type": "USB\n",
        "/sys/class/power_supply/ucsi-source-psy-1/current_now": "3000000\n",
    }
    sources, _ = found(onboard, "power_hwmon", write(tmp_path, files))
    assert readings(sources) == {"ina238 VIN": 23400.0}
    assert channels(sources)["ina238 VIN"].role == "total"
    assert found(onboard, "power_battery", tmp_path)[0] == []


def test_other_monitors_tell_averages_and_energy_with_their_units(onboard: SimpleNamespace, tmp_path: Path) -> None:
    files: dict[str, str | bytes] = {  # written out after Documentation/hwmon/sysfs-interface.rst
        "/sys/class/hwmon/hwmon0/name": "power_meter\n",
        "/sys/class/hwmon/hwmon0/power1_average": "187000000\n",
        "/sys/class/hwmon/hwmon0/power1_average_interval": "1000\n",
        "/sys/class/hwmon/hwmon1/name": "ina228\n",
        "/sys/class/hwmon/hwmon1/power1_input": "1000000\n",
        "/sys/class/hwmon/hwmon1/energy1_input": "123456789\n",
        "/sys/class/hwmon/hwmon2/name": "broken\n",
        "/sys/class/hwmon/hwmon2/power1_input": "no number\n",
    }
    sources, absences = found(onboard, "power_hwmon", write(tmp_path, files))
    assert readings(sources) == {
        "hwmon ina228 1 energy": 123456.789,
        "hwmon power_meter 1 average": 187000.0,
        "hwmon ina228 1": 1000.0,
    }
    average = channels(sources)["hwmon power_meter 1 average"]
    assert (average.kind, average.window_s) == ("average", 1.0)
    counter, moment = (channels(sources)[name] for name in ("hwmon ina228 1 energy", "hwmon ina228 1"))
    assert (counter.kind, counter.rail) == ("energy", moment.rail), "two ways to read one rail"
    assert [absence["there"] for absence in absences] == [True]


# RAPL ---------------------------------------------------------------------------------------------------------------------

ZONES = {
    "intel-rapl:0": "package-0",
    "intel-rapl:0:0": "core",
    "intel-rapl:0:1": "dram",
    "intel-rapl:1": "psys",
    "intel-rapl-mmio:0": "package-0",
}
RAPL: dict[str, str | bytes] = {  # written out after Documentation/power/powercap/powercap.rst
    f"/sys/class/powercap/{zone}/{name}": value
    for zone, title in ZONES.items()
    for name, value in (
        ("name", f"{title}\n"),
        ("energy_uj", "1000000\n"),
        ("max_energy_range_uj", "262143328850\n"),
    )
}


def test_rapl_zones_are_counters_with_their_wrap_and_their_place(onboard: SimpleNamespace, tmp_path: Path) -> None:
    sources, absences = found(onboard, "power_rapl", write(tmp_path, RAPL))
    assert absences == []
    assert readings(sources) == dict.fromkeys(
        ["rapl package-0", "rapl package-0 core", "rapl package-0 dram", "rapl psys"], 1000.0
    )
    assert {name: channel.role for name, channel in channels(sources).items()} == {
        "rapl package-0": "share",
        "rapl package-0 core": "inside",
        "rapl package-0 dram": "share",
        "rapl psys": "total",
    }
    assert channels(sources)["rapl psys"].wrap_mj == 262143328.850


def test_a_rapl_counter_for_root_alone_is_an_absence(onboard: SimpleNamespace, tmp_path: Path) -> None:
    folder = write(tmp_path, {"/sys/class/powercap/intel-rapl:0/name": "package-0\n"})
    unreadable(folder, "/sys/class/powercap/intel-rapl:0/energy_uj")
    sources, absences = found(onboard, "power_rapl", folder)
    assert sources == []
    assert absences[0]["there"]
    assert "may not read /sys/class/powercap/intel-rapl:0/energy_uj" in absences[0]["reason"]


# Raspberry Pi -------------------------------------------------------------------------------------------------------------

PMIC_FORMS = {
    "numbered": (  # documented: https://github.com/jfikar/RPi5-power
        "     VDD_CORE_A current(7)=1.23400000A\n"
        "     DDR_VDD2_A current(2)=0.05000000A\n"
        "     VDD_CORE_V volt(15)=0.87500000V\n"
        "     DDR_VDD2_V volt(10)=1.10000000V\n"
        "     EXT5V_V volt(24)=5.12000000V\n"
        "      BATT_V volt(25)=0.00000000V\n"
    ),
    "short": "VDD_CORE_A=1.234A\nDDR_VDD2_A=0.05A\nVDD_CORE_V=0.875V\nDDR_VDD2_V=1.1V\nEXT5V_V=5.12V\n",  # written out
}


@pytest.mark.parametrize("form", PMIC_FORMS)
def test_the_rails_of_a_raspberry_pi_5_are_those_with_current_and_voltage(onboard: SimpleNamespace, form: str) -> None:
    rails = onboard.power_pmic.parse(PMIC_FORMS[form])
    assert rails == pytest.approx({"VDD_CORE": 1079.75, "DDR_VDD2": 55.0})


def test_the_firmware_is_asked_anew_for_every_reading(onboard: SimpleNamespace, tmp_path: Path) -> None:
    script = f"#!/bin/sh\necho x >> {tmp_path}/asked\ncat <<END\n{PMIC_FORMS['numbered']}END\n"
    sources, absences = found(onboard, "power_pmic", write(tmp_path, {}, {"/usr/bin/vcgencmd": script}))
    assert absences == []
    assert readings(sources) == pytest.approx({"pmic VDD_CORE": 1079.75, "pmic DDR_VDD2": 55.0})
    assert {channel.role for channel in channels(sources).values()} == {"share"}
    assert len((tmp_path / "asked").read_text().split()) == 2


def test_a_raspberry_pi_4_has_the_program_and_no_currents(onboard: SimpleNamespace, tmp_path: Path) -> None:
    script = (
        '#!/bin/sh\n[ "$1" != get_throttled ] || exec echo throttled=0x0\n'
        'echo "error=1 error_msg=\\"Command not registered\\""\nexit 1\n'
    )
    sources, absences = found(onboard, "power_pmic", write(tmp_path, {}, {"/usr/bin/vcgencmd": script}))
    assert sources == []
    assert "tells no rail with a current and a voltage" in absences[0]["reason"]
    assert not absences[0]["there"]


def test_a_firmware_that_this_user_may_not_ask_is_said_to_be_there(onboard: SimpleNamespace, tmp_path: Path) -> None:
    # Documented: github.com/raspberrypi/utils issue 52.
    script = '#!/bin/sh\necho "Can\'t open device file: /dev/vcio" >&2\nexit 1\n'
    sources, absences = found(onboard, "power_pmic", write(tmp_path, {}, {"/usr/bin/vcgencmd": script}))
    assert sources == []
    assert absences[0]["there"]
    assert "its user must be in the group of /dev/vcio" in absences[0]["reason"]


# Android ------------------------------------------------------------------------------------------------------------------

BATTERY = "/sys/class/power_supply/battery"
PHONE: dict[str, str | bytes] = {  # written out after Documentation/ABI/testing/sysfs-class-power
    f"{BATTERY}/type": "Battery\n",
    f"{BATTERY}/status": "Discharging\n",
    f"{BATTERY}/current_now": "-412000\n",
    f"{BATTERY}/voltage_now": "3850000\n",
    "/sys/class/power_supply/mouse/type": "Battery\n",
    "/sys/class/power_supply/mouse/scope": "Device\n",
    "/sys/class/power_supply/mouse/status": "Discharging\n",
}


def test_a_discharging_battery_is_the_total_whatever_the_sign(onboard: SimpleNamespace, tmp_path: Path) -> None:
    sources, absences = found(onboard, "power_battery", write(tmp_path, PHONE))
    assert absences == []
    assert readings(sources) == pytest.approx({"battery battery": 412 * 3.85})
    assert channels(sources)["battery battery"].role == "total"
    (tmp_path / BATTERY.lstrip("/") / "status").write_text("Charging\n")
    assert readings(sources) == {}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"status": "Charging\n"}, "its status is Charging"),
        ({"current_now": "412\n"}, "too little for a running board; some makers use other units"),
        ({"voltage_now": "\n"}, "it tells neither power_now nor current_now and voltage_now"),
    ],
)
def test_a_battery_that_does_not_tell_the_power_says_why(
    onboard: SimpleNamespace, tmp_path: Path, changed: dict[str, str], words: str
) -> None:
    files = {**PHONE, **{f"{BATTERY}/{name}": content for name, content in changed.items()}}
    sources, absences = found(onboard, "power_battery", write(tmp_path, files))
    assert sources == []
    assert words in absences[0]["reason"]
    assert absences[0]["there"]


def test_a_laptop_that_tells_its_power_itself_is_believed(onboard: SimpleNamespace, tmp_path: Path) -> None:
    folder = "/sys/class/power_supply/BAT0"
    files: dict[str, str | bytes] = {
        f"{folder}/type": "Battery\n",
        f"{folder}/status": "Discharging\n",
        f"{folder}/power_now": "7300000\n",
    }
    assert readings(found(onboard, "power_battery", write(tmp_path, files))[0]) == {"battery BAT0": 7300.0}


ODPM = (  # the form is documented in the Android kernel's drivers/iio/power/odpm.c; the figures are written out
    "t=350487\n"
    "CH0(T=350487)[S10M_VDD_TPU], 47983\n"
    "CH1(T=350487)[VSYS_PWR_MODEM], 2010523\n"
    "CH3(T=350487)[S2M_VDD_CPUCL2], 45091183\n"
)


def test_the_rails_of_a_pixel_are_energy_counters(onboard: SimpleNamespace, tmp_path: Path) -> None:
    folder = write(tmp_path, {"/sys/bus/iio/devices/iio:device0/energy_value": ODPM})
    sources, absences = found(onboard, "power_odpm", folder)
    assert absences == []
    assert len(sources) == 1
    assert readings(sources) == {
        "odpm S10M_VDD_TPU": 47.983,
        "odpm VSYS_PWR_MODEM": 2010.523,
        "odpm S2M_VDD_CPUCL2": 45091.183,
    }
    assert {channel.kind for channel in channels(sources).values()} == {"energy"}


# tegrastats ---------------------------------------------------------------------------------------------------------------

TEGRASTATS = {
    "JetPack 4, Nano": (  # documented: github.com/laminair/jetson_stats_node_exporter and others, captured on JetPack 4.6.1
        "RAM 1923/3964MB (lfb 2x2MB) SWAP 191/1982MB (cached 6MB) IRAM 0/252kB(lfb 252kB) "
        "CPU [5%@1224,4%@1224,3%@1224,6%@1224] EMC_FREQ 0%@1600 GR3D_FREQ 0%@76 APE 25 PLL@37C CPU@40C PMIC@50C GPU@40C "
        "AO@45C thermal@40C POM_5V_IN 1750/1628 POM_5V_GPU 0/0 POM_5V_CPU 366/406",
        {"POM_5V_IN": 1750.0, "POM_5V_GPU": 0.0, "POM_5V_CPU": 366.0},
    ),
    "JetPack 4, TX2": (  # documented: github.com/henrygd/beszel pull request 1631
        "RAM 3276/7859MB (lfb 5x4MB) SWAP 1626/12122MB (cached 181MB) CPU [44%@1421,49%@2031] EMC_FREQ 1%@1866 GR3D_FREQ "
        "0%@114 APE 150 MTS fg 1% bg 1% PLL@42.5C Tdiode@39.25C VDD_SYS_GPU 182/182 VDD_SYS_SOC 730/730 VDD_4V0_WIFI 0/0 "
        "VDD_IN 5297/5297 VDD_SYS_CPU 1917/1917 VDD_SYS_DDR 1241/1241",
        {
            "VDD_SYS_GPU": 182.0,
            "VDD_SYS_SOC": 730.0,
            "VDD_4V0_WIFI": 0.0,
            "VDD_IN": 5297.0,
            "VDD_SYS_CPU": 1917.0,
            "VDD_SYS_DDR": 1241.0,
        },
    ),
    "JetPack 6, AGX Orin": (  # written out after the documented form with units
        "RAM 6085/62841MB (lfb 3x4MB) SWAP 0/31421MB (cached 0MB) CPU [9%@1420,off,off,off] GR3D_FREQ 0%@[305,305] "
        "cv0@-256C cpu@45.5C VDD_GPU_SOC 5139mW/5139mW VDD_CPU_CV 1187mW/1187mW VIN_SYS_5V0 3821mW/3821mW",
        {"VDD_GPU_SOC": 5139.0, "VDD_CPU_CV": 1187.0, "VIN_SYS_5V0": 3821.0},
    ),
    "JetPack 7, AGX Orin": (  # written out: a date before, three values per rail
        "07-25-2026 09:08:28 RAM 6085/62841MB (lfb 3x4MB) CPU [9%@1420] GR3D_FREQ 12%@[1300,1300] "
        "VDD_GPU_SOC 5139mW/5000mW/9000mW VDD_CPU_CV 1187mW/1187mW/1200mW",
        {"VDD_GPU_SOC": 5139.0, "VDD_CPU_CV": 1187.0},
    ),
    "JetPack 7, Thor": (  # written out: no share of the GPU, a rail below zero when its calibration is off
        "RAM 9000/125772MB (lfb 12x512kB) CPU [1%@972] GR3D_FREQ @[1000,1000,1000] tj@55.1C VDD_GPU -392mW/0mW "
        "VDD_CPU_SOC_MSS 3924mW/3900mW VIN_SYS_5V0 6520mW/6500mW VIN 23100mW/23000mW",
        {"VDD_GPU": -392.0, "VDD_CPU_SOC_MSS": 3924.0, "VIN_SYS_5V0": 6520.0, "VIN": 23100.0},
    ),
}


@pytest.mark.parametrize("release", TEGRASTATS)
def test_tegrastats_of_every_release_is_read_by_shape_and_not_by_place(onboard: SimpleNamespace, release: str) -> None:
    line, rails = TEGRASTATS[release]
    assert onboard.power_tegrastats.parse(line) == rails


def test_tegrastats_is_followed_and_not_asked(onboard: SimpleNamespace, tmp_path: Path) -> None:
    line, rails = TEGRASTATS["JetPack 7, Thor"]
    script = f"#!/bin/sh\necho starting\nwhile :; do echo '{line}'; sleep 0.02; done\n"
    sources, absences = found(onboard, "power_tegrastats", write(tmp_path, {}, {"/usr/bin/tegrastats": script}))
    assert absences == []
    (source,) = sources
    assert source.stream[1:] == ["--interval", "100"]
    assert source.parse(line) == (None, {f"tegrastats {rail}": value for rail, value in rails.items()})
    assert channels(sources)["tegrastats VIN"].role == "total"


def test_a_tegrastats_that_prints_no_rail_is_an_absence(onboard: SimpleNamespace, tmp_path: Path) -> None:
    script = "#!/bin/sh\necho 'RAM 1985/7765MB CPU [9%@1420]'\n"
    sources, absences = found(onboard, "power_tegrastats", write(tmp_path, {}, {"/usr/bin/tegrastats": script}))
    assert sources == []
    assert absences[0]["there"]
    assert "RAM 1985/7765MB" in absences[0]["reason"]


# NVIDIA -------------------------------------------------------------------------------------------------------------------


def smi(answers: dict[str, str]) -> str:
    """A program that answers to the field that is asked for; fields that it does not know are an error."""
    cases = "".join(f"*{field},*|*{field}) printf '{text}' ;;\n" for field, text in answers.items())
    return f"#!/bin/sh\ncase \"$1\" in\n{cases}*) echo 'is not a valid field to query.'; exit 2 ;;\nesac\n"


def test_nvidia_smi_is_asked_for_the_moment_first(onboard: SimpleNamespace, tmp_path: Path) -> None:
    programs = {"/usr/bin/nvidia-smi": smi({"power.draw.instant": "0, 31.25\\n1, [N/A]\\n"})}
    sources, absences = found(onboard, "power_nvidia_smi", write(tmp_path, {}, programs))
    assert absences == []
    (source,) = sources
    assert [(channel.name, channel.kind) for channel in source.channels] == [("nvidia-smi GPU 0", "power")]
    assert source.stream[-2:] == ["-lms", "100"]
    assert source.parse("0, 45.5") == (None, {"nvidia-smi GPU 0": 45500.0})
    assert source.parse("1, 45.5") == source.parse("[Not Supported]") == (None, {})


def test_an_older_nvidia_smi_tells_an_average(onboard: SimpleNamespace, tmp_path: Path) -> None:
    programs = {"/usr/bin/nvidia-smi": smi({"power.draw": "0, 31.25\\n"})}
    sources, _ = found(onboard, "power_nvidia_smi", write(tmp_path, {}, programs))
    (channel,) = channels(sources).values()
    assert (channel.kind, channel.window_s) == ("average", 1.0)


def test_an_nvidia_smi_of_a_jetson_tells_nothing(onboard: SimpleNamespace, tmp_path: Path) -> None:
    programs = {"/usr/bin/nvidia-smi": smi({"power.draw.instant": "0, [N/A]\\n", "power.draw": "0, [N/A]\\n"})}
    sources, absences = found(onboard, "power_nvidia_smi", write(tmp_path, {}, programs))
    assert sources == []
    assert absences[0]["there"]


STUB = """
#include <stdint.h>
int nvmlInit_v2(void) { return INIT; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 2; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) {
    if (index == 1) return 4;
    *device = (void *)(uintptr_t)0x123456789abcULL;
    return 0;
}
int nvmlDeviceGetCudaComputeCapability(void *device, int *major, int *minor) { *major = 9; *minor = 0; return 0; }
int nvmlDeviceGetPowerUsage(void *device, unsigned *milliwatts) {
    *milliwatts = 71234;
    return (uintptr_t)device == 0x123456789abcULL ? POWER : 2;
}
#ifdef ENERGY
int nvmlDeviceGetTotalEnergyConsumption(void *device, unsigned long long *millijoules) {
    *millijoules = 5000000000ULL;
    return ENERGY;
}
#endif
"""


def stub(folder: Path, **values: int) -> str:
    """A library of the documented functions that answers as it is told."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("the emulated NVIDIA library needs a C compiler (cc or gcc), this machine has none")
    source, library = folder / "nvml.c", folder / "libnvidia-ml.so.1"
    source.write_text(STUB)
    defines = [f"-D{name}={value}" for name, value in values.items()]
    subprocess.run([compiler, "-shared", "-fPIC", *defines, "-o", str(library), str(source)], check=True)
    return str(library)


def nvml(onboard: SimpleNamespace, library: str) -> tuple[list[Any], list[Any]]:
    sources, absences = onboard.power_nvml.find(onboard.tree.Tree("/"), {"nvml": library})
    return sources, absences


def test_the_driver_s_counter_comes_before_its_power(onboard: SimpleNamespace, tmp_path: Path) -> None:
    sources, absences = nvml(onboard, stub(tmp_path, INIT=0, POWER=0, ENERGY=0))
    assert readings(sources) == {"nvml GPU 0 energy": 5e9, "nvml GPU 0 power": 71234.0}
    assert list(channels(sources)) == ["nvml GPU 0 energy", "nvml GPU 0 power"]
    usage = channels(sources)["nvml GPU 0 power"]
    assert (usage.kind, usage.window_s, usage.role) == ("average", 1.0, "share")
    assert [absence["reason"] for absence in absences] == [
        "GPU 1 cannot be asked: nvmlDeviceGetHandleByIndex_v2 said NO_PERMISSION."
    ]


def test_a_jetson_s_driver_that_supports_nothing_is_a_stated_absence(onboard: SimpleNamespace, tmp_path: Path) -> None:
    sources, absences = nvml(onboard, stub(tmp_path, INIT=0, POWER=3, ENERGY=3))
    assert sources == []
    assert absences[0]["there"]
    assert absences[0]["reason"] == (
        "GPU 0 is listed by the driver, but its power cannot be read: nvmlDeviceGetTotalEnergyConsumption said "
        "NOT_SUPPORTED, nvmlDeviceGetPowerUsage said NOT_SUPPORTED."
    )


def test_a_driver_without_the_counter_still_tells_power(onboard: SimpleNamespace, tmp_path: Path) -> None:
    sources, _ = nvml(onboard, stub(tmp_path, INIT=0, POWER=0))
    assert list(channels(sources)) == ["nvml GPU 0 power"]


def test_a_driver_that_does_not_start_says_why(onboard: SimpleNamespace, tmp_path: Path) -> None:
    sources, absences = nvml(onboard, stub(tmp_path, INIT=9, POWER=0, ENERGY=0))
    assert sources == []
    assert "nvmlInit_v2 said DRIVER_NOT_LOADED" in absences[0]["reason"]


def test_a_board_reads_the_driver_that_its_loader_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way, by the library's own name and in the runner's process; emulated, the library is the stub."""
    stub(tmp_path, INIT=0, POWER=0, ENERGY=0)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    monkeypatch.setenv("EDGEPRUNE_ROOT", str(tmp_path / "board"))
    with Board.open("local") as board:
        power = board.power()
    assert {sensor.name: sensor.value for sensor in power.sensors if sensor.source == "nvml"} == {
        "nvml GPU 0 energy": 5e9,
        "nvml GPU 0 power": 71234.0,
    }
    assert "GPU 1 cannot be asked: nvmlDeviceGetHandleByIndex_v2 said NO_PERMISSION." in [
        absence.reason for absence in power.absences
    ]


def test_no_library_is_no_nvidia_driver(onboard: SimpleNamespace, tmp_path: Path) -> None:
    sources, absences = nvml(onboard, str(tmp_path / "none.so"))
    assert sources == []
    assert not absences[0]["there"]


@pytest.mark.parametrize(
    ("capability", "meaning"),
    [
        (None, ("power", None)),
        ((7, 5), ("power", 0.0)),
        ((8, 0), ("power", 0.0)),
        ((8, 6), ("average", 1.0)),
        ((9, 0), ("average", 1.0)),
    ],
)
def test_what_the_driver_s_power_means_depends_on_the_generation(
    onboard: SimpleNamespace, capability: tuple[int, int] | None, meaning: tuple[str, float | None]
) -> None:
    assert onboard.power_nvml.meaning(capability) == meaning


# External meters ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "reading"),
    [
        ("4.25", (None, 4.25)),
        ("1763660000.125 4.25", (1763660000.125, 4.25)),
        ("12.5,4.25", (12.5, 4.25)),
        ("12.5; 4.25", (12.5, 4.25)),
        ("12.5\t-0.01", (12.5, -0.01)),
        ("time power", None),
        ("1 2 3", None),
        ("nan", None),
        ("inf", None),
        ("1e9", None),
        ("", None),
    ],
)
def test_a_meter_s_line_is_watts_with_or_without_seconds(
    onboard: SimpleNamespace, line: str, reading: tuple[float | None, float] | None
) -> None:
    assert onboard.power_meter.parse(line) == reading


def test_a_meter_s_clock_is_the_time_of_day_or_set_by_its_first_line(onboard: SimpleNamespace) -> None:
    now, day = time.monotonic(), time.time()
    assert onboard.power_meter.Clock().monotonic_s(day - 1.5) == pytest.approx(now - 1.5, abs=0.05)
    other = onboard.power_meter.Clock()
    assert other.monotonic_s(17.0) == pytest.approx(time.monotonic(), abs=0.05)
    assert other.monotonic_s(19.5) - other.monotonic_s(17.0) == pytest.approx(2.5)


@pytest.mark.parametrize(
    ("command", "period_s"),
    [
        ("for t in 0 0.1 0.2 0.3 0.4; do echo $t 3.5; done; sleep 9", 0.1),  # its own seconds, kept back by a buffer
        ("printf '3\\n3\\n3\\n3\\n3\\n'; sleep 9", None),  # a burst tells nothing
        ("echo watts; echo 3.5", None),
    ],
)
def test_a_meter_s_period_is_seen_in_its_first_readings(
    onboard: SimpleNamespace, tmp_path: Path, command: str, period_s: float | None
) -> None:
    sources, absences = found(onboard, "power_meter", tmp_path, meter=command)
    assert absences == []
    (channel,) = channels(sources).values()
    assert channel.period_s == (None if period_s is None else pytest.approx(period_s))


def test_a_meter_that_prints_no_watts_says_what_it_said(onboard: SimpleNamespace, tmp_path: Path) -> None:
    sources, absences = found(onboard, "power_meter", tmp_path, meter="echo no such device >&2; exit 1")
    assert sources == []
    assert absences[0]["reason"].endswith("printed none within 5 s: no such device.")


# Whatever lies there ------------------------------------------------------------------------------------------------------

TEXTS = st.text(max_size=300) | st.binary(max_size=300).map(lambda data: data.decode("utf-8", "replace"))
SAMPLES = [*PMIC_FORMS.values(), ODPM, *(line for line, _ in TEGRASTATS.values()), "0, 31.25\n", "1763660000.1 4.2"]


@st.composite
def damaged(draw: st.DrawFn) -> str:
    """A sample with a piece of it replaced by anything."""
    text = draw(st.sampled_from(SAMPLES))
    start = draw(st.integers(0, len(text)))
    return text[:start] + draw(TEXTS) + text[draw(st.integers(start, len(text))) :]


@settings(max_examples=300, deadline=None)
@given(text=TEXTS | damaged())
def test_no_text_breaks_a_parser_and_none_gives_what_is_no_number(onboard: SimpleNamespace, text: str) -> None:
    for parser in ("power_pmic", "power_odpm", "power_tegrastats", "power_nvidia_smi"):
        for value in getattr(onboard, parser).parse(text).values():
            assert value is None or math.isfinite(value)
    reading = onboard.power_meter.parse(text)
    assert reading is None or math.isfinite(reading[1])
    value = onboard.power_rapl.counter_mj(text)
    assert value is None or value >= 0


TREES = {
    "power_ina3221": ORIN_NANO,
    "power_hwmon": {
        "/sys/class/hwmon/hwmon4/name": "ina238\n",
        "/sys/class/hwmon/hwmon4/label": "VIN\n",
        "/sys/class/hwmon/hwmon4/power1_input": "1\n",
    },
    "power_rapl": RAPL,
    "power_battery": PHONE,
    "power_odpm": {"/sys/bus/iio/devices/iio:device0/energy_value": ODPM},
}


@pytest.mark.parametrize("reader", TREES)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_content_of_a_file_breaks_a_reader(
    onboard: SimpleNamespace, tmp_path: Path, reader: str, data: st.DataObject
) -> None:
    files = TREES[reader]
    broken = data.draw(st.sets(st.sampled_from(sorted(files)), min_size=1))
    anything = st.binary(max_size=40) | st.integers(1, 5000).map(lambda digits: b"9" * digits)
    contents = {name: data.draw(anything) if name in broken else files[name] for name in files}
    sources, absences = found(onboard, reader, write(tmp_path, contents))
    assert sources or absences
    for value in readings(sources).values():
        assert math.isfinite(value)


def test_of_sensors_with_one_name_the_first_is_read_and_that_is_said(onboard: SimpleNamespace, tmp_path: Path) -> None:
    second = {name.replace("1-0040", "2-0040"): content for name, content in ORIN_NANO.items()}
    sources, absences = onboard.power.find(onboard.tree.Tree(str(write(tmp_path, {**ORIN_NANO, **second}))), {})
    assert [channel.name for source in sources for channel in source.channels] == [
        "ina3221 VDD_IN",
        "ina3221 VDD_CPU_GPU_CV",
    ]
    reasons = [absence["reason"] for absence in absences if absence["there"]]
    assert reasons == [
        f"power sensor ina3221 {rail} is there more than once, and only the first one is read."
        for rail in ("VDD_IN", "VDD_CPU_GPU_CV")
    ]


def test_every_reader_is_in_the_registry_and_says_its_absence(onboard: SimpleNamespace, tmp_path: Path) -> None:
    readers: list[ModuleType] = list(onboard.power.READERS)
    assert {reader.__name__ for reader in readers} == {
        name for name in NAMES if name.startswith("power_") and name != "power_source"
    }
    sources, absences = onboard.power.find(onboard.tree.Tree(str(tmp_path)), {})
    assert sources == []
    # The library of a driver is looked for on the running machine alone, and a meter is there when it is given.
    assert {absence["source"] for absence in absences} == {
        reader.NAME
        for reader in readers
        if reader.NAME not in ("nvml", "meter")  # type: ignore[attr-defined]
    }
