"""What MetaSchedule searches: schedules with choices in them, drawn and mutated by its evolutionary search.

Two kinds of spaces: those that MetaSchedule's own rules make for CPUs (Shao et al. 2022, "Tensor Program Optimization with
Probabilistic Programs"), and the register tile of `scheduling`, whose sizes are choices here instead of a rule. Nothing is
parallel: engines run on one thread.
"""

from __future__ import annotations

import sys
import types
from typing import Any

from edgeprune.backends.tvm import scheduling
from edgeprune.backends.tvm.workloads import REFUSALS

# Elements of a tile's row; rows of the axis that shares the input (channels), and of others.
_COLUMNS, _CHANNELS, _ROWS = 64, 16, 4
_REDUCED = 16
_UNROLLED = (0, 16, 64)

# (rows, columns, part of the reduction, place in _UNROLLED) of tiles that are tried first: those of the rule, and larger ones.
_FIRST = ((8, 16, 1, 0), (4, 32, 1, 0), (8, 32, 1, 0), (4, 64, 1, 0), (8, 16, 4, 1), (16, 16, 1, 0))

# Of the evolution: a generation costs the search about as much as building one candidate.
_POPULATION, _FRESH, _GENERATIONS = 96, 24, 3
_SEEN = 0.3
"""Share of the first generation that is taken from what was measured."""
_CURIOSITY = 0.1
"""Share of the trials that are drawn at random, whatever the cost model says."""


def context_of(module: Any, target: Any, *, name: str, seed: int, threads: int) -> Any:
    """MetaSchedule's context for one function.

    Args:
        module: The function, as of `workloads.normalized`.
        target: ``tvm.target.Target``.
        name: For logs.
        seed: In [1, 2**31 - 1].
        threads: Of the search.
    """
    from tvm.s_tir import meta_schedule as ms

    # Intrinsics of GPUs and matrix units: the context imports them, nothing here uses them, and they take a minute to parse.
    sys.modules.setdefault("tvm.s_tir.tensor_intrin", types.ModuleType("tvm.s_tir.tensor_intrin"))
    rules = [
        ms.schedule_rule.InlineConstantScalars(),
        ms.schedule_rule.AutoInline(
            into_producer=False,
            into_consumer=True,
            inline_const_tensor=True,
            disallow_if_then_else=True,
            require_injective=True,
            require_ordered=True,
            disallow_op=["tirx.exp"],
        ),
        ms.schedule_rule.AddRFactor(max_jobs_per_core=16, max_innermost_factor=64),
        ms.schedule_rule.MultiLevelTiling(
            structure="SSRSRS",
            max_innermost_factor=64,
            reuse_write=ms.schedule_rule.ReuseType(req="may", levels=[1, 2], scope="global"),
        ),
        ms.schedule_rule.ParallelizeVectorizeUnroll(
            max_jobs_per_core=-1, max_vectorize_extent=64, unroll_max_steps=[0, 16, 64, 512], unroll_explicit=True
        ),
        ms.schedule_rule.RandomComputeLocation(),
    ]
    processing = [
        ms.postproc.DisallowDynamicLoop(),
        ms.postproc.RewriteParallelVectorizeUnroll(),
        ms.postproc.RewriteReductionBlock(),
    ]
    mutations = {
        ms.mutator.MutateTileSize(): 0.9,
        ms.mutator.MutateComputeLocation(): 0.05,
        ms.mutator.MutateUnroll(): 0.05,
    }
    return ms.TuneContext(
        module,
        target=target,
        space_generator=ms.space_generator.PostOrderApply(
            sch_rules=rules, postprocs=processing, mutator_probs=mutations
        ),
        search_strategy=ms.search_strategy.EvolutionarySearch(
            population_size=_POPULATION,
            init_measured_ratio=_SEEN,
            init_min_unmeasured=_FRESH,
            genetic_num_iters=_GENERATIONS,
            eps_greedy=_CURIOSITY,
        ),
        task_name=name,
        rand_state=seed,
        num_threads=threads,
    )


def spaces(context: Any, seed: int) -> list[Any]:
    """The schedules with choices that a function's search begins with.

    The register tile stands as often as all others together: what it draws is rarely bad.
    """
    tile = _sampled(context.mod, seed)
    general = list(context.generate_design_space())
    return general if tile is None else [*general, *[tile] * max(1, len(general))]


def first(module: Any, count: int) -> list[Any]:
    """Schedules that the search of a function begins with where nothing else is known: the rule's tile, and other sizes of it.

    Args:
        module: The function.
        count: How many at most.
    """
    import tvm_ffi

    found: dict[int, Any] = {}
    for sizes in _FIRST:
        schedule = _sampled(module, 1, sizes)
        if schedule is not None:
            found.setdefault(int(tvm_ffi.structural_hash(schedule.mod)), schedule)
    return list(found.values())[:count]


