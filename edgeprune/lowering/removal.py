"""A runtime's graph without some residual branches: what it would be if the model had never had them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from edgeprune.backends._base import Operator, OperatorGraph
from edgeprune.errors import UnsupportedKernelError
from edgeprune.graph.branches import ResidualBranch


def without_branches(
    graph: OperatorGraph, removed: Collection[ResidualBranch], idle: Collection[str] = ()
) -> OperatorGraph:
    """Take out branches: whoever read a sum reads its other addend, and what nobody reads any more is gone.

    Args:
        graph: Of the dense model, before layouts are chosen.
        removed: The branches.
        idle: Program nodes that do nothing then (`edgeprune.graph.branches.idle`).

    Raises:
        UnsupportedKernelError: The runtime has fused a sum, or what is idle, with something else, or it is an output.
    """
    makers: dict[str, Operator] = {}
    for operator in graph.operators:
        for name in operator.outputs[:1]:
            makers.setdefault(graph.sources.get(name, name), operator)
    instead: dict[str, str] = {}
    for branch in removed:
        operator = _maker(makers, branch.addition, branch.name)
        others = [name for name in operator.inputs if graph.sources.get(name, name) not in branch.nodes]
        if len(operator.inputs) != 2 or len(others) != 1:
            raise _fused(operator, branch.name)
        instead[operator.outputs[0]] = others[0]
    for node in idle:
        operator = _maker(makers, node, node)
        if len(operator.inputs) != 1:
            raise _fused(operator, node)
        instead[operator.outputs[0]] = operator.inputs[0]

    def read(name: str) -> str:
        while name in instead:
            name = instead[name]
        return name

    if any(name in instead for name in graph.outputs):
        raise UnsupportedKernelError(
            "a sum whose branch is removed must not be an output of the model, found one that is."
        )
    needed = set(graph.outputs)
    left: list[Operator] = []
    for operator in reversed(graph.operators):
        if needed.isdisjoint(operator.outputs) or operator.outputs[0] in instead:
            continue
        inputs = tuple(read(name) for name in operator.inputs)
        needed.update(inputs)
        left.append(operator if inputs == operator.inputs else replace(operator, inputs=inputs))
    return replace(graph, operators=tuple(reversed(left)))


def _maker(makers: dict[str, Operator], node: str, what: str) -> Operator:
    if node not in makers:
        raise UnsupportedKernelError(
            f"the sum of a removed branch must be an operation of its own in the runtime, that of {what!r} is fused."
        )
    return makers[node]


def _fused(operator: Operator, what: str) -> UnsupportedKernelError:
    return UnsupportedKernelError(
        f"the sum of a removed branch must be an operation of its own in the runtime, found {operator.op} "
        f"{operator.name!r} for {what!r}."
    )
