"""What the probe makes of boards: of this machine, and of trees of /proc, /sys and /etc as other boards have them.

The trees are written out here from documented formats: NVIDIA's Jetson Linux Developer Guide and ``nvpmodel -q`` (Jetson),
the Raspberry Pi documentation and a Raspberry Pi 5's /proc/cpuinfo, and the kernel's ABI documents for everything in sysfs.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import struct
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgeprune.backends.onnxruntime.backend import OnnxRuntime
from edgeprune.boards.board import Board
from edgeprune.boards.installing import for_board
from edgeprune.boards.local import LocalTransport
from edgeprune.spec import Fingerprint

ProbeTree = Callable[..., Fingerprint]

CPUFREQ = "/sys/devices/system/cpu/cpu{}/cpufreq/{}"

RASPBERRY_PI_5 = {
    "/proc/cpuinfo": "\n".join(
        f"processor\t: {core}\nBogoMIPS\t: 108.00\n"
        "Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp\n"
        "CPU implementer\t: 0x41\nCPU architecture: 8\nCPU variant\t: 0x4\nCPU part\t: 0xd0b\nCPU revision\t: 1\n"
        for core in range(4)
    )
    + "\nHardware\t: BCM2835\nRevision\t: c04170\nModel\t\t: Raspberry Pi 5 Model B Rev 1.0\n",
    "/proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\0",
    "/proc/meminfo": "MemTotal:        8245696 kB\nMemFree:          100 kB\nMemAvailable:    7000000 kB\n",
    "/proc/loadavg": "0.12 0.10 0.09 1/180 2345\n",
    "/proc/sys/kernel/osrelease": "6.6.31+rpt-rpi-2712\n",
    "/etc/os-release": 'NAME="Debian GNU/Linux"\nPRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\n',
    "/etc/machine-id": "0123456789abcdef0123456789abcdef\n",
    "/sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
    "/sys/class/thermal/thermal_zone0/temp": "48200\n",
    "/sys/class/thermal/cooling_device0/type": "pwm-fan\n",
    "/sys/class/thermal/cooling_device0/cur_state": "2\n",
    **{CPUFREQ.format(core, "scaling_governor"): "ondemand\n" for core in range(4)},
    **{CPUFREQ.format(core, "scaling_cur_freq"): "1500000\n" for core in range(4)},
    **{CPUFREQ.format(core, "scaling_max_freq"): "2400000\n" for core in range(4)},
    **{CPUFREQ.format(core, "related_cpus"): "0 1 2 3\n" for core in range(4)},
}
VCGENCMD = """#!/bin/sh
case "$1" in
get_throttled) echo "throttled=0x50005" ;;
pmic_read_adc) cat <<END
     VDD_CORE_A current(7)=1.23400000A
     VDD_CORE_V volt(15)=0.87500000V
     DDR_VDD2_A current(2)=0.05000000A
     DDR_VDD2_V volt(10)=1.10000000V
     EXT5V_V volt(24)=5.12000000V
     BATT_V volt(25)=0.00000000V
