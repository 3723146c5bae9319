"""RAPL energy counters of x86 processors through the kernel's powercap files. Python >= 3.6.

Sources: Linux, Documentation/power/powercap/powercap.rst (``energy_uj``, ``max_energy_range_uj``, zones and their parts);
Documentation/hwmon/amd_energy.rst (AMD's registers are renewed every millisecond); arch/x86/events/rapl.c (what the zones
are: cores and built-in graphics are parts of the package, dram is beside it, psys is the platform). Since the fix of
CVE-2020-8694 only root may read them.
"""

import re

from power_source import ENERGY, INSIDE, SHARE, TOTAL, UNKNOWN, Channel, Source, absent, refused

NAME = "rapl"
ZONES = "/sys/class/powercap/intel-rapl:*"
_STATED = "Linux, Documentation/hwmon/amd_energy.rst: renewed every millisecond; taken for Intel's registers too"


def find(tree, request):
    """See `power_source`."""
    sources, absences = [], []
    names = {folder: tree.read(folder + "/name") or "unnamed" for folder in tree.glob(ZONES)}
    for folder in sorted(names):
        parent = names.get(folder.rsplit(":", 1)[0])
        rail = names[folder] if parent is None else "%s %s" % (parent, names[folder])
        path = folder + "/energy_uj"
        if not tree.exists(path):
            continue
        range_uj = tree.read_int(folder + "/max_energy_range_uj")
        channel = Channel(
            NAME,
            rail,
            ENERGY,
            role(names[folder]),
            period_s=0.001,
            window_s=0.0,
            wrap_mj=range_uj / 1000.0 if range_uj and range_uj > 0 else None,
            stated=_STATED,
        )
        if counter_mj(tree.read(path)) is None:
            absences.append(refused(NAME, rail, path))
        else:
            sources.append(Source([channel], _reader(tree, path, channel.name)))
    if not sources and not absences:
        absences.append(absent(NAME, "no RAPL counter is listed under /sys/class/powercap."))
    return sources, absences


def role(zone):
    """How a zone relates to the others, by its name."""
    if re.match(r"package-\d+(-die-\d+)?$", zone) or zone == "dram":
        return SHARE
    if zone in ("core", "uncore"):
        return INSIDE
    return TOTAL if zone == "psys" else UNKNOWN


def counter_mj(text):
    """Millijoules that ``energy_uj`` tells, or None."""
    return int(text) / 1000.0 if re.match(r"[0-9]{1,20}$", text or "") else None


def _reader(tree, path, name):
    def read():
        value = counter_mj(tree.read(path))
        return {} if value is None else {name: value}

    return read
