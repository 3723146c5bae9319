"""Memory of a model on a board at any widths: its weights, and the activations that are live at the same time.

The memory at one operator is that of all weights, of what it reads, of what it writes, and of what a later operator still reads;
a model's memory is that of the operator where it is largest. So a bound of it is one bound per operator, each of them a sum of
terms, and the operators that can never be the largest are left out.

Source: the live set of a schedule, as in E. Liberis, N. Lane, "Neural networks on microcontrollers: saving memory at inference
via operator reordering", 2019; ONNX Runtime frees a tensor after its last reader in the same way
(onnxruntime/core/framework/allocation_planner.cc).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from edgeprune.allocation._base import Widths
from edgeprune.allocation.resources import Parameters
from edgeprune.allocation.terms import CostTerm, Floats
from edgeprune.errors import UnsupportedKernelError
from edgeprune.graph.forms import SizeForm
from edgeprune.spec import Precision

if TYPE_CHECKING:
    from edgeprune.lowering.kernel_graph import KernelGraph

BYTES: Mapping[str, int] = {"fp32": 4, "fp16": 2, "int8": 1}
"""Bytes of one number, by precision."""

_ITEM_BYTES = {"bool": 1, "int64": 8, "float64": 8, "int32": 4, "float16": 2, "int8": 1, "uint8": 1}


@dataclass(frozen=True)
class Activation:
    """A tensor while a model runs.

    Attributes:
        name: In the runtime's graph.
        sizes: Sizes of its axes that change with widths, as forms; at most two.
        constant_bytes: Bytes of one entry of those axes: of an item times all other sizes.
        gate: Width that it goes with although it has no axis of it: that of the residual branch that it lies in.
    """

    name: str
    sizes: tuple[SizeForm, ...]
    constant_bytes: float
    gate: SizeForm | None = None

    def at(self, widths: Widths) -> float:
        """Bytes at some widths of all groups."""
        if self.gate is not None and not self.gate.at(widths):
            return 0.0
        return self.constant_bytes * math.prod(form.at(widths) for form in self.sizes)

    @property
    def term(self) -> CostTerm:
        """The bytes as a term."""
        constant = self.constant_bytes

        def ungated(*sizes: npt.NDArray[np.int64]) -> Floats:
            total = np.asarray(constant, dtype=np.float64)
            for size in sizes:
                total = total * size
            return total

        def gated(width: npt.NDArray[np.int64], *sizes: npt.NDArray[np.int64]) -> Floats:
            return np.where(np.asarray(width) > 0, ungated(*sizes), 0.0)

        return CostTerm(self.sizes, ungated) if self.gate is None else CostTerm((self.gate, *self.sizes), gated)


@dataclass(frozen=True)
class MemoryAt:
    """Memory while one operator runs.

    Attributes:
        operator: Its name in the runtime's graph.
        live: What is held: read, written, or read later.
        parameters: All weights.
        number_bytes: Bytes of one weight.
        sizes: Group name to its full size.
    """

    operator: str
    live: tuple[Activation, ...]
    parameters: Parameters
    number_bytes: int
    sizes: Mapping[str, int]

    def value(self, widths: Widths) -> float:
        """Bytes at these widths; groups left out are dense."""
        every = {**self.sizes, **widths}
        return self.number_bytes * self.parameters.value(every) + self.live_bytes(every)

    def live_bytes(self, widths: Widths) -> float:
        """Bytes of the activations at these widths of all groups."""
        return math.fsum(tensor.at(widths) for tensor in self.live)

    def terms(self) -> list[CostTerm]:
        """One per parameter and live tensor."""
        return [
            *(_times(term, self.number_bytes) for term in self.parameters.terms()),
            *(one.term for one in self.live),
        ]


class Memory:
    """Bytes of the weights, and of the activations that are live together, at the operator where they are most.

    Exactly: the parameters of the model times the bytes of a number, plus, over the operators of the runtime's graph in its own
    order, the largest sum of the bytes of every tensor that one reads, writes, or that a later one reads; inputs and outputs of
    the model count; tensors that are views of another do not, and neither do the outputs that the runtime writes over an input
    that nothing else reads (`Backend.in_place`). Not counted: the runtime itself, repacked copies of weights, scratch buffers
    inside operators, what an allocator's rounding adds, and the channels that blocked layouts add (docs/pruning.md says how near
    that is on ONNX Runtime).

    Args:
        kernel_graph: From `edgeprune.lower`.
        precision: Of weights and activations.

    Raises:
        UnsupportedKernelError: The size of a tensor is no sum of widths and no product of two.
    """

    def __init__(self, kernel_graph: KernelGraph, precision: Precision = "fp32") -> None:
        self.sizes = kernel_graph.graph.widths()
        self.number_bytes = BYTES[precision]
        self.parameters = Parameters(kernel_graph.graph)
        tensors = _activations(kernel_graph, self.number_bytes)
        self.every = tuple(
            MemoryAt(name, tuple(tensors[tensor] for tensor in live), self.parameters, self.number_bytes, self.sizes)
            for name, live in _live_sets(kernel_graph, tensors)
        )

    def value(self, widths: Widths) -> float:
        """Bytes at these widths; groups left out are dense."""
        every = {**self.sizes, **widths}
        return self.number_bytes * self.parameters.value(every) + self.peak(every).live_bytes(every)

    def peak(self, widths: Widths) -> MemoryAt:
        """The operator where most is live."""
        every = {**self.sizes, **widths}
        return max(self.every, key=lambda place: place.live_bytes(every))

    @cached_property
    def sums(self) -> tuple[MemoryAt, ...]:
        """The operators that can be the largest at some widths: the memory is the largest of these."""
        # From 1: constraints may allow fewer units than the usual least width.
        ranges = {name: (1, size) for name, size in self.sizes.items()}
        branches = {tensor.gate.groups[0] for place in self.every for tensor in place.live if tensor.gate is not None}
        ranges |= {name: (0, self.sizes[name]) for name in branches}
        kept: list[MemoryAt] = []
        # The largest first: it rules out most of the others.
        for place in sorted(self.every, key=lambda one: -one.live_bytes(self.sizes)):
            if not any(_never_less(other, place, ranges) for other in kept):
                kept.append(place)
        return tuple(kept)

    def held_by(self, widths: Widths) -> str:
        """What the memory at these widths consists of."""
        every = {**self.sizes, **widths}
        place = self.peak(every)
        weights = self.number_bytes * self.parameters.value(every)
        most = max(place.live, key=lambda tensor: tensor.at(every))
        return (
            f"weights hold {weights:,.0f} bytes of it, activations at {place.operator} {place.live_bytes(every):,.0f}, of which "
            f"{most.name} {most.at(every):,.0f}"
        )


def _times(term: CostTerm, factor: float) -> CostTerm:
    return CostTerm(term.forms, lambda *sizes: factor * term.at(*sizes))


def _never_less(first: MemoryAt, second: MemoryAt, ranges: Mapping[str, tuple[int, int]]) -> bool:
    """Whether the first holds at least as much as the second at all widths in some ranges; False where that is not clear."""
    own = {tensor.name for tensor in second.live} & {tensor.name for tensor in first.live}
    change: dict[tuple[str, ...], float] = {}
    for place, sign in ((first, 1.0), (second, -1.0)):
        for tensor in place.live:
            if tensor.name in own:
                continue
            if tensor.gate is not None and sign > 0:
                continue  # it may be absent
            for groups, coefficient in _expanded(tensor):
                change[groups] = change.get(groups, 0.0) + sign * coefficient
    least = 0.0
    for groups, coefficient in change.items():
        low, high = (math.prod(ranges[name][end] for name in groups) for end in (0, 1))
        least += coefficient * (low if coefficient > 0 else high)
    return least >= 0


def _expanded(tensor: Activation) -> Iterable[tuple[tuple[str, ...], float]]:
    """The bytes as a polynomial in widths: (groups that are multiplied, coefficient)."""
    found: dict[tuple[str, ...], float] = {(): tensor.constant_bytes}
    for form in tensor.sizes:
        parts: dict[tuple[str, ...], float] = {}
        for groups, value in found.items():
            for factors, coefficient in (((), form.constant), *form.terms):
                if coefficient:
                    key = tuple(sorted((*groups, *factors)))
                    parts[key] = parts.get(key, 0.0) + value * coefficient
        found = parts
    return found.items()


def _activations(kernel_graph: KernelGraph, number_bytes: int) -> dict[str, Activation]:
    operators = kernel_graph.operators
    forms = kernel_graph.tensor_forms
    inputs = {spec.name: spec for spec in operators.inputs}
    found = {}
    for name, shape in operators.shapes.items():
        dtype = inputs[name].dtype if name in inputs else operators.dtypes.get(name, "float32")
        axes: Sequence[SizeForm | None] = forms.get(name, tuple(SizeForm(size) for size in shape))
        known = tuple(form for form in axes if form is not None)
        changing = tuple(form for form in known if form.terms)
        if len(known) < len(axes) or len(changing) > 2:
            raise UnsupportedKernelError(
                f"memory needs every size of a tensor as a form in widths, at most two of them changing, found {name!r} "
                "with one that is none.",
                hint="a budget of parameters or latency",
            )
        item_bytes = number_bytes if dtype == "float32" else _ITEM_BYTES.get(dtype, 4)
        constant = float(item_bytes * math.prod(form.constant for form in known if not form.terms))
        gate = None if len(changing) > 1 else _gate(name, changing, kernel_graph)
        found[name] = Activation(name, changing, constant, gate)
    return found


def _gate(name: str, changing: tuple[SizeForm, ...], kernel_graph: KernelGraph) -> SizeForm | None:
    node = kernel_graph.operators.sources.get(name, name)
    for branch in kernel_graph.graph.branches:
        if node in branch.nodes and not any(branch.lead in form.groups for form in changing):
            return SizeForm(0, (((branch.lead,), 1),))
    return None


def _live_sets(kernel_graph: KernelGraph, tensors: Mapping[str, Activation]) -> list[tuple[str, tuple[str, ...]]]:
    """Per operator that computes something, the tensors that are held while it runs; others stand for those that they are in."""
    graph, backend = kernel_graph.operators, kernel_graph.backend
    views, in_place = backend.views(), backend.in_place()
    fed = {spec.name for spec in graph.inputs}
    root = {name: name for name in fed}
    # Who feeds a model and who reads its outputs hold them all the time that it runs.
    read_last = dict.fromkeys((*graph.outputs, *fed), len(graph.operators))
    for number, operator in enumerate(graph.operators):
        for name in operator.inputs:
            read_last[name] = max(read_last.get(name, -1), number)
    made: dict[str, int] = dict.fromkeys(fed, -1)
    freed = {name: read_last[name] for name in fed}
    for number, operator in enumerate(graph.operators):
        data = [root[name] for name in operator.inputs if name in root]
        for name in operator.outputs:
            held = None
            if operator.op in views and data:
                held = data[0]
            elif operator.op in in_place and name in tensors:
                own = replace(tensors[name], name="")
                held = next(
                    (one for one in data if freed[one] == number and replace(tensors[one], name="") == own), None
                )
            root[name] = name if held is None else held
            made.setdefault(root[name], number)
            freed[root[name]] = max(freed.get(root[name], -1), read_last.get(name, number), number)
    return [
        (
            operator.name,
            tuple(name for name, begin in made.items() if begin <= number <= freed[name] and name in tensors),
        )
        for number, operator in enumerate(graph.operators)
        if operator.op not in views
    ]
