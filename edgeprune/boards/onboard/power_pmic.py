"""Rails of the Raspberry Pi 5's power management chip, as its firmware reads them. Python >= 3.6.

Source: RPi5-power, https://github.com/jfikar/RPi5-power (``vcgencmd pmic_read_adc``: rails with a current and a voltage;
what USB and 5 V devices take is not in their sum).
"""

import re

import sensors
from power_source import POWER, SHARE, Channel, Source, absent, number

NAME = "pmic"
_LINE = re.compile(r"^\s*(\w+?)_([AV])\s*(?:(?:current|volt|voltage)\(\d+\))?\s*=\s*([-+0-9.eE]{1,40})\s*([AV])\s*$", re.M)


def find(tree, request):
    """See `power_source`."""
    if tree.find_program("vcgencmd") is None:
        return [], [absent(NAME, "there is no vcgencmd, so no Raspberry Pi firmware to ask.")]
    rails = parse(tree.run("vcgencmd", "pmic_read_adc") or "")
    if not rails and sensors.firmware_refuses(tree):
        reason = "vcgencmd is there, but refused: its user must be in the group of /dev/vcio, usually video."
        return [], [absent(NAME, reason, there=True)]
    if not rails:
        reason = "vcgencmd pmic_read_adc tells no rail with a current and a voltage; only the Raspberry Pi 5's chip has them."
        return [], [absent(NAME, reason)]
    channels = {rail: Channel(NAME, rail, POWER, SHARE) for rail in sorted(rails)}

    def read():
        found = parse(tree.run("vcgencmd", "pmic_read_adc") or "")
        return {channels[rail].name: value for rail, value in found.items() if rail in channels}

    return [Source(list(channels.values()), read)], []


def parse(text):
    """Milliwatts by rail, of the rails that have both a current and a voltage; both forms that firmwares print."""
    read = {}
    for rail, kind, digits, unit in _LINE.findall(text):
        value = number(digits)
        if value is not None and kind == unit:
            read.setdefault(rail, {})[kind] = value
    return {rail: found["A"] * found["V"] * 1000.0 for rail, found in read.items() if len(found) == 2}
