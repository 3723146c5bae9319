"""Step hunting: bisect between widths whose measured latencies differ, down to neighboring widths.

Latency is a staircase in the channel counts, and pruning pays at its edges alone. A *line* is one channel group whose
width varies while all others are dense; its latency is the sum of the kernels that the group touches. An interval between
two measured widths is open while their latencies differ by more than `STEP`. Each turn measures the middles of the
intervals that look most like an edge; where the kernels of a middle are known already, it costs nothing. The idea of
sampling more densely where a model errs is nn-Meter's (Zhang et al., MobiSys 2021); that found steps are bisected is not.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from edgeprune.profiling import space
from edgeprune.spec import Kernel, smallest_width

if TYPE_CHECKING:
    from edgeprune.profiling.subjects import Subject

STEP = 0.05
"""Two widths differ when the slower takes this much longer: more than a measurement repeats to."""

LINES = 8
"""Most groups that are looked at."""

_LEAST_MS = 1e-6
_LEAST_RANGE = 2
_FIRST_PARTS = 4
"""Widths that a line begins with: its ends, and what cuts it into so many parts."""


@dataclass
class Line:
    """One group of one model, its width varied.

    Attributes:
        subject: The model.
        group: Name of the group.
        size: Its dense width.
        fixed: Kernels that its width does not change.
    """

    subject: Subject
    group: str
    size: int
    fixed: Counter[Kernel]
    _touched: dict[int, Counter[Kernel]] = field(default_factory=dict)

    @classmethod
    def of(cls, subject: Subject, group: str, size: int) -> Line:
        """The line of one group."""
        dense = subject.dense()
        least = Counter(subject.kernel_graph.at({group: smallest_width(size)}))
        return cls(subject, group, size, dense & least)

    def touched(self, width: int) -> Counter[Kernel]:
        """Kernels that the group touches, at one of its widths."""
        if width not in self._touched:
            self._touched[width] = Counter(self.subject.kernel_graph.at({self.group: width})) - self.fixed
        return self._touched[width]

    def ms(self, width: int, known: Mapping[Kernel, float]) -> float | None:
        """What the touched kernels take together, milliseconds; None where one is not known."""
        kernels = self.touched(width)
        if not all(kernel in known for kernel in kernels):
            return None
        return max(_LEAST_MS, _sum(kernels, known))

    def widths(self, known: Mapping[Kernel, float]) -> dict[int, float]:
        """Widths that were looked at and are known, with their latency, ascending."""
        found = {width: self.ms(width, known) for width in sorted(self._touched)}
        return {width: ms for width, ms in found.items() if ms is not None}

    def first(self) -> list[int]:
        """Widths to begin with."""
        least = smallest_width(self.size)
        return sorted({least + (self.size - least) * part // _FIRST_PARTS for part in range(_FIRST_PARTS + 1)})


def lines(
    subjects: Sequence[Subject], expected: Callable[[Iterable[Kernel]], Mapping[Kernel, float]], count: int = LINES
) -> list[Line]:
    """The groups whose widths matter most, each kind once: repeated blocks run the same kernels.

    Args:
        subjects: The models.
        expected: About how long kernels take, milliseconds; those that nothing is known of are left out.
        count: Most lines.
    """
    kinds: dict[frozenset[tuple[Kernel, int]], Line] = {}
    for subject in subjects:
        for group, size in sorted(space.group_sizes(subject.kernel_graph).items()):
            if size - smallest_width(size) >= _LEAST_RANGE:
                line = Line.of(subject, group, size)
                kinds.setdefault(frozenset(line.touched(size).items()), line)
    every = [line for kind, line in kinds.items() if kind]
    ends = [(line.touched(line.size), line.touched(smallest_width(line.size))) for line in every]
    ms = expected(kernel for pair in ends for kernels in pair for kernel in kernels)
    gains = [_sum(dense, ms) - _sum(least, ms) for dense, least in ends]
    # The sort keeps the order of equals, which is that of models and names.
    return [every[place] for place in sorted(range(len(every)), key=lambda place: -gains[place])][:count]


def _sum(kernels: Counter[Kernel], ms: Mapping[Kernel, float]) -> float:
    return sum(ms.get(kernel, 0.0) * count for kernel, count in kernels.items())


def hunt(
    hunted: Sequence[Line], known: Mapping[Kernel, float], count: int, refused: Collection[Kernel] = ()
) -> list[Kernel]:
    """What to measure next, at most about `count` kernels; empty where every interval is closed.

    Args:
        hunted: The lines.
        known: Measured kernels, milliseconds.
        count: Kernels that there is time for.
        refused: Kernels that cannot be measured alone; what lies beyond them stays unknown.
    """
    out = {*known, *refused}
    wanted: dict[Kernel, None] = {}
    for line in hunted:
        # The ends first, then what lies between: a line that was begun can be bisected.
        for width in line.first():
            wanted.update(dict.fromkeys(kernel for kernel in line.touched(width) if kernel not in out))
    if wanted:
        return list(wanted)[:count]
    options: list[tuple[float, int, int]] = []
    for place, line in enumerate(hunted):
        options += [(score, place, middle) for score, middle in _open(line, known)]
    for _, place, middle in sorted(options, key=lambda option: (-option[0], option[1], option[2])):
        if len(wanted) >= count:
            break
        wanted.update(dict.fromkeys(kernel for kernel in hunted[place].touched(middle) if kernel not in out))
    return list(wanted)


def _open(line: Line, known: Mapping[Kernel, float]) -> list[tuple[float, int]]:
    """Open intervals of a line as (how much like an edge, width in the middle), all middles that are known looked at."""
    while True:
        widths = line.widths(known)
        found, free = [], False
        for lower, upper in pairwise(widths):
            ratio = widths[upper] / widths[lower]
            if upper - lower < 2 or not differs(ratio):
                continue
            middle = (lower + upper) // 2
            if line.ms(middle, known) is not None:
                free = True
            else:
                # A ramp changes as its width does; an edge changes more. Large changes count more than small ones.
                steepness = abs(math.log(ratio)) / math.log(upper / lower)
                found.append((abs(widths[upper] - widths[lower]) * steepness, middle))
        if not free:
            return found


def differs(ratio: float) -> bool:
    """Whether two latencies of this ratio are on two steps."""
    return abs(math.log(ratio)) > math.log(1 + STEP)


def edges(hunted: Sequence[Line], known: Mapping[Kernel, float]) -> list[dict[str, Any]]:
    """Neighboring widths of which one is slower, as JSON: ``model``, ``group``, ``width`` (the wider one), ``below_ms``
    (of what the group touches at one unit less), ``at_ms``.

    On a line whose latency rises with each unit by more than `STEP`, every width is an edge.
    """
    found = []
    for line in hunted:
        for width in line.first():
            line.touched(width)
        _open(line, known)
        widths = line.widths(known)
        for lower, upper in pairwise(widths):
            if upper - lower == 1 and differs(widths[upper] / widths[lower]):
                found.append(
                    {
                        "model": line.subject.name,
                        "group": line.group,
                        "width": upper,
                        "below_ms": widths[lower],
                        "at_ms": widths[upper],
                    }
                )
    return found
