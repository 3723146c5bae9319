"""The functions of a program with schedules that search has found: tuned now, or taken from the database."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from edgeprune.backends.tvm import tuning_database
from edgeprune.backends.tvm.target import TvmTarget
from edgeprune.backends.tvm.tuning import Tuning, tune
from edgeprune.backends.tvm.workloads import REFUSALS, Workloads, hash_of, normalized, shape_of


def tuned_functions(
    module: Any, calls: Sequence[str], target: TvmTarget, tuning: Tuning | None
) -> Callable[[Any], Any | None] | None:
    """What gives a function its best known schedule, for `scheduling.scheduled`; None where nothing is known.

    Args:
        module: After `FuseTIR`.
        calls: Name of the function behind each call of one inference.
        target: What is compiled for.
        tuning: Search first for what is not known well.

    Raises:
        CompileError: See `tuning.tune`.
    """
    if tuning is not None:
        found = tune(_functions(module, calls), target, tuning)
        if tuning.told is not None:
            tuning.told(str(found))
    database = tuning_database.found(target)
    return None if database is None else Workloads(database).tuned


def _functions(module: Any, calls: Sequence[str]) -> list[tuple[str, int]]:
    """JSON of each function that can be tuned, and how often one inference calls it; equal functions once."""
    import tvm

    counts = Counter(calls)
    found: dict[int, tuple[Any, int]] = {}
    for variable, function in module.functions.items():
        count = counts[str(variable.name_hint)]
        if not isinstance(function, tvm.tirx.PrimFunc) or not count:
            continue
        alone = normalized(function)
        try:
            shape_of(alone)
        except REFUSALS:
            continue  # not made of blocks, so that there is nothing to schedule
        key = hash_of(alone)
        found[key] = (alone, count + (found[key][1] if key in found else 0))
    return [(tvm.ir.save_json(alone), count) for alone, count in found.values()]
