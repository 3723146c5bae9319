"""What pruning can reach: widths of candidates, the kernels that they run, and which of those to measure.

The allocator will ask for any widths, mostly at the edges of the latency staircase; so candidates are drawn with widths
that are multiples of 16, 8 or 4, and some that are odd, from the dense network down to an eighth. Of the kernels that they
run, those are measured first that matter most, and after them those that are farthest from what is measured already.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgeprune.latency.features import FeatureMatrix, Machine, features, vector_bits
from edgeprune.spec import SMALLEST_SHARE, Kernel, smallest_width

if TYPE_CHECKING:
    from edgeprune.lowering.kernel_graph import KernelGraph

Widths = dict[str, int]

# Chances of the number that all widths of a drawn candidate are multiples of.
ALIGNMENTS = {16: 0.30, 8: 0.25, 4: 0.30, 1: 0.15}
_WHOLE = 0.1
_LEAST_PER_OP = 3
_JITTER = 0.15

# A deliberately plain price of a kernel, for sharing out measuring time only: work at 50 GMAC/s or traffic at 10 GB/s,
# whichever takes longer, and a microsecond to start. Ratios between kernels are all that is used.
_MACS_PER_MS, _BYTES_PER_MS, _START_MS = 5e7, 1e7, 1e-3

_COORDINATES = (
    ("log_work", 1.0),
    ("log_bytes", 0.5),
    ("log_bytes_in", 0.5),
    ("log_bytes_out", 0.5),
    ("log_pixels", 0.5),
    ("out_mod_16", 0.05),
    ("in_mod_16", 0.05),
    ("kernel_area", 0.2),
    ("stride", 1.0),
    ("log_groups", 0.5),
    ("activation", 0.5),
    ("residual", 0.7),
    ("bias", 0.2),
    ("operands", 0.5),
)


def candidates(size: int) -> tuple[int, ...]:
    """Widths worth measuring of a group of `size` units: multiples of 16, 8 and 4, a few odd ones, and `size`.

    At most about 48; the smallest is an eighth of `size`, at least one unit.
    """
    least = smallest_width(size)
    step = next((step for step in (4, 8, 16, 32, 64, 128) if size / step <= 32), 256)
    if size < 16:
        step = 1
    found = {size, least, *range(step, size, step)}
    # Odd widths leave the blocked layouts of some runtimes: a few must be among the measured.
    found.update(width for part in (0.3, 0.5, 0.7, 0.9) if (width := int(size * part) | 1) < size)
    return tuple(sorted(width for width in found if least <= width <= size))


def draw(sizes: Mapping[str, int], number: int, *, seed: int) -> list[Widths]:
    """Random width vectors.

    Half of them have widths drawn for each group by itself, half one common share with some jitter; each has its own
    alignment, and now and then a group stays whole.

    Args:
        sizes: Group name to dense units.
        number: How many.
        seed: Equal seeds and sizes give equal vectors.
    """
    source = random.Random(f"widths/{seed}")
    alignments, chances = list(ALIGNMENTS), list(ALIGNMENTS.values())
    vectors = []
    for index in range(number):
        alignment = source.choices(alignments, chances)[0]
        common = source.uniform(SMALLEST_SHARE, 1.0)
        widths = {}
        for name, size in sizes.items():
            if source.random() < _WHOLE:
                widths[name] = size
            elif index % 2:
                widths[name] = aligned(size, common * source.uniform(1 - _JITTER, 1 + _JITTER), alignment)
            elif alignment == 1:
                widths[name] = source.choice(candidates(size))
            else:
                widths[name] = aligned(size, source.uniform(SMALLEST_SHARE, 1.0), alignment)
        vectors.append(widths)
    return vectors


def aligned(size: int, share: float, multiple_of: int) -> int:
    """A share of `size` units as a multiple of a number where the group is large enough for one; at least one unit."""
    least = smallest_width(size)
    while multiple_of > 1 and multiple_of > size // 2:
        multiple_of //= 2
    width = round(size * min(share, 1.0) / multiple_of) * multiple_of
    return min(size, max(least if multiple_of == 1 else multiple_of, width))


@dataclass(frozen=True)
class Reach:
    """What pruning reaches, as far as drawn candidates show it.

    Attributes:
        dense: Kernels of each dense model, with how often it runs them.
        candidates: The same of every candidate, the dense models first.
        isa: Instruction set flags of the board.
    """

    dense: tuple[Counter[Kernel], ...]
    candidates: tuple[Counter[Kernel], ...]
    isa: tuple[str, ...]

    def kernels(self) -> list[Kernel]:
        """All distinct kernels, by key."""
        return sorted(set().union(*self.candidates), key=lambda kernel: kernel.key)

    def counts(self) -> Counter[Kernel]:
        """How often all candidates together run each kernel."""
        seen: Counter[Kernel] = Counter()
        for kernels in self.candidates:
            seen.update(kernels)
        return seen


def reach(
    kernel_graphs: Sequence[KernelGraph],
    *,
    seed: int = 0,
    draws: int = 300,
    further: Sequence[Counter[Kernel]] = (),
) -> Reach:
    """Draw candidates of one or more models and note the kernels that they run.

    Args:
        kernel_graphs: The lowered models, for one board.
        seed: Of the drawn widths.
        draws: Candidates drawn of each; more reach rarer kernels.
        further: Kernels of candidates that were drawn otherwise, with how often each runs them.
    """
    dense = tuple(Counter(kernel_graph.at(group_sizes(kernel_graph))) for kernel_graph in kernel_graphs)
    drawn = [
        Counter(kernel_graph.at(widths))
        for kernel_graph in kernel_graphs
        for widths in draw(group_sizes(kernel_graph), draws, seed=seed)
    ]
    return Reach(dense, (*dense, *drawn, *further), kernel_graphs[0].isa)


def sample(kernel_graph: KernelGraph, count: int, *, seed: int = 0, draws: int = 300) -> list[Kernel]:
    """The first `count` of what `ordered` puts into order, for one model.

    Args:
        kernel_graph: The lowered model.
        count: Most kernels.
        seed: Of the drawn widths.
        draws: Candidates drawn; more reach rarer kernels.
    """
    return ordered(reach([kernel_graph], seed=seed, draws=draws), count)


def ordered(reached: Reach, count: int) -> list[Kernel]:
    """Kernels to measure, the most telling first: any beginning of the list is a good choice of that length.

    The dense networks' kernels come first, by cost, but one of each operation before a second of any: a table that lacks an
    operation predicts no network. Then each operation gets a few, then its share (by cost and by how many different kernels it
    has), within which the next kernel is always the one farthest from those chosen.
    """
    dense = {kernel for kernels in reached.dense for kernel in kernels}
    pool = _Pool.of(reached)
    by_cost = sorted(dense, key=lambda kernel: (-pool.cost_of(kernel), kernel.key))
    leading = {kernel.op: kernel for kernel in reversed(by_cost)}
    first = sorted(by_cost, key=lambda kernel: leading[kernel.op] != kernel)
    taken = [pool.index[kernel] for kernel in first][:count]
    queues = {op: pool.spread(op, taken) for op in sorted({kernel.op for kernel in pool.kernels})}
    shares = pool.shares()
    given = Counter(pool.kernels[index].op for index in taken)
    while len(taken) < count and any(queues.values()):
        waiting = [op for op in queues if queues[op]]
        # What was never measured cannot be predicted: rare operations get a few before common ones get many.
        op = max(waiting, key=lambda op: (given[op] < _LEAST_PER_OP, shares[op] / (given[op] + 1), op))
        taken.append(queues[op].pop(0))
        given[op] += 1
    return [pool.kernels[index] for index in taken]


def group_sizes(kernel_graph: KernelGraph) -> Widths:
    """Dense widths of the groups that can be pruned."""
    return {group.name: group.size for group in kernel_graph.graph.groups}


def price(kernels: Sequence[Kernel], isa: Sequence[str]) -> NDArray[np.float64]:
    """A plain guess of each kernel's cost for sharing out measuring time; only ratios mean anything. Shape (kernels,).

    Args:
        kernels: At least one.
        isa: Instruction set flags of the board.
    """
    return _guessed_ms(features(kernels, Machine(vector_bits(isa))))


def coordinates(kernels: Sequence[Kernel], isa: Sequence[str]) -> NDArray[np.float64]:
    """Where kernels lie; a distance of one is a clear difference. Shape (kernels, coordinates)."""
    return _points(features(kernels, Machine(vector_bits(isa))))


def _guessed_ms(matrix: FeatureMatrix) -> NDArray[np.float64]:
    return np.asarray(np.maximum(matrix.work / _MACS_PER_MS, matrix.traffic / _BYTES_PER_MS) + _START_MS)


def _points(matrix: FeatureMatrix) -> NDArray[np.float64]:
    return np.column_stack([matrix.column(name) * weight for name, weight in _COORDINATES])


@dataclass(frozen=True)
class _Pool:
    """Distinct kernels with where they lie and what they matter.

    Attributes:
        kernels: Sorted by key.
        index: Kernel to its place in `kernels`.
        points: Shape (kernels, coordinates), weighted so that a distance of one is a clear difference.
        costs: Shape (kernels,), from `price`.
        weights: Shape (kernels,): cost times how often candidates run it.
    """

    kernels: list[Kernel]
    index: dict[Kernel, int]
    points: NDArray[np.float64]
    costs: NDArray[np.float64]
    weights: NDArray[np.float64]

    @classmethod
    def of(cls, reached: Reach) -> _Pool:
        kernels, seen = reached.kernels(), reached.counts()
        matrix = features(kernels, Machine(vector_bits(reached.isa)))
        costs = _guessed_ms(matrix)
        times = np.array([seen[kernel] for kernel in kernels], dtype=np.float64)
        places = {kernel: place for place, kernel in enumerate(kernels)}
        return cls(kernels, places, _points(matrix), costs, costs * times)

    def cost_of(self, kernel: Kernel) -> float:
        return float(self.costs[self.index[kernel]])

    def shares(self) -> dict[str, float]:
        """Operation to its share of the measurements: half by cost, half by the number of distinct kernels."""
        shares: dict[str, float] = {}
        for kernel, weight in zip(self.kernels, self.weights / self.weights.sum(), strict=True):
            shares[kernel.op] = shares.get(kernel.op, 0.0) + 0.5 * float(weight) + 0.5 / len(self.kernels)
        return shares

    def spread(self, op: str, taken: Sequence[int]) -> list[int]:
        """Kernels of one operation that are not taken yet, each the farthest from all before it.

        Distances count a little more for kernels that matter more.
        """
        members = np.array([place for place, kernel in enumerate(self.kernels) if kernel.op == op])
        points, weights = self.points[members], self.weights[members]
        near = np.full(len(members), np.inf)
        free = np.ones(len(members), dtype=bool)
        importance = (weights / weights.max()) ** 0.25
        order: list[int] = []
        pending = [int(np.flatnonzero(members == place)[0]) for place in taken if self.kernels[place].op == op]
        while free.any():
            known = bool(pending)
            # With nothing known every distance is infinite, and importance alone decides.
            gain = np.where(np.isinf(near), importance * 1e9, near * importance)
            pick = pending.pop(0) if known else int(np.argmax(np.where(free, gain, -1.0)))
            free[pick] = False
            near = np.minimum(near, np.sqrt(((points - points[pick]) ** 2).sum(axis=1)))
            if not known:
                order.append(int(members[pick]))
        return order
