"""What a power reader finds: channels, the sources that read them together, and what cannot be read. Python >= 3.6.

A reader is a module ``power_*.py`` with ``find(tree, request)``, which returns ``(sources, absences)``. It looks at what is
there and tries to read it; what cannot be read is a stated absence, never a zero. Parsers take text and return plain
values, so that they are tested without the hardware.
"""

import math

POWER = "power"
"""Milliwatts at the moment of the reading, or as last updated before it."""
AVERAGE = "average"
"""Milliwatts, the mean over `Channel.window_s` before the reading."""
ENERGY = "energy"
"""Millijoules since some start; only differences mean anything."""

TOTAL = "total"
"""All that the board, or its module, takes; every other channel is inside of it or an alternative to it."""
SHARE = "share"
"""Disjoint from every other share, so shares may be added."""
INSIDE = "inside"
"""Part of another channel."""
UNKNOWN = "unknown"
"""Nothing is known of how it relates to others; only the device type's file can say."""


class Channel(object):
    """One thing that can be read.

    Args:
        source: Name of the reader, e.g. ``"ina3221"``.
        rail: What is measured, as the board names it. Channels with the same rail are alternatives.
        kind: `POWER`, `AVERAGE` or `ENERGY`.
        role: `TOTAL`, `SHARE`, `INSIDE` or `UNKNOWN`.
        period_s: How often the value is renewed, seconds; None where no source says so.
        window_s: Averaging window, seconds; None where no source says so, 0 for a value of one moment.
        wrap_mj: A counter starts anew after this much; None where it is not known to.
        stated: Where `period_s` and `window_s` come from.
        detail: Tells channels of one rail and source apart.
    """

    def __init__(
        self, source, rail, kind, role=UNKNOWN, period_s=None, window_s=None, wrap_mj=None, stated=None, detail=None
    ):
        self.name = " ".join(part for part in (source, rail, detail) if part)
        self.source = source
        self.rail = rail
        self.kind = kind
        self.role = role
        self.period_s = period_s
        self.window_s = window_s
        self.wrap_mj = wrap_mj
        self.stated = stated

    def event(self):
        """As JSON for the host."""
        return dict(vars(self))


class Source(object):
    """Channels that one read of one thing gives together.

    Args:
        channels: At least one `Channel`.
        read: Takes nothing, returns {channel name: value}; a channel that cannot be read now is left out.
        stream: Instead of `read`: command line of a program that prints readings for as long as it runs.
        parse: With `stream`: takes one line, returns (seconds or None, {channel name: value}); nothing for a foreign line.
    """

    def __init__(self, channels, read=None, stream=None, parse=None):
        self.channels = channels
        self.read = read
        self.stream = stream
        self.parse = parse


def absent(source, reason, there=False):
    """An absence.

    Args:
        source: Name of the reader.
        reason: One sentence.
        there: Whether the board has the sensor and does not let it be read; False when there is no such thing.
    """
    return {"source": source, "reason": reason, "there": there}


def number(text):
    """A finite number that a text holds, or None."""
    try:
        value = float(text)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def refused(source, rail, path):
    """The absence of a sensor whose file is there and gives no number."""
    return absent(
        source, "power sensor %s %s exists, but its user may not read %s." % (source, rail, path), there=True
    )
