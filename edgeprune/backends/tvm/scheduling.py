"""A schedule for every reduction, by rule instead of by search.

Without a schedule TVM's code for a CPU is the plain loop nest: one multiply-accumulate at a time into memory. The rule here is
the textbook one (Goto and van de Geijn 2008, "Anatomy of high-performance matrix multiplication"; the register tile only): a
tile of the output, some rows by some neighboring elements, is kept in registers while the reduction runs over it, and what
follows the reduction (a sum, an activation) is done on the tile. It reads no weights and no timings, so equal functions get
equal code, alone and within a network. Better ones are searched for by tuning (`edgeprune.backends.tvm.searching`), which
begins with this rule's; what it has found is taken where it is given.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# Elements of a tile's row: one AVX-512 register, two of AVX2, four of Neon.
_COLUMNS = 16
# Rows of a tile: all of them, one row of the input and the weights must fit the registers (32 of 64 bytes, 16 of 32, 32 of 16).
_ROWS = {"avx512f": 8}
_FEWEST_ROWS = 4

_REDUCE = 2
"""``IterVar.CommReduce``."""


def scheduled(
    module: Any, isa: tuple[str, ...], tuned: Callable[[Any], Any | None] | None = None
) -> tuple[Any, frozenset[str]]:
    """The module with every function scheduled that the rule fits; the others stay as they are.

    Args:
        module: After `FuseTIR`.
        isa: Flags of the target.
        tuned: Gives a function with a schedule that was found by search, or None; the rule does the others.

    Returns:
        The module, and the names of the functions that search has scheduled.
    """
    import tvm

    changed, searched = {}, set()
    for variable, function in module.functions.items():
        if isinstance(function, tvm.tirx.PrimFunc):
            found = None if tuned is None else tuned(function)
            if found is not None:
                searched.add(str(variable.name_hint))
            else:
                schedule = ruled(tvm.IRModule({"main": function}), isa)
                if schedule is None:
                    continue
                found = schedule.mod["main"].with_attrs(dict(function.attrs.items()))
            changed[variable] = found
    return tvm.IRModule({**dict(module.functions.items()), **changed}), frozenset(searched)


def ruled(module: Any, isa: tuple[str, ...]) -> Any | None:
    """The rule's schedule of a module whose only function is ``main``; None where the rule does not fit.

    Args:
        module: The function.
        isa: Flags of the target.
    """
    from tvm.s_tir import Schedule, ScheduleError

    rows = max((count for flag, count in _ROWS.items() if flag in isa), default=_FEWEST_ROWS)
    schedule = Schedule(module)
    try:
        reductions = inlined(schedule)
        if len(reductions) == 1:
            _tiled(schedule, reductions[0], rows)
    # The rule does not fit every function: then the plain loops stay, which are right, and slow.
    except (ScheduleError, ValueError):
        return None
    return schedule


def inlined(schedule: Any) -> list[Any]:
    """Put what stands between a reduction and the last block into the last; returns the blocks that reduce."""
    blocks = schedule.get_child_blocks(schedule.get_sblock("root"))
    for block in blocks[:-1]:
        # What is computed between the reduction and the last block goes into the last; what is padded before it stays.
        if not _reduces(schedule, block) and not any(_reduces(schedule, one) for one in schedule.get_consumers(block)):
            schedule.compute_inline(block)
    blocks = schedule.get_child_blocks(schedule.get_sblock("root"))
    return [block for block in blocks if _reduces(schedule, block)]


def axes_of(schedule: Any, block: Any) -> tuple[list[Any], list[Any]]:
    """Loops of a reduction's block: those over the output, and those that it sums over; both empty where that is not clear."""
    kinds = [int(item.iter_type) for item in schedule.get(block).iter_vars]
    loops = schedule.get_loops(block)
    if len(loops) != len(kinds):
        return [], []
    spatial = [loop for loop, kind in zip(loops, kinds, strict=True) if kind != _REDUCE]
    return spatial, [loop for loop, kind in zip(loops, kinds, strict=True) if kind == _REDUCE]


def _tiled(schedule: Any, block: Any, rows: int) -> None:
    """A register tile for one reduction."""
    spatial, reduced = axes_of(schedule, block)
    if not spatial or not reduced:
        return
    # Channels of a convolution's output, rows of a product: neighbors there share what they read. Where their number has no
    # divisor that fills a tile (61 channels), the rows of another axis do.
    counts = [divisor(extent_of(schedule, loop), rows) for loop in spatial[:-1]]
    place = max(range(len(counts)), key=lambda axis: (counts[axis], axis == 1), default=None)
    columns = divisor(extent_of(schedule, spatial[-1]), _COLUMNS)
    followers = list(schedule.get_consumers(block))
    if len(followers) > 1:
        return
    if followers:
        schedule.set_scope(block, 0, "local")
        last = followers[0]
    else:
        last = schedule.cache_write(block, 0, "local")
    outer, inner = schedule.split(spatial[-1], [None, columns])
    tail = [inner]
    ahead = [*spatial[:-1], outer]
    if place is not None:
        ahead[place], row = schedule.split(spatial[place], [None, counts[place]])
        tail = [row, inner]
    schedule.reorder(*ahead, *reduced, *tail)
    schedule.reverse_compute_at(last, outer)
    # Before the initialization is split off: what writes a buffer together with another block cannot be a vector.
    _unrolled(schedule, block, len(tail))
    start = schedule.decompose_reduction(block, reduced[0])
    for one in (start, last):
        _unrolled(schedule, one, len(tail))


def _unrolled(schedule: Any, block: Any, depth: int) -> None:
    """The last loop of a block as one vector, those of the tile around it unrolled."""
    loops = schedule.get_loops(block)
    if extent_of(schedule, loops[-1]) > 1:
        schedule.vectorize(loops[-1])
    for loop in loops[-depth:-1]:
        schedule.unroll(loop)


def _reduces(schedule: Any, block: Any) -> bool:
    return any(int(item.iter_type) == _REDUCE for item in schedule.get(block).iter_vars)


def extent_of(schedule: Any, loop: Any) -> int:
    """Length of a loop."""
    return int(schedule.get(loop).extent)


def divisor(size: int, most: int) -> int:
    """The largest divisor of `size` that is at most `most`."""
    return next(count for count in range(min(size, most), 0, -1) if size % count == 0)
