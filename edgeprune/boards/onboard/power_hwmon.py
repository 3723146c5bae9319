"""Power and energy of any hardware monitor that tells them (INA238 and relatives, server power supplies). Python >= 3.6.

Sources: Linux, Documentation/hwmon/sysfs-interface.rst (``powerN_input`` and ``powerN_average`` in microwatts,
``powerN_average_interval`` in milliseconds, ``energyN_input`` in microjoules, ``label`` of a monitor);
Documentation/hwmon/ina238.rst.
"""

import re

from power_ina3221 import TOTALS
from power_source import AVERAGE, ENERGY, POWER, TOTAL, UNKNOWN, Channel, Source, absent, refused

NAME = "hwmon"
_FILES = "/sys/class/hwmon/hwmon[0-9]*/%s[0-9]*_%s"


def find(tree, request):
    """See `power_source`."""
    sources, absences = [], []
    for what, suffix in (("energy", "input"), ("power", "average"), ("power", "input")):
        for path in tree.glob(_FILES % (what, suffix)):
            channel = _channel(tree, path, what, suffix)
            value = tree.read_int(path)
            if value is None:
                absences.append(refused(channel.source, channel.rail, path))
            else:
                sources.append(Source([channel], _reader(tree, path, channel.name)))
    if not sources and not absences:
        absences.append(absent(NAME, "no hardware monitor under /sys/class/hwmon tells power or energy."))
    return sources, absences


def _channel(tree, path, what, suffix):
    folder = path.rsplit("/", 1)[0]
    index = re.search(r"(\d+)_\w+$", path).group(1)
    chip = tree.read(folder + "/name") or folder.rsplit("/", 1)[1]
    label = tree.read("%s/%s%s_label" % (folder, what, index)) or tree.read(folder + "/label")
    # Without a label the chip's name tells rails of several chips apart.
    source, rail = (chip, label) if label else (NAME, "%s %s" % (chip, index))
    role = TOTAL if label in TOTALS else UNKNOWN
    if what == "energy":
        return Channel(source, rail, ENERGY, role, detail="energy")
    interval_ms = tree.read_int("%s/power%s_average_interval" % (folder, index)) if suffix == "average" else None
    if interval_ms and interval_ms > 0:
        stated = "the monitor's power%s_average_interval" % index
        return Channel(
            source, rail, AVERAGE, role, window_s=interval_ms / 1000.0, stated=stated, detail="average"
        )
    # An average over a time that nobody states is still better told apart from a value of one moment.
    return Channel(source, rail, POWER, role, detail="average" if suffix == "average" else None)


def _reader(tree, path, name):
    def read():
        micro = tree.read_int(path)
        return {} if micro is None else {name: micro / 1000.0}

    return read
