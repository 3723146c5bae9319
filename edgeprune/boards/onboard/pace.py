"""How quick the core is right now: a fixed piece of arithmetic, timed again and again. Python >= 3.6.

A virtual machine's core may be one of two hardware threads of a real one, and what the other computes nobody here can see: it
takes no CPU time from this process, and no counter tells of it. But arithmetic takes up to 1.8 times as long meanwhile, for
milliseconds or for seconds. So this is timed before and after each sample, to know which samples had the core to themselves.
"""

import collections
import time

SLOWED = 1.1
"""The arithmetic takes longer than this times its level: somebody else uses the core's units, or its clock fell."""

_LOOK_NS, _TURNS_LEAST, _TURNS_MOST = 75000.0, 200, 2000
"""About how long the arithmetic takes, on slow boards too: it is done twice around each sample of some milliseconds."""
_RECENT = 300
"""Looks that the level is taken from: a second or two, so that clocks that fall with heat are followed and not waited for."""
_LOW = 0.1
_FIRST = 50


class Pace(object):
    """What the arithmetic took lately.

    Attributes:
        level_ns: Tenth percentile of the last looks, nanoseconds per turn.
    """

    def __init__(self):
        self._recent = collections.deque(maxlen=_RECENT)
        self.level_ns = float("inf")
        taken = min(_arithmetic(_TURNS_LEAST) for _ in range(5))
        self._turns = int(min(max(_LOOK_NS / taken, _TURNS_LEAST), _TURNS_MOST))
        for _ in range(_FIRST):
            self.look()

    def look(self):
        """Nanoseconds that a turn of the arithmetic takes now; the smaller of two times, since interrupts only add."""
        taken = min(_arithmetic(self._turns), _arithmetic(self._turns))
        self._recent.append(taken)
        self.level_ns = sorted(self._recent)[int(_LOW * len(self._recent))]
        return taken

    def slowed(self, taken):
        """Whether that is more than arithmetic takes here when nobody else uses the core."""
        return taken > SLOWED * self.level_ns

    def await_calm(self, until):
        """Look until the core is as quick as it usually is, at most until that time; the last look."""
        taken = self.look()
        while self.slowed(taken) and time.perf_counter() < until:
            time.sleep(0.0005)
            taken = self.look()
        return taken


def _arithmetic(turns):
    clock = time.perf_counter
    start = clock()
    total = 0
    for number in range(turns):
        total += number * number
    return (clock() - start) / turns * 1e9
