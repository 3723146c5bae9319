"""A schedule for every reduction, by rule instead of by search.

Without a schedule TVM's code for a CPU is the plain loop nest: one multiply-accumulate at a time into memory. The rule here is
the textbook one (Goto and van de Geijn 2008, "Anatomy of high-performance matrix multiplication"; the register tile only): a
tile of the output, some rows by some neighboring elements, is kept in registers while the reduction runs over it, and what
follows the reduction (a sum, an activation) is done on the tile. It reads no weights and no timings, so equal functions get
equal code, alone and within a network. Searching for better ones is tuning, and is not done here.
"""

from __future__ import annotations

from typing import Any

# Elements of a tile's row: one AVX-512 register, two of AVX2, four of Neon.
_COLUMNS = 16
# Rows of a tile: all of them, one row of the input and the weights must fit the registers (32 of 64 bytes, 16 of 32, 32 of 16).
_ROWS = {"avx512f": 8}
_FEWEST_ROWS = 4

_REDUCE = 2
"""``IterVar.CommReduce``."""


def scheduled(module: Any, isa: tuple[str, ...]) -> Any:
    """The module with every function scheduled that the rule fits; the others stay as they are.

    Args:
        module: After `FuseTIR`.
        isa: Flags of the target.
    """
    import tvm
    from tvm.s_tir import ScheduleError

    rows = max((count for flag, count in _ROWS.items() if flag in isa), default=_FEWEST_ROWS)
    changed = {}
    for name, function in module.functions.items():
        if isinstance(function, tvm.tirx.PrimFunc):
            try:
                changed[name] = _scheduled(function, rows).with_attrs(dict(function.attrs.items()))
            # The rule does not fit every function: then the plain loops stay, which are right, and slow.
            except (ScheduleError, ValueError):
                continue
    return tvm.IRModule({**dict(module.functions.items()), **changed})


def _scheduled(function: Any, rows: int) -> Any:
    import tvm
    from tvm.s_tir import Schedule

    schedule = Schedule(tvm.IRModule({"main": function}))
    blocks = schedule.get_child_blocks(schedule.get_sblock("root"))
    for block in blocks[:-1]:
        # What is computed between the reduction and the last block goes into the last; what is padded before it stays.
        if not _reduces(schedule, block) and not any(_reduces(schedule, one) for one in schedule.get_consumers(block)):
            schedule.compute_inline(block)
    blocks = schedule.get_child_blocks(schedule.get_sblock("root"))
    reductions = [block for block in blocks if _reduces(schedule, block)]
    if len(reductions) == 1:
        _tiled(schedule, reductions[0], rows)
    return schedule.mod["main"]


def _tiled(schedule: Any, block: Any, rows: int) -> None:
    """A register tile for one reduction."""
    kinds = [int(item.iter_type) for item in schedule.get(block).iter_vars]
    loops = schedule.get_loops(block)
    if len(loops) != len(kinds):
        return
    spatial = [loop for loop, kind in zip(loops, kinds, strict=True) if kind != _REDUCE]
    reduced = [loop for loop, kind in zip(loops, kinds, strict=True) if kind == _REDUCE]
    if not spatial or not reduced:
        return
    # Channels of a convolution's output, rows of a product: neighbors there share what they read. Where their number has no
    # divisor that fills a tile (61 channels), the rows of another axis do.
    counts = [_divisor(_extent(schedule, loop), rows) for loop in spatial[:-1]]
    place = max(range(len(counts)), key=lambda axis: (counts[axis], axis == 1), default=None)
    columns = _divisor(_extent(schedule, spatial[-1]), _COLUMNS)
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
    if _extent(schedule, loops[-1]) > 1:
        schedule.vectorize(loops[-1])
    for loop in loops[-depth:-1]:
        schedule.unroll(loop)


def _reduces(schedule: Any, block: Any) -> bool:
    return any(int(item.iter_type) == _REDUCE for item in schedule.get(block).iter_vars)


def _extent(schedule: Any, loop: Any) -> int:
    return int(schedule.get(loop).extent)


def _divisor(size: int, most: int) -> int:
    """The largest divisor of `size` that is at most `most`."""
    return next(count for count in range(min(size, most), 0, -1) if size % count == 0)
