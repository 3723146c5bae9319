"""What this board is and runs, and what could disturb a measurement on it. Everything is looked at, nothing assumed."""

import hashlib
import os
import platform
import re
import struct
import sys
import sysconfig

import cuda_driver
import environment
import gpus
import power
import processor
import runtimes
import sensors
import store
from tree import Tree

LOAD_LIMIT = 0.5


def main(request, emit):
    """Verb ``probe``: request {"root"}; the result has the fields of a fingerprint.

    With ``untouched`` nothing is remembered in the root folder. ``sysroot`` and ``architecture`` describe a captured copy of a
    board's /proc, /sys and /etc instead.
    """
    tree = Tree(request.get("sysroot", "/"))
    architecture = request.get("architecture") or os.uname().machine
    root = request["root"]
    processors = processor.entries(tree)
    found_runtimes, absent = runtimes.probe(root, keep=not request.get("untouched")) if tree.live else ({}, [])
    sources, unreadable = power.find(tree, request)
    temperatures = sensors.temperatures(tree)
    clocks = sensors.clocks(tree)
    governors = sensors.governors(tree)
    cores = processor.cores(tree, processors)
    mode, mode_id = sensors.power_mode(tree)
    l4t, jetpack = jetson_release(tree)
    multiprocessors, unknown = cuda_driver.multiprocessors() if tree.live else (None, "")
    if unknown:
        absent = absent + ["how many multiprocessors the GPU has is not known: %s." % unknown]
    result = {
        "architecture": architecture,
        "cpu_model": processor.cpu_model(tree, architecture, processors),
        "isa": processor.isa(tree, architecture, processors),
        "cores": cores,
        "caches_bytes": processor.caches(tree, processor.first(tree)),
        "memory_bytes": meminfo(tree, "MemTotal"),
        "os": os_name(tree),
        "kernel": os.uname().release if tree.live else tree.read("/proc/sys/kernel/osrelease"),
        "libc": libc(tree),
        "python": platform.python_version() if tree.live else None,
        "runtimes": found_runtimes,
        "power_mode": mode,
        "governor": "+".join(governors) or None,
        "free_disk_bytes": store.free_bytes(root),
        "load": sensors.load(tree),
        "sensors": sorted("temperature %s" % name for name in temperatures)
        + sorted("power %s" % channel.name for source in sources for channel in source.channels)
        + sorted("clock %s" % name for name in clocks),
        "absences": absent + [entry["reason"] for entry in unreadable if entry["there"]],
        "facts": without_none(
            {
                "board_model": tree.read("/proc/device-tree/model") or tree.read("/sys/class/dmi/id/product_name"),
                "machine": machine(tree),
                "python_executable": sys.executable if tree.live else None,
                "python_abi": (sysconfig.get_config_var("SOABI") or None) if tree.live else None,
                "environment": environment.own(root) if tree.live else None,
                "python_bits": struct.calcsize("P") * 8 if tree.live else None,
                "cores_there": len(processors) or None,
                "cores_bound": sorted(request.get("cores") or ()) or None,
                "cores_quota": processor.quota(tree),
                "memory_available_bytes": meminfo(tree, "MemAvailable"),
                "power_mode_id": mode_id,
                "l4t": l4t,
                "jetpack": jetpack,
                "gpus": cards(tree),
                "multiprocessors": multiprocessors,
                "clocks": clocks,
                "temperatures_celsius": temperatures,
                "hypervisor": processor.hypervisor(tree, processors),
                "emulated": processor.foreign(tree, architecture, processors),
            }
        ),
    }
    result["runtimes"] = with_gpu(found_runtimes, result["facts"])
    result["disturbances"] = disturbances(tree, result, governors)
    return result


def with_gpu(found, facts):
    """Runtimes, that of GPUs with which one it runs on: the processor does not tell two boards apart that differ in it."""
    listed = facts.get("gpus") or [{}]
    # A Jetson's GPU follows from the board; not each release has nvidia-smi.
    name = listed[0].get("name") or (facts.get("board_model") if "l4t" in facts else None)
    if name is None or "tensorrt" not in found:
        return found
    return dict(found, tensorrt=dict(found["tensorrt"], gpu=name))