def processed(context: Any, schedule: Any) -> Any | None:
    """A schedule without postprocessing as a candidate to measure; None where the postprocessing refuses it."""
    from tvm.s_tir import meta_schedule as ms

    schedule.enter_postproc()
    try:
        if not all(step.apply(schedule) for step in context.space_generator.postprocs):
            return None
        arguments = ms.arg_info.ArgInfo.from_entry_func(schedule.mod, remove_preproc=True)
        return ms.search_strategy.MeasureCandidate(schedule, arguments)
    except REFUSALS:
        return None


def _sampled(module: Any, seed: int, sizes: tuple[int, int, int, int] | None = None) -> Any | None:
    """The register tile of a function with one reduction, its sizes drawn or given; None for other functions."""
    from tvm.s_tir import Schedule

    schedule = Schedule(module, seed=seed)
    try:
        reductions = scheduling.inlined(schedule)
        if len(reductions) != 1 or not _draw_tile(schedule, reductions[0], sizes):
            return None
    except REFUSALS:
        return None
    return schedule


def _draw_tile(schedule: Any, block: Any, sizes: tuple[int, int, int, int] | None) -> bool:
    spatial, reduced = scheduling.axes_of(schedule, block)
    followers = list(schedule.get_consumers(block))
    if not spatial or not reduced or len(followers) > 1:
        return False
    padding = list(schedule.get_producers(block))
    if followers:
        schedule.set_scope(block, 0, "local")
        last = followers[0]
    else:
        last = schedule.cache_write(block, 0, "local")
    ahead, tail = [], []
    wanted = None if sizes is None else _wanted([scheduling.extent_of(schedule, loop) for loop in spatial], *sizes[:2])
    for axis, loop in enumerate(spatial):
        most = _COLUMNS if axis == len(spatial) - 1 else _CHANNELS if axis == min(1, len(spatial) - 2) else _ROWS
        if axis < len(spatial) - 1 and scheduling.extent_of(schedule, loop) == 1:
            ahead.append(loop)
            continue
        extent = scheduling.extent_of(schedule, loop)
        decision = None if wanted is None else [extent // wanted[axis], wanted[axis]]
        factors = schedule.sample_perfect_tile(loop, n=2, max_innermost_factor=most, decision=decision)
        outer, inner = schedule.split(loop, factors)
        ahead.append(outer)
        tail.append(inner)
    depth = scheduling.extent_of(schedule, reduced[0])
    inside = None if sizes is None else scheduling.divisor(depth, sizes[2])
    decision = None if inside is None else [depth // inside, inside]
    factors = schedule.sample_perfect_tile(reduced[0], n=2, max_innermost_factor=_REDUCED, decision=decision)
    whole, part = schedule.split(reduced[0], factors)
    schedule.reorder(*ahead, whole, *reduced[1:], part, *tail)
    # With unit loops: how many loops there are must not depend on what is drawn.
    schedule.reverse_compute_at(last, ahead[-1], preserve_unit_loops=True)
    _fill_registers(schedule, block, len(tail))
    start = schedule.decompose_reduction(block, whole)
    for one in (start, last):
        _fill_registers(schedule, one, len(tail))
    equal = [1 / len(_UNROLLED)] * len(_UNROLLED)
    steps = schedule.sample_categorical(list(_UNROLLED), equal, decision=None if sizes is None else sizes[3])
    schedule.annotate(whole, "pragma_auto_unroll_max_step", steps)
    schedule.annotate(whole, "pragma_unroll_explicit", 1)
    for one in padding:
        # Whole before everything else, where it is not drawn.
        place = schedule.sample_compute_location(one, decision=None if sizes is None else -1)
        schedule.compute_at(one, place, preserve_unit_loops=True)
    return True


def _wanted(extents: list[int], rows: int, columns: int) -> list[int]:
    """Inner sizes of the output's axes: those of the rule, see `scheduling`."""
    counts = [scheduling.divisor(extent, rows) for extent in extents[:-1]]
    place = max(range(len(counts)), key=lambda axis: (counts[axis], axis == 1), default=None)
    inner = [count if axis == place else 1 for axis, count in enumerate(counts)]
    return [*inner, scheduling.divisor(extents[-1], columns)]


def _fill_registers(schedule: Any, block: Any, depth: int) -> None:
    """The tile of a block: its last loop one vector, the others unrolled."""
    loops = schedule.get_loops(block)
    schedule.vectorize(loops[-1])
    for loop in loops[-depth:-1]:
        schedule.unroll(loop)
