"""Energy counters of the power rails of Pixel phones (on-device power monitor). Python >= 3.6.

Source: Android kernel, drivers/iio/power/odpm.c: ``energy_value`` holds ``t=<ms>``, then ``CH<n>(T=<ms>)[<rail>], <uWs>``.
"""

import re

from power_source import ENERGY, Channel, Source, absent

NAME = "odpm"
FILES = "/sys/bus/iio/devices/iio:device*/energy_value"
_LINE = re.compile(r"^CH[0-9]{1,3}\(T=[0-9]{1,20}\)\[([^\]\n]{1,80})\], ([0-9]{1,20})$", re.M)


def find(tree, request):
    """See `power_source`."""
    sources, absences = [], []
    for path in tree.glob(FILES):
        found = parse(tree.read(path) or "")
        if not found:
            reason = "power sensor odpm exists, but its user may not read %s." % path
            absences.append(absent(NAME, reason, there=True))
            continue
        channels = {rail: Channel(NAME, rail, ENERGY) for rail in sorted(found)}
        sources.append(Source(list(channels.values()), _reader(tree, path, channels)))
    if not sources and not absences:
        absences.append(absent(NAME, "no IIO device tells energy_value."))
    return sources, absences


def parse(text):
    """Millijoules by rail."""
    return {rail: int(micro) / 1000.0 for rail, micro in _LINE.findall(text)}


def _reader(tree, path, channels):
    def read():
        found = parse(tree.read(path) or "")
        return {channels[rail].name: value for rail, value in found.items() if rail in channels}

    return read
