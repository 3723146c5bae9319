"""Budgets besides the latency: from what was asked for to limits of the allocation, and what a plan takes of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from edgeprune.allocation.memory import Memory
from edgeprune.allocation.resources import MultiplyAccumulates, Parameters
from edgeprune.allocation.terms import AdditiveCost, Limit
from edgeprune.loop.result import Spent

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edgeprune.lowering.kernel_graph import KernelGraph
    from edgeprune.spec import Budget


def limits_of(budget: Budget, kernel_graph: KernelGraph) -> tuple[Limit, ...]:
    """The limits that a budget sets besides the latency, shares resolved.

    Raises:
        UnsupportedKernelError: Multiply-accumulates or memory are bounded, and some cannot be counted at other widths.
    """
    return tuple(_limits(budget, kernel_graph))


def spent(limits: Sequence[Limit], widths: Mapping[str, int]) -> tuple[Spent, ...]:
    """What some widths take of each limit."""
    return tuple(
        Spent(limit.name, limit.cost.value(widths), limit.at_most, limit.cost.value({}), limit.unit) for limit in limits
    )


def _limits(budget: Budget, kernel_graph: KernelGraph) -> Iterator[Limit]:
    cost: AdditiveCost
    if budget.parameters is not None or budget.parameters_ratio is not None:
        cost = Parameters(kernel_graph.graph)
        yield Limit("parameters", cost, budget.parameters or (budget.parameters_ratio or 1.0) * cost.value({}))
    if budget.macs is not None or budget.macs_ratio is not None:
        cost = MultiplyAccumulates(kernel_graph)
        yield Limit("multiply-accumulates", cost, budget.macs or (budget.macs_ratio or 1.0) * cost.value({}))
    if budget.memory_bytes is not None or budget.memory_ratio is not None:
        held = Memory(kernel_graph)
        at_most = budget.memory_bytes or (budget.memory_ratio or 1.0) * held.value({})
        yield Limit("memory", held, at_most, "bytes", "--memory {}B")
