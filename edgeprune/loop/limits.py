"""Budgets besides the latency: from what was asked for to limits of the allocation, and what a plan takes of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from edgeprune.allocation.energy import Energy
from edgeprune.allocation.memory import Memory
from edgeprune.allocation.resources import MultiplyAccumulates, Parameters
from edgeprune.allocation.terms import AdditiveCost, Limit
from edgeprune.errors import ConfigError
from edgeprune.loop.result import Spent

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edgeprune.budget import Budget
    from edgeprune.latency.predictor import Predictor
    from edgeprune.lowering.kernel_graph import KernelGraph


def limits_of(budget: Budget, kernel_graph: KernelGraph, predictor: Predictor | None = None) -> tuple[Limit, ...]:
    """The limits that a budget sets besides the latency, shares resolved.

    Args:
        budget: What was asked for.
        kernel_graph: Of the model.
        predictor: Of the board; only a budget of energy needs it.

    Raises:
        ConfigError: Memory is bounded, and the engines are not in fp32.
        TableMismatchError: Energy is bounded, and the predictor's table holds none.
        UnsupportedKernelError: Multiply-accumulates or memory are bounded, and some cannot be counted at other widths.
    """
    return tuple(_limits(budget, kernel_graph, predictor))


def spent(limits: Sequence[Limit], widths: Mapping[str, int]) -> tuple[Spent, ...]:
    """What some widths take of each limit."""
    return tuple(
        Spent(limit.name, limit.cost.value(widths), limit.at_most, limit.cost.value({}), limit.unit) for limit in limits
    )


def _limits(budget: Budget, kernel_graph: KernelGraph, predictor: Predictor | None) -> Iterator[Limit]:
    cost: AdditiveCost
    if budget.parameters is not None or budget.parameters_ratio is not None:
        cost = Parameters(kernel_graph.graph)
        at_most = budget.parameters or (budget.parameters_ratio or 1.0) * cost.value({})
        yield Limit("parameters", cost, at_most, option="--params {}")
    if budget.macs is not None or budget.macs_ratio is not None:
        cost = MultiplyAccumulates(kernel_graph)
        at_most = budget.macs or (budget.macs_ratio or 1.0) * cost.value({})
        yield Limit("multiply-accumulates", cost, at_most, option="--macs {}")
    if budget.memory_bytes is not None or budget.memory_ratio is not None:
        if kernel_graph.backend.precision != "fp32":
            raise ConfigError(
                f"a budget of memory is counted for fp32 engines, found {kernel_graph.backend.precision}.",
                hint="--params, of which an int8 engine holds a byte each",
            )
        held = Memory(kernel_graph)
        at_most = budget.memory_bytes or (budget.memory_ratio or 1.0) * held.value({})
        yield Limit("memory", held, at_most, "bytes", "--memory {}B")
    if budget.energy_mj is not None or budget.energy_ratio is not None:
        if predictor is None:
            raise ConfigError("a budget of energy needs a predictor, found none.", hint="edgeprune fit")
        energy = Energy(kernel_graph, predictor)
        at_most = budget.energy_mj or (budget.energy_ratio or 1.0) * energy.value({})
        yield Limit("energy", energy, at_most, "mJ", "--energy {}mJ")