def disturbances(tree, result, governors):
    """Sentences on what could disturb a measurement, the gravest first."""
    facts = result["facts"]
    found = []
    if facts["emulated"]:
        found.append("the processor is emulated: results are right, but no latency means anything.")
    found.extend(sensors.throttling(tree) + gpus.throttling(gpus.states(tree)))
    if sensors.firmware_refuses(tree):
        found.append(
            "the firmware cannot be asked (vcgencmd is refused), so throttling by it goes unnoticed: its user should be in the "
            "group of /dev/vcio, usually video."
        )
    if (result["load"] or 0.0) > LOAD_LIMIT * result["cores"]:
        found.append(
            "other programs are running: the load is %.2f on %d core%s, and should be below %.1f per core."
            % (result["load"], result["cores"], "" if result["cores"] == 1 else "s", LOAD_LIMIT)
        )
    slow = [name for name in governors if name != "performance"]
    if slow:
        found.append(
            "the CPU frequency governor is %s, not performance, so clocks change with the load." % "+".join(slow)
        )
    battery = sensors.battery(tree)
    if battery:
        found.append(battery)
    if "hypervisor" in facts:
        found.append("it is a virtual machine (%s), and neighbors may take time from it." % facts["hypervisor"])
    if not governors and not any(name.startswith("cpu") for name in facts["clocks"]):
        found.append("CPU clocks cannot be read, so a change of frequency goes unnoticed.")
    if not facts["temperatures_celsius"]:
        found.append("no temperature can be read, so throttling by heat goes unnoticed.")
    if result["architecture"] in ("aarch64", "x86_64") and facts.get("python_bits") == 32:
        found.append("its Python is a 32-bit program on a 64-bit processor.")
    return found


def without_none(fields):
    """The fields that are known."""
    return {name: value for name, value in fields.items() if value is not None}


def meminfo(tree, name):
    """One line of /proc/meminfo, bytes, or None."""
    match = re.search(r"^%s:\s+(\d+) kB" % name, tree.read("/proc/meminfo") or "", re.M)
    return int(match.group(1)) * 1024 if match else None


def os_name(tree):
    """Distribution and version."""
    for path in ("/etc/os-release", "/usr/lib/os-release"):
        match = re.search(r"""^PRETTY_NAME=["']?([^"'\n]+)""", tree.read(path) or "", re.M)
        if match:
            return match.group(1)
    return platform.system() if tree.live else None


def libc(tree):
    """``glibc 2.36`` or ``musl``, of the Python that runs this; a captured tree does not tell."""
    if not tree.live:
        return None
    try:
        name = os.confstr("CS_GNU_LIBC_VERSION")
    except (AttributeError, OSError, ValueError):
        name = None
    if name:
        return name
    return "musl" if tree.glob("/lib/ld-musl-*") else None


def machine(tree):
    """Tells two boards apart without giving away the machine id, which is meant to stay private."""
    identity = tree.read("/etc/machine-id")
    return hashlib.sha256(("edgeprune:" + identity).encode("utf-8")).hexdigest()[:16] if identity else None


def jetson_release(tree):
    """(Jetson Linux release, JetPack version), each None where the board does not say."""
    match = re.search(r"#\s*R(\d+).*?REVISION:\s*([\d.]+)", tree.read("/etc/nv_tegra_release") or "")
    if not match:
        return None, None
    # The package's version is JetPack's own word; tables of releases in other people's code go stale.
    status = tree.read("/var/lib/dpkg/status") or ""
    package = re.search(r"^Package: nvidia-jetpack\n(?:.+\n)*?Version: (\S+)", status, re.M)
    return "%s.%s" % match.groups(), package.group(1) if package else None


def cards(tree):
    """NVIDIA GPUs as nvidia-smi lists them, or None without one."""
    said = tree.run("nvidia-smi", "--query-gpu=name,driver_version,compute_cap,memory.total", "--format=csv,noheader")
    rows = [[cell.strip() for cell in line.split(",")] for line in (said or "").splitlines()]
    names = ("name", "driver_version", "compute_capability", "memory")
    return [dict(zip(names, row)) for row in rows if len(row) == len(names)] or None
