"""An external meter: a command on the board that prints watts, one reading per line. Python >= 3.6.

A line is ``WATTS`` or ``SECONDS WATTS``, separated by white space, a comma, a semicolon or a tab; other lines (headers,
messages) are passed over. ``SECONDS`` is the time of day as the board's clock has it (seconds since 1970) or any other
clock that runs evenly, which is set by its first line.
"""

import re
import time

from power_source import POWER, TOTAL, Channel, Source, absent, number

NAME = "meter"
RAIL = "meter"
_NEAR_S = 60.0
_MOST_WATTS = 1e5
_READINGS = 4
_BURST_S = 5e-4
"""Lines that come closer than this were kept back by a buffer."""


def find(tree, request):
    """See `power_source`; the command is ``meter`` of the request, and without one there is nothing to find."""
    text = request.get("meter")
    if not text:
        return [], []
    command = ["/bin/sh", "-c", text]
    times = []

    def enough(line):
        found = parse(line)
        if found is not None:
            times.append(time.monotonic() if found[0] is None else found[0])
        return len(times) == _READINGS

    _, said = tree.first_line(command, enough)
    if not times:
        reason = "the meter's command must print watts, one reading per line, but printed none within 5 s%s." % (
            ": " + said if said else ""
        )
        return [], [absent(NAME, reason, there=True)]
    period_s = usual_gap_s(times)
    stated = None if period_s is None else "as far apart as the first readings of its command"
    channel = Channel(NAME, RAIL, POWER, TOTAL, period_s=period_s, stated=stated)
    return [Source([channel], stream=command, parse=_line_parser(channel.name))], []


def usual_gap_s(times):
    """Median distance of readings, seconds, or None where there are too few, or they came in one burst."""
    gaps = sorted(after - before for before, after in zip(times, times[1:]))
    middle = gaps[len(gaps) // 2] if len(times) >= _READINGS else 0.0
    return middle if middle > _BURST_S else None


def parse(line):
    """(seconds or None, watts) of one line, or None when it is no reading."""
    cells = re.split(r"[\s,;]+", line.strip())
    if len(cells) not in (1, 2):
        return None
    values = [number(cell) for cell in cells]
    if None in values or abs(values[-1]) > _MOST_WATTS:
        return None
    return (values[0] if len(values) == 2 else None), values[-1]


class Clock(object):
    """From the meter's seconds to those of `time.monotonic`."""

    def __init__(self):
        self.offset_s = None

    def monotonic_s(self, seconds):
        """The same moment by this machine's monotonic clock."""
        if self.offset_s is None:
            now, day = time.monotonic(), time.time()
            # A time of day needs no first line to be set by, which may have come late.
            self.offset_s = now - (day if abs(seconds - day) < _NEAR_S else seconds)
        return seconds + self.offset_s


def _line_parser(name):
    clock = Clock()

    def read_line(text):
        found = parse(text)
        if found is None:
            return None, {}
        seconds, watts = found
        return (None if seconds is None else clock.monotonic_s(seconds)), {name: watts * 1000.0}

    return read_line
