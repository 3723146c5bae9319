"""Rails as Jetson's ``tegrastats`` prints them, for boards whose sensors cannot be read directly. Python >= 3.6.

Source: NVIDIA, Jetson Linux Developer Guide, "tegrastats Utility". A rail is ``NAME now/average`` in milliwatts, with the
unit since JetPack 5.1 and a third value on JetPack 7. Tokens are found by their shape and never by their place: what stands
between them differs by board and release.
"""

import re

from power_ina3221 import TOTALS
from power_source import POWER, TOTAL, UNKNOWN, Channel, Source, absent

NAME = "tegrastats"
INTERVAL_MS = 100
# "RAM 1985/7765MB" has the same shape but for its unit.
_RAIL = re.compile(r"(?:^|(?<=\s))([A-Z][A-Z0-9_]{1,40}) (-?[0-9]{1,9})(?:mW)?(?:/-?[0-9]{1,9}(?:mW)?){1,2}(?=\s|$)")


def find(tree, request):
    """See `power_source`."""
    program = tree.find_program("tegrastats")
    if program is None:
        return [], [absent(NAME, "there is no tegrastats.")]
    command = [program, "--interval", str(INTERVAL_MS)]
    line, said = tree.first_line(command, lambda text: bool(parse(text)))
    if line is None:
        reason = "tegrastats is there, but printed no power rail within 5 s%s." % (": " + said if said else "")
        return [], [absent(NAME, reason, there=True)]
    channels = {
        rail: Channel(
            NAME,
            rail,
            POWER,
            TOTAL if rail in TOTALS else UNKNOWN,
            period_s=INTERVAL_MS / 1000.0,
            window_s=0.0,
            stated="as asked for with --interval",
        )
        for rail in sorted(parse(line))
    }

    def read_line(text):
        found = parse(text)
        return None, {channels[rail].name: value for rail, value in found.items() if rail in channels}

    return [Source(list(channels.values()), stream=command, parse=read_line)], []


def parse(line):
    """Milliwatts now, by rail."""
    return {rail: float(now) for rail, now in _RAIL.findall(line)}