END
;;
*) exit 1 ;;
esac
"""

INA = "/sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon1"
JETSON = {
    "/proc/cpuinfo": "\n".join(
        f"processor\t: {core}\nFeatures\t: fp asimd atomics fphp asimdhp asimddp\n"
        "CPU implementer\t: 0x41\nCPU part\t: 0xd42\n"
        for core in range(6)
    ),
    "/proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit\0",
    "/proc/meminfo": "MemTotal:        7802000 kB\n",
    "/proc/loadavg": "4.50 1.00 0.50 1/300 999\n",
    "/etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n",
    "/etc/os-release": "PRETTY_NAME='Ubuntu 22.04.5 LTS'\n",
    "/var/lib/dpkg/status": (
        "Package: bash\nStatus: install ok installed\nVersion: 5.1-6ubuntu1\n\n"
        "Package: nvidia-jetpack\nStatus: install ok installed\nMaintainer: NVIDIA\nVersion: 6.2+b77\n\n"
        "Package: zlib1g\nVersion: 1:1.2.11\n"
    ),
    "/sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
    "/sys/class/thermal/thermal_zone0/temp": "61500\n",
    "/sys/class/thermal/thermal_zone1/type": "cv0-thermal\n",
    "/sys/class/thermal/thermal_zone1/temp": "-256000\n",
    "/sys/class/thermal/cooling_device3/type": "cpufreq-cpu0\n",
    "/sys/class/thermal/cooling_device3/cur_state": "4\n",
    "/sys/class/devfreq/17000000.gpu/cur_freq": "306000000\n",
    "/sys/class/devfreq/17000000.gpu/max_freq": "918000000\n",
    f"{INA}/in1_label": "VDD_IN\n",
    f"{INA}/in1_input": "5000\n",
    f"{INA}/curr1_input": "1200\n",
    f"{INA}/in2_label": "VDD_CPU_GPU_CV\n",
    f"{INA}/in2_input": "5000\n",
    f"{INA}/curr2_input": "300\n",
    f"{INA}/in3_label": "NC\n",
    f"{INA}/curr3_input": "0\n",
    f"{INA}/in7_label": "sum of shunt voltages\n",
    f"{INA}/curr7_input": "0\n",
    **{CPUFREQ.format(core, "scaling_governor"): "schedutil\n" for core in range(6)},
    **{CPUFREQ.format(core, "scaling_cur_freq"): f"{729600 + core}\n" for core in (0, 4)},
    CPUFREQ.format(0, "related_cpus"): "0 1 2 3\n",
    CPUFREQ.format(4, "related_cpus"): "4 5\n",
}
NVPMODEL = "#!/bin/sh\n[ \"$1\" = -q ] || exit 1\necho 'NV Fan Mode:quiet'\necho 'NV Power Mode: 25W'\necho 1\n"


def write(folder: Path, files: dict[str, str | bytes], programs: dict[str, str] | None = None) -> Path:
    """A captured tree."""
    for name, content in files.items():
        path = folder / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    for name, content in (programs or {}).items():
        path = folder / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        path.chmod(0o755)
    return folder


@pytest.fixture
def probe_tree(board: Board, tmp_path: Path) -> ProbeTree:
    """Fingerprint of a machine whose files are given, through the real runner."""

    def probe(
        files: dict[str, str | bytes], programs: dict[str, str] | None = None, architecture: str = "aarch64"
    ) -> Fingerprint:
        from edgeprune.boards.fingerprint import from_facts

        tree = write(tmp_path / "tree", files, programs)
        return from_facts(board.call("probe", {"sysroot": str(tree), "architecture": architecture}))

    return probe


# This machine -----------------------------------------------------------------------------------------------------------


def test_this_machine_is_told_as_its_own_files_tell_it(board: Board) -> None:
    found = board.probe()
    cpuinfo = Path("/proc/cpuinfo").read_text()
    assert found.architecture == os.uname().machine
    assert found.cores == len(os.sched_getaffinity(0))
    assert found.kernel == os.uname().release
    assert found.python == platform.python_version()
    assert found.libc == os.confstr("CS_GNU_LIBC_VERSION")
    assert found.memory_bytes == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert found.free_disk_bytes > 0
    assert list(found.isa) == sorted(set(found.isa))
    if found.architecture == "x86_64":
        assert f"model name\t: {found.cpu_model}\n" in cpuinfo
        flags = next(line for line in cpuinfo.splitlines() if line.startswith("flags")).split()
        assert set(found.isa) <= set(flags)
        assert {"sse2", "avx2", "avx512f"} & set(flags) <= set(found.isa)
        assert ("hypervisor" in flags) == any("virtual machine" in sentence for sentence in found.disturbances)


def test_the_binary_interface_of_the_board_s_python_is_told_for_the_choice_of_wheels(board: Board) -> None:
    facts = board.probe().facts
    assert facts["python_abi"] == sysconfig.get_config_var("SOABI")
    assert "environment" not in facts, "no set-up has made one here"


def test_a_board_without_the_runtime_is_mended_by_a_set_up(board: Board) -> None:
    bare = dataclasses.replace(board.probe(), runtimes={})
    (lacking,) = OnnxRuntime().requirements(bare)
    assert not lacking.met
    assert for_board(lacking.hint, "my board") == "edgeprune device setup 'my board'"


def test_the_runtime_of_the_board_s_python_is_told_with_version_and_library_hash(board: Board) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    import hashlib

    library = next(Path(onnxruntime.__file__).parent.glob("capi/onnxruntime_pybind11_state*.so"))
    found = board.probe()
    assert found.runtimes["onnxruntime"] == {
        "version": onnxruntime.__version__,
        "sha256": hashlib.sha256(library.read_bytes()).hexdigest(),
    }
    assert found.identity("onnxruntime")["runtime_sha256"] == found.runtimes["onnxruntime"]["sha256"]


def test_a_missing_runtime_is_a_stated_absence(root: Path, tmp_path: Path) -> None:
    import subprocess

    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "bare")], check=True)
    python = str(tmp_path / "bare" / "bin" / "python")
    found = Board(LocalTransport(), name="bare", python=python, root=str(root)).probe()
    assert found.runtimes == {}
    assert found.absences == (f"onnxruntime is not installed for {python}.",)
    assert found.python == platform.python_version()


def broken_runtime(folder: Path, code: str) -> Path:
    """A package of the runtime's name that does not load."""
    package = folder / "onnxruntime"
    (package / "capi").mkdir(parents=True)
    (package / "__init__.py").write_text(f'__version__ = "1.0"\n{code}\n')
    (package / "capi" / "onnxruntime_pybind11_state.so").write_bytes(b"library")
    return folder


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", "killed by signal SIGILL"),
        ("raise ImportError('libfoo.so.1: cannot open shared object file')", "libfoo.so.1: cannot open shared object"),
    ],
)
def test_a_runtime_that_is_there_but_does_not_load_is_a_stated_absence(
    board: Board, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, words: str
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(broken_runtime(tmp_path / "site", code)))
    found = board.probe()
    assert "onnxruntime" not in found.runtimes
    assert len(found.absences) == 1
    assert found.absences[0].startswith(f"onnxruntime is installed for {sys.executable}, but does not load: ")
    assert words in found.absences[0]


