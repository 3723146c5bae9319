"""Schedules of a function at one width as beginnings for the same function at another.

A pruned network's functions are those of another pruned network at widths that differ a little. Where the database does not
know a function, the schedules of the one that computes the same at the nearest widths are put upon it, choice by choice: a
tile keeps its size as far as the new width divides by it.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log, prod
from typing import Any

from edgeprune.backends.tvm.tuning_database import TuningDatabase
from edgeprune.backends.tvm.workloads import REFUSALS, Shape, Workloads, hash_of


def refactored(extent: int, factors: Sequence[int], innermost: int = 0) -> list[int]:
    """Factors of another extent that are as near to these as its divisors allow, from the innermost, which matters most.

    Args:
        extent: Length of the loop that is split.
        factors: Of the loop that was split elsewhere, from the outermost.
        innermost: The largest innermost factor; 0 is any.
    """
    left = extent
    result: list[int] = []
    for place, factor in enumerate(reversed(factors[1:])):
        most = innermost if innermost > 0 and place == 0 else left
        divisors = [count for count in range(1, min(left, most) + 1) if left % count == 0]
        result.append(min(divisors, key=lambda count: (abs(log(count / factor)), count)))
        left //= result[-1]
    return [left, *reversed(result)]


def nearest(shape: Shape, others: Sequence[Shape], known: Sequence[int], count: int) -> list[int]:
    """Indices of the functions that compute the same at the nearest widths, nearest first.

    Args:
        shape: The function that is asked for.
        others: The functions of a database.
        known: Of these, those whose schedules have been searched.
        count: How many at most.
    """
    far = {index: shape.distance(others[index]) for index in known}
    return sorted((index for index in known if 0 < far[index] < float("inf")), key=far.__getitem__)[:count]


def starts(
    module: Any,
    shape: Shape,
    workloads: Workloads,
    shapes: Sequence[Shape],
    database: TuningDatabase,
    searched: Sequence[int],
    count: int,
) -> list[Any]:
    """Schedules of a function that the database has no search of, made of those of its neighbors.

    Args:
        module: The function, as of `normalized`.
        shape: Its shape.
        workloads: The functions of the database.
        shapes: Their shapes.
        database: What is known of them.
        searched: Line numbers of those of them whose schedules may be taken.
        count: How many schedules at most.

    Returns:
        Schedules without postprocessing, each another program.
    """

    found: dict[int, Any] = {}
    for index in nearest(shape, shapes, searched, 2):
        for record in [one for one in database.best(index, 2 * count) if one.searched][:count]:
            try:
                schedule = _moved(workloads.schedule(record).trace, module)
            except REFUSALS:
                continue
            found.setdefault(hash_of(schedule.mod), schedule)
    return list(found.values())[:count]


def _moved(trace: Any, module: Any) -> Any:
    """A schedule's instructions on another function, with the nearest choices that it allows."""
    from tvm.s_tir import Schedule

    schedule = Schedule(module)

    def decide(instruction: Any, inputs: Any, attributes: Any, decision: Any) -> Any:
        if decision is None or str(instruction.kind.name) != "SamplePerfectTile":
            return decision
        extent = int(schedule.get(inputs[0]).extent)
        factors = [int(factor) for factor in decision]
        innermost = int(attributes[1]) if len(attributes) > 1 else 0
        return factors if prod(factors) == extent else refactored(extent, factors, innermost)

    trace.apply_to_schedule(schedule, remove_postproc=True, decision_provider=decide)
    return schedule
