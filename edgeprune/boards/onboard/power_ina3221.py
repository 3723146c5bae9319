"""INA3221 monitors of Jetson modules, by the labels of their inputs and never by bus number. Python >= 3.6.

Sources: Linux, Documentation/hwmon/ina3221.rst (JetPack 5 and later: a hardware monitor with volts and amperes, no power
file); NVIDIA, L4T Development Guide 32.x, "Software-Based Power Consumption Modeling" (JetPack 4: an IIO device with
``rail_name_N`` and ``in_powerN_input`` in milliwatts).
"""

import re

from power_source import AVERAGE, POWER, TOTAL, UNKNOWN, Channel, Source, absent, refused

NAME = "ina3221"
TOTALS = frozenset(["VDD_IN", "POM_5V_IN", "VIN"])
"""Inputs that carry all that the module takes; the others of the chip are behind them."""

HWMON = "/sys/bus/i2c/drivers/ina3221/*/hwmon/hwmon[0-9]*/in[0-9]*_label"
JETPACK_4 = "/sys/bus/i2c/drivers/ina3221x/*/iio:device*/rail_name_[0-9]*"
_STATED = "Linux, Documentation/hwmon/ina3221.rst: update_interval of the chip"


def find(tree, request):
    """See `power_source`."""
    sources, absences = [], []
    for path in tree.glob(HWMON):
        label = tree.read(path)
        # The chip's sum of shunt voltages and inputs that are not connected are no rails.
        if label and label != "NC" and not label.startswith("sum of"):
            folder = path.rsplit("/", 1)[0]
            index = re.search(r"in(\d+)_label$", path).group(1)
            _file(tree, sources, absences, label, _volts_and_amperes(tree, folder, index, label))
    for path in tree.glob(JETPACK_4):
        label = tree.read(path)
        if label and label != "NC":
            folder, index = path.rsplit("/", 1)[0], path.rsplit("_", 1)[1]
            _file(tree, sources, absences, label, _milliwatts(tree, folder, index, label))
    if not sources and not absences:
        absences.append(absent(NAME, "no INA3221 power monitor is listed under /sys/bus/i2c/drivers."))
    return sources, absences


def power_mw(millivolts, milliamperes):
    """Milliwatts, or None where one of both is missing."""
    return None if millivolts is None or milliamperes is None else millivolts * milliamperes / 1000.0


def _volts_and_amperes(tree, folder, index, label):
    volts, amperes = "%s/in%s_input" % (folder, index), "%s/curr%s_input" % (folder, index)
    # Conversion time over all inputs, averaged samples included: how often a value is new, and the time it is the mean of.
    interval_ms = tree.read_int(folder + "/update_interval")
    period_s = interval_ms / 1000.0 if interval_ms and interval_ms > 0 else None
    channel = Channel(
        NAME,
        label,
        AVERAGE if period_s else POWER,
        TOTAL if label in TOTALS else UNKNOWN,
        period_s=period_s,
        window_s=period_s,
        stated=_STATED if period_s else None,
    )
    return channel, amperes, lambda: power_mw(tree.read_int(volts), tree.read_int(amperes))


def _milliwatts(tree, folder, index, label):
    path = "%s/in_power%s_input" % (folder, index)
    channel = Channel(NAME, label, POWER, TOTAL if label in TOTALS else UNKNOWN)
    return channel, path, lambda: tree.read_int(path)


def _file(tree, sources, absences, label, found):
    channel, path, value = found
    if not tree.exists(path):
        return
    if value() is None:
        absences.append(refused(NAME, label, path))
        return

    def read():
        found_mw = value()
        return {} if found_mw is None else {channel.name: float(found_mw)}

    sources.append(Source([channel], read))