def test_a_runtime_that_is_mended_beside_its_library_is_found_again(
    board: Board, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = broken_runtime(tmp_path / "site", "import a_module_that_it_needs")
    monkeypatch.setenv("PYTHONPATH", str(site))
    assert "No module named 'a_module_that_it_needs'" in board.probe().absences[0]
    (site / "a_module_that_it_needs.py").write_text("")
    assert "onnxruntime" in board.probe().runtimes


def test_a_failure_that_an_earlier_version_remembered_is_looked_at_again(
    board: Board, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(broken_runtime(tmp_path / "site", "")))
    board.probe()
    cache = root / "libraries.json"
    (key,) = (key for key in json.loads(cache.read_text()) if "onnxruntime" in key)
    cache.write_text(json.dumps({key: {"sha256": "old", "failure": "no numpy"}}))
    assert board.probe().absences == ()
    assert "failure" not in json.loads(cache.read_text())[key]


def test_the_library_is_hashed_once_and_again_when_it_changes(
    board: Board, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = broken_runtime(tmp_path / "site", "")
    monkeypatch.setenv("PYTHONPATH", str(site))
    first = board.probe().runtimes["onnxruntime"]["sha256"]
    cache = root / "libraries.json"
    entries = {key: entry for key, entry in json.loads(cache.read_text()).items() if "onnxruntime" in key}
    assert [entry["sha256"] for entry in entries.values()] == [first]
    (key,) = entries
    cache.write_text(json.dumps({key: {"sha256": "remembered", "failure": None}}))
    assert board.probe().runtimes["onnxruntime"]["sha256"] == "remembered"
    (site / "onnxruntime" / "capi" / "onnxruntime_pybind11_state.so").write_bytes(b"another library")
    assert board.probe().runtimes["onnxruntime"]["sha256"] not in (first, "remembered")
    cache.write_text("{broken")
    assert len(board.probe().runtimes["onnxruntime"]["sha256"]) == 64


# Other boards -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, None),
        ({"/proc/self/cgroup": "0::/\n", "/sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1.5),
        ({"/proc/self/cgroup": "0::/a/b\n", "/sys/fs/cgroup/a/b/cpu.max": "max 100000\n"}, None),
        (
            {
                "/proc/self/cgroup": "0::/a/b\n",
                "/sys/fs/cgroup/a/cpu.max": "50000 100000\n",
                "/sys/fs/cgroup/a/b/cpu.max": "400000 100000\n",
            },
            0.5,
        ),
        (
            {
                "/proc/self/cgroup": "5:memory:/docker/1\n4:cpu,cpuacct:/docker/1\n",
                "/sys/fs/cgroup/cpu/docker/1/cpu.cfs_quota_us": "200000\n",
                "/sys/fs/cgroup/cpu/docker/1/cpu.cfs_period_us": "100000\n",
                "/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "/sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            2.0,
        ),
    ],
)
def test_time_that_control_groups_leave_is_told(
    probe_tree: ProbeTree, files: dict[str, str | bytes], quota: float | None
) -> None:
    found = probe_tree({**RASPBERRY_PI_5, **files})
    assert found.facts.get("cores_quota") == quota
    assert found.facts["cores_there"] == 4


def test_a_raspberry_pi_5_is_told_from_its_files_and_its_firmware(probe_tree: ProbeTree) -> None:
    found = probe_tree(RASPBERRY_PI_5, {"/usr/bin/vcgencmd": VCGENCMD})
    assert found.cpu_model == "Cortex-A76"
    assert found.cores == 4
    assert found.isa == ("asimd", "asimddp", "asimdhp", "asimdrdm", "atomics", "fp", "fphp")
    assert found.memory_bytes == 8245696 * 1024
    assert (found.os, found.kernel) == ("Debian GNU/Linux 12 (bookworm)", "6.6.31+rpt-rpi-2712")
    assert (found.governor, found.power_mode, found.load) == ("ondemand", None, 0.12)
    assert found.facts["board_model"] == "Raspberry Pi 5 Model B Rev 1.0"
    assert found.facts["temperatures_celsius"] == {"cpu-thermal": 48.2}
    assert found.facts["clocks"] == {"cpu0": {"current_khz": 1500000, "max_khz": 2400000}}
    assert found.sensors == ("temperature cpu-thermal", "power pmic DDR_VDD2", "power pmic VDD_CORE", "clock cpu0")
    assert found.disturbances == (
        "the firmware reports that the supply voltage is too low now (throttled=0x50005).",
        "the firmware reports that the processor is throttled now (throttled=0x50005).",
        "the CPU frequency governor is ondemand, not performance, so clocks change with the load.",
    )


def test_what_was_throttled_since_the_start_is_told_apart_from_now(probe_tree: ProbeTree) -> None:
    since = VCGENCMD.replace("0x50005", "0x80000")
    found = probe_tree(RASPBERRY_PI_5, {"/usr/bin/vcgencmd": since})
    assert found.disturbances[0] == (
        "the firmware reports that the soft temperature limit was active at times since the start (throttled=0x80000)."
    )


def test_a_firmware_that_may_not_be_asked_is_told(probe_tree: ProbeTree) -> None:
    refusing = '#!/bin/sh\necho "Can\'t open device file: /dev/vcio" >&2\nexit 1\n'
    found = probe_tree(RASPBERRY_PI_5, {"/usr/bin/vcgencmd": refusing})
    assert found.disturbances[0].startswith(
        "the firmware cannot be asked (vcgencmd is refused), so throttling by it goes"
    )
    assert any("vcgencmd is there, but refused" in absence for absence in found.absences)


def test_the_machine_id_is_told_apart_but_not_told(probe_tree: ProbeTree) -> None:
    first = probe_tree(RASPBERRY_PI_5).facts["machine"]
    other = {**RASPBERRY_PI_5, "/etc/machine-id": "fedcba9876543210fedcba9876543210\n"}
    assert first != probe_tree(other).facts["machine"]
    assert first not in RASPBERRY_PI_5["/etc/machine-id"]


def test_a_jetson_is_told_with_release_power_mode_rails_and_clocks(probe_tree: ProbeTree) -> None:
    found = probe_tree(JETSON, {"/usr/sbin/nvpmodel": NVPMODEL})
    assert found.cpu_model == "Cortex-A78AE"
    assert found.power_mode == "25W"
    assert found.facts["power_mode_id"] == 1
    assert (found.facts["l4t"], found.facts["jetpack"]) == ("36.4.3", "6.2+b77")
    assert found.os == "Ubuntu 22.04.5 LTS"
    assert found.facts["temperatures_celsius"] == {"cpu-thermal": 61.5}
    assert set(found.facts["clocks"]) == {"cpu0", "cpu4", "17000000.gpu"}
    assert found.facts["clocks"]["17000000.gpu"] == {"current_khz": 306000, "max_khz": 918000}
    assert [sensor for sensor in found.sensors if sensor.startswith("power")] == [
        "power ina3221 VDD_CPU_GPU_CV",
        "power ina3221 VDD_IN",
    ]
    assert found.disturbances == (
        "clocks are held down by heat: cooling device cpufreq-cpu0 is at step 4.",
        "other programs are running: the load is 4.50 on 6 cores, and should be below 0.5 per core.",
        "the CPU frequency governor is schedutil, not performance, so clocks change with the load.",
    )
    assert found.identity("onnxruntime")["power_mode"] == "25W"


def test_the_power_sensors_of_jetpack_4_are_found_too(probe_tree: ProbeTree) -> None:
    folder = "/sys/bus/i2c/drivers/ina3221x/6-0040/iio:device0"
    files = {f"{folder}/rail_name_0": "POM_5V_IN\n", f"{folder}/in_power0_input": "3075\n"}
    assert "power ina3221 POM_5V_IN" in probe_tree({**RASPBERRY_PI_5, **files}).sensors


def test_a_power_sensor_that_may_not_be_read_is_an_absence(probe_tree: ProbeTree, tmp_path: Path) -> None:
    # A folder in place of the counter: even root cannot read it as a file.
    folder = "/sys/class/powercap/intel-rapl:0"
    (tmp_path / "tree" / folder.lstrip("/") / "energy_uj").mkdir(parents=True)
    found = probe_tree({f"{folder}/name": "package-0\n"}, architecture="x86_64")
    assert found.sensors == ()
    assert found.absences == (f"power sensor rapl package-0 exists, but its user may not read {folder}/energy_uj.",)


def test_clusters_of_different_cores_are_counted_and_share_what_all_have(probe_tree: ProbeTree) -> None:
    cores = [("0xd05", "fp asimd atomics")] * 4 + [("0xd0b", "fp asimd atomics asimddp")] * 3 + [("0xfff", "fp asimd")]
    cpuinfo = "\n".join(
        f"processor\t: {index}\nFeatures\t: {features}\nCPU implementer\t: 0x41\nCPU part\t: {part}\n"
        for index, (part, features) in enumerate(cores)
    )
    found = probe_tree({"/proc/cpuinfo": cpuinfo})
    assert found.cpu_model == "4x Cortex-A55 + 3x Cortex-A76 + 1x ARM implementer 0x41 part 0xfff"
    assert found.isa == ("asimd", "fp")


def auxv(hwcap: int, hwcap2: int = 0) -> bytes:
    """Content of /proc/self/auxv of a 64-bit process."""
    entries = [(6, 4096), (16, hwcap), (26, hwcap2), (0, 0)]
    return b"".join(struct.pack("=QQ", *entry) for entry in entries)


def test_an_emulated_arm_board_is_told_by_its_own_vector_and_not_by_the_host_s_cpuinfo(probe_tree: ProbeTree) -> None:
    host = "processor\t: 0\nvendor_id\t: AuthenticAMD\nmodel name\t: AMD EPYC\nflags\t\t: fpu sse2 avx2 avx512f\n"
    found = probe_tree({"/proc/cpuinfo": host, "/proc/self/auxv": auxv(1 << 1 | 1 << 20 | 1 << 30, 1 << 13)})
    assert found.isa == ("asimd", "asimddp", "i8mm")
    assert found.cpu_model == "unknown"
    assert found.facts["emulated"] is True
    assert found.disturbances[0] == "the processor is emulated: results are right, but no latency means anything."


def test_an_emulator_that_makes_up_cpuinfo_is_told_by_the_kernel_s_own_word(probe_tree: ProbeTree) -> None:
    made_up = "processor\t: 0\nFeatures\t: fp asimd\nCPU implementer\t: 0x41\nCPU part\t: 0xd08\n"
    assert probe_tree({"/proc/cpuinfo": made_up, "/proc/sys/kernel/arch": "x86_64\n"}).facts["emulated"] is True
    assert probe_tree({"/proc/cpuinfo": made_up, "/proc/sys/kernel/arch": "aarch64\n"}).facts["emulated"] is False
    x86 = "processor\t: 0\nvendor_id\t: GenuineIntel\nflags\t\t: fpu sse2\n"
    for kernel, expected in (("aarch64\n", True), ("x86_64\n", False)):
        found = probe_tree({"/proc/cpuinfo": x86, "/proc/sys/kernel/arch": kernel}, architecture="x86_64")
        assert found.facts["emulated"] is expected


def test_an_x86_board_is_told_with_caches_battery_hypervisor_and_throttling(probe_tree: ProbeTree) -> None:
    cache = "/sys/devices/system/cpu/cpu0/cache/index{}/{}"
    files = {
        "/proc/cpuinfo": "processor\t: 0\nmodel name\t: Intel(R) N100\nflags\t\t: fpu sse2 avx2 fma hypervisor\n\n",
        "/sys/class/dmi/id/sys_vendor": "QEMU\n",
        "/sys/class/dmi/id/product_name": "Standard PC\n",
        "/sys/class/power_supply/BAT0/type": "Battery\n",
        "/sys/class/power_supply/BAT0/status": "Discharging\n",
        "/sys/class/power_supply/mouse/type": "Battery\n",
        "/sys/class/power_supply/mouse/scope": "Device\n",
        "/sys/firmware/acpi/platform_profile": "low-power\n",
        "/sys/devices/system/cpu/cpu0/thermal_throttle/package_throttle_count": "7\n",
        "/sys/class/hwmon/hwmon0/name": "coretemp\n",
        "/sys/class/hwmon/hwmon0/temp1_label": "Package id 0\n",
        "/sys/class/hwmon/hwmon0/temp1_input": "55000\n",
        "/sys/class/hwmon/hwmon0/temp2_input": "no number\n",
        CPUFREQ.format(0, "scaling_governor"): "performance\n",
        **{
            cache.format(index, name): value
            for index, values in enumerate([("1", "Data", "32K"), ("1", "Instruction", "64K"), ("2", "Unified", "2M")])
            for name, value in zip(("level", "type", "size"), values, strict=True)
        },
    }
    found = probe_tree(files, architecture="x86_64")
    assert (found.cpu_model, found.isa) == ("Intel(R) N100", ("avx2", "fma", "sse2"))
    assert found.caches_bytes == {"L1d": 32768, "L1i": 65536, "L2": 2097152}
    assert (found.governor, found.power_mode) == ("performance", "low-power")
    assert found.sensors == ("temperature coretemp Package id 0",)
    assert found.disturbances == (
        "the processor was throttled by heat 7 times since it was started.",
        "it runs on its battery, which may lower the clocks.",
        "it is a virtual machine (QEMU Standard PC), and neighbors may take time from it.",
    )


def test_a_board_that_tells_nothing_still_gives_a_fingerprint(probe_tree: ProbeTree) -> None:
    found = probe_tree({"/empty": ""}, architecture="riscv64")
    assert (found.architecture, found.cpu_model, found.isa, found.os) == ("riscv64", "unknown", (), "unknown")
    assert (found.caches_bytes, found.memory_bytes, found.governor, found.sensors) == ({}, 0, None, ())
    assert found.disturbances == (
        "CPU clocks cannot be read, so a change of frequency goes unnoticed.",
        "no temperature can be read, so throttling by heat goes unnoticed.",
    )


GARBAGE: list[Any] = [b"", b"\xff\xfe\0", b"::::\n\n::\n", b"9" * 5000, b"-1", b"0x"]


@pytest.mark.parametrize("garbage", GARBAGE, ids=range(len(GARBAGE)))
def test_garbage_in_any_file_breaks_nothing(probe_tree: ProbeTree, garbage: bytes) -> None:
    for files in (RASPBERRY_PI_5, JETSON):
        found = probe_tree(dict.fromkeys([*files, "/proc/self/auxv"], garbage))
        assert found.architecture == "aarch64"


def test_a_program_that_fails_is_as_good_as_none(probe_tree: ProbeTree) -> None:
    found = probe_tree(JETSON, {"/usr/sbin/nvpmodel": "#!/bin/sh\nexit 1\n", "/usr/bin/vcgencmd": "not a program"})
    assert found.power_mode is None
