"""TVM's functions as what a tuning database names: alone in a module, and the schedules that it knows of them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import log
from typing import Any

from edgeprune.backends.tvm.tuning_database import Record, TuningDatabase

# What TVM raises where a schedule does not fit: its own classes derive from these, and which is raised depends on the place.
REFUSALS = (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError)

_KEPT_ATTRIBUTES = ("global_symbol", "tirx.noalias")
_NUMBERED = re.compile(r"_\d+$")


@dataclass(frozen=True)
class Shape:
    """What a function computes, without and with its widths.

    Attributes:
        kind: Of each of its blocks the name and the kinds of its axes: equal for the same operation at other widths.
        extents: Of each of its blocks the lengths of its axes.
    """

    kind: tuple[tuple[str, tuple[int, ...]], ...]
    extents: tuple[tuple[int, ...], ...]

    def distance(self, other: Shape) -> float:
        """How far the widths are apart, as the sum of the logarithms of their ratios; infinite for another operation."""
        if self.kind != other.kind:
            return float("inf")
        pairs = (
            (a, b)
            for mine, its in zip(self.extents, other.extents, strict=True)
            for a, b in zip(mine, its, strict=True)
        )
        return sum(abs(log(a / b)) for a, b in pairs)


def normalized(function: Any) -> Any:
    """A module with only this function, under the name and with the attributes that all have: equal functions are equal."""
    import tvm

    for name in list(function.attrs.keys()) if function.attrs is not None else ():
        if name not in _KEPT_ATTRIBUTES:
            function = function.without_attr(name)
    return tvm.IRModule({"main": function.with_attr("global_symbol", "main").with_attr("tirx.noalias", True)})


def renamed(scheduled: Any, original: Any) -> Any:
    """A function from a module of `normalized`, with the attributes that it had before."""
    attributes = dict(original.attrs.items()) if original.attrs is not None else {}
    result = scheduled if "global_symbol" in attributes else scheduled.without_attr("global_symbol")
    return result.with_attrs(attributes) if attributes else result


def shape_of(module: Any) -> Shape:
    """See `Shape`; of a module of `normalized`."""
    from tvm.s_tir import Schedule

    schedule = Schedule(module)
    kinds, extents = [], []
    for block in schedule.get_child_blocks(schedule.get_sblock("root")):
        found = schedule.get(block)
        kinds.append((_NUMBERED.sub("", str(found.name_hint)), tuple(int(item.iter_type) for item in found.iter_vars)))
        extents.append(tuple(int(item.dom.extent) for item in found.iter_vars))
    return Shape(tuple(kinds), tuple(extents))


def as_json(module: Any) -> list[str]:
    """A module as TVM's databases keep it."""
    from tvm.s_tir.meta_schedule.database import Workload

    entry: list[str] = Workload(module).as_json()
    return entry


def instructions_of(schedule: Any) -> Any:
    """A schedule's instructions and choices, as JSON has them."""
    return _plain(schedule.trace.as_json())


def _plain(value: Any) -> Any:
    """TVM's containers and numbers as Python's."""
    if value is None or isinstance(value, str):
        return None if value is None else str(value)
    if isinstance(value, bool | int | float):
        return value
    if hasattr(value, "items"):
        return {str(key): _plain(one) for key, one in value.items()}
    if hasattr(value, "value"):  # IntImm, FloatImm
        return _plain(value.value)
    return [_plain(one) for one in value]


class Workloads:
    """The functions of a database as modules.

    Args:
        database: What is known.
    """

    def __init__(self, database: TuningDatabase) -> None:
        from tvm.s_tir.meta_schedule.database import Workload

        self._database = database
        self.modules: list[Any] = [Workload.from_json(entry).mod for entry in database.workloads]
        self._by_hash: dict[int, list[int]] = {}
        for index in range(len(self.modules)):
            self._note(index)

    def find(self, module: Any) -> int | None:
        """Line number of a function in the database; None where it is not there."""
        import tvm_ffi

        for index in self._by_hash.get(hash_of(module), ()):
            if tvm_ffi.structural_equal(self.modules[index], module):
                return index
        return None

    def add(self, module: Any) -> int:
        """Line number of a function, which is added where it is not there."""
        index = self.find(module)
        if index is None:
            index = self._database.add_workload(as_json(module))
            self.modules.append(module)
            self._note(index)
        return index

    def schedule(self, record: Record) -> Any:
        """A record's schedule, on its function.

        Raises:
            One of REFUSALS: The schedule does not fit.
        """
        from tvm.s_tir import Schedule, Trace

        schedule = Schedule(self.modules[record.workload])
        Trace.apply_json_to_schedule(record.trace, schedule)
        return schedule

    def tuned(self, function: Any) -> Any | None:
        """A function with the best schedule that is known; None where search has found no better one than the rule's."""
        index = self.find(normalized(function))
        best = [] if index is None else self._database.best(index)
        if not best or not best[0].searched:
            return None
        try:
            return renamed(self.schedule(best[0]).mod["main"], function)
        except REFUSALS:
            # Blocks were named otherwise when it was tuned: then the rule's schedule does.
            return None

    def _note(self, index: int) -> None:
        self._by_hash.setdefault(hash_of(self.modules[index]), []).append(index)


def hash_of(module: Any) -> int:
    """Equal for equal modules."""
    import tvm_ffi

    return int(tvm_ffi.structural_hash(module))
