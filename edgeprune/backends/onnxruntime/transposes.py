"""Which transposes in front of a matrix product run by themselves: that depends on the widths.

ONNX Runtime moves a ``Transpose`` behind the ``Reshape`` that splits one of its axes again (batch and heads of an attention).
Each axis takes as many of the new ones as its size needs, so new axes of length one that are left over fall to the axis that
follows. A matrix product then takes the moved transpose in, if all it does is to swap the last two axes, to bring the first one
in front of the last, or both. With one head left the axis of the heads falls to the next axis, and the transpose stays a kernel.

Source: the behavior of ONNX Runtime 1.31.1 (transpose optimizer and MatMul-Transpose fusion), compared with it on random widths
(tests/unit/lowering/test_tokens.py, benchmarks/lowering.py).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from edgeprune.backends._base import Operator, OperatorGraph

if TYPE_CHECKING:
    import onnx

Shape = tuple[int, ...]

FUSED = "FusedMatMul"
_SCALES = frozenset({"Mul", "Div"})
_SIDES = (("transA", "transBatchA"), ("trans_b", "transBatchB"))


@dataclass(frozen=True)
class MovedTranspose:
    """A transpose of fewer axes than the product reads, as the exported graph has it.

    Attributes:
        order: Axes of what is transposed, in the order of the result.
        split: For each axis of the result of how many axes of the product's operand it is the product, in the dense model.
    """

    order: Shape
    split: Shape


def split(sizes: Sequence[int], target: Shape) -> Shape | None:
    """How many axes of `target` each of `sizes` takes, in order; what is left over goes to the last one.

    Returns:
        None where the axes of `target` do not split those sizes.
    """
    found: list[int] = []
    at = 0
    for size in sizes:
        begin, product = at, 1
        while at < len(target) and (product != size or at == begin):
            product *= target[at]
            at += 1
        if product != size or at == begin:
            return None
        found.append(at - begin)
    if math.prod(target[at:]) != 1 or not found:
        return None
    return (*found[:-1], found[-1] + len(target) - at)


def moved(order: Shape, sizes: Sequence[int], target: Shape) -> tuple[Shape, Shape] | None:
    """Where a transpose ends up behind the reshape that follows it.

    Args:
        order: As in `MovedTranspose.order`.
        sizes: Lengths of the axes of the transpose's result.
        target: Shape after the reshape.

    Returns:
        The shape in front of the moved transpose, and its permutation; None where it cannot be moved.
    """
    counts = split(sizes, target)
    if counts is None:
        return None
    starts = [0, *itertools.accumulate(counts)]
    # The axes of the operand in the order that they have in front of the transpose.
    axes = [axis for source in range(len(order)) for axis in _run(order.index(source), starts)]
    return tuple(target[axis] for axis in axes), tuple(axes.index(axis) for axis in range(len(axes)))


def _run(place: int, starts: Sequence[int]) -> range:
    return range(starts[place], starts[place + 1])


def taken_in(permutation: Shape) -> tuple[int, int] | None:
    """How a product takes a transpose in, as its flags of one operand (matrix, batch); None where it does not."""
    rank = len(permutation)
    *lead, rows, columns = permutation
    if lead == list(range(rank - 2)):
        return (int((rows, columns) == (rank - 1, rank - 2)), 0)
    if rank > 2 and lead == list(range(1, rank - 1)) and {rows, columns} == {0, rank - 1}:
        return (int(columns == 0), 1)
    return None


def permutation(transposes: int, batch: int, rank: int) -> Shape:
    """The permutation that flags of a product stand for; the opposite of `taken_in`."""
    lead, first = (list(range(1, rank - 1)), 0) if batch else (list(range(rank - 2)), rank - 2)
    return (*lead, rank - 1, first) if transposes else (*lead, first, rank - 1)


def found(
    operators: Sequence[Operator], original: onnx.GraphProto, shapes: Mapping[str, Shape]
) -> dict[str, MovedTranspose]:
    """The transposes that ONNX Runtime has moved and fused in a dense model.

    Args:
        operators: Of the optimized graph.
        original: The graph before optimization, with the shapes of its tensors.
        shapes: Those of the operators' tensors.

    Returns:
        Name of the product's operand to what it is transposed from.
    """
    before = _Original(original)
    notes: dict[str, MovedTranspose] = {}
    makers = {name: operator for operator in operators for name in operator.outputs}
    for operator in operators:
        if operator.op != FUSED or len(operator.inputs) != 2:
            continue
        flags = dict(operator.attributes)
        for place, name in enumerate(operator.inputs):
            transposes, batch = (int(flags.get(flag, 0)) for flag in _SIDES[place])  # type: ignore[arg-type]
            told = before.turned(operator.outputs[0], place)
            if told is None or not (transposes or batch) or makers.get(name, operator).op != "Reshape":
                continue
            order, sizes, target = told
            counts = split(sizes, target)
            there = (shapes[name], permutation(transposes, batch, len(shapes[name])))
            if counts is not None and moved(order, sizes, target) == there:
                notes[name] = MovedTranspose(order, counts)
    return notes


class _Original:
    def __init__(self, graph: onnx.GraphProto) -> None:
        self._makers = {name: node for node in graph.node for name in node.output}
        self._constants = {tensor.name for tensor in graph.initializer}
        self._shapes = {
            value.name: tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
            for value in [*graph.input, *graph.value_info, *graph.output]
        }

    def turned(self, product: str, place: int) -> tuple[Shape, Shape, Shape] | None:
        """Order and sizes of the transposes in front of the reshape that makes a product's operand, and its shape."""
        multiplied = self._makers.get(self._unscaled(product))
        if multiplied is None or multiplied.op_type != "MatMul":
            return None
        reshape = self._makers.get(self._unscaled(multiplied.input[place]))
        if reshape is None or reshape.op_type != "Reshape":
            return None
        name, order = reshape.input[0], None
        while (node := self._makers.get(name)) is not None and node.op_type == "Transpose":
            axes = next((tuple(entry.ints) for entry in node.attribute if entry.name == "perm"), ())
            order = axes if order is None else tuple(axes[axis] for axis in order)
            name = node.input[0]
        sizes, target = self._shapes.get(reshape.input[0]), self._shapes.get(reshape.output[0])
        if not order or sizes is None or target is None or len(order) != len(sizes):
            return None
        return order, sizes, target

    def _unscaled(self, name: str) -> str:
        """The tensor of which this one is a multiple."""
        while (node := self._makers.get(name)) is not None and node.op_type in _SCALES:
            data = [entry for entry in node.input if entry not in self._constants]
            if len(data) != 1:
                break
            name = data[0]
        return name


def settled(graph: OperatorGraph, shapes: Mapping[str, Shape]) -> tuple[OperatorGraph, Mapping[str, Shape]]:
    """The graph with the transposes as they are at other widths.

    Args:
        graph: Of the dense model, with what `found` says in its notes.
        shapes: Tensor name to shape of the candidate.

    Returns:
        Both unchanged where every transpose stays where it was.
    """
    new: dict[str, Shape] = {}
    sources: dict[str, str] = {}
    operators: list[Operator] = []
    for operator in graph.operators:
        if operator.op == FUSED and any(name in graph.notes for name in operator.inputs):
            operator, extra = _settled(operator, graph, shapes, new)
            operators += extra
            result = operator.outputs[0]
            sources |= {entry.outputs[0]: graph.sources.get(result, result) for entry in extra}
        operators.append(operator)
    if not new:
        return graph, shapes
    return replace(graph, operators=tuple(operators), sources={**graph.sources, **sources}), {**shapes, **new}


def _settled(
    operator: Operator, graph: OperatorGraph, shapes: Mapping[str, Shape], new: dict[str, Shape]
) -> tuple[Operator, list[Operator]]:
    flags = dict(operator.attributes)
    inputs = list(operator.inputs)
    extra: list[Operator] = []
    for place, name in enumerate(operator.inputs):
        note = graph.notes.get(name)
        if not isinstance(note, MovedTranspose):
            continue
        now = shapes[name]
        transposes, batch = (int(flags.get(flag, 0)) for flag in _SIDES[place])  # type: ignore[arg-type]
        turn = permutation(transposes, batch, len(now))
        target = tuple(now[axis] for axis in turn)
        starts = [0, *itertools.accumulate(note.split)]
        sizes = [math.prod(target[starts[at] : starts[at + 1]]) for at in range(len(note.split))]
        place_now = moved(note.order, sizes, target)
        if place_now is None or place_now == (now, turn):
            continue
        new[name], turn = place_now
        took = taken_in(turn)
        if took is None:
            turned = f"{name}_turned{len(extra)}_{operator.name}"
            extra.append(Operator(turned, "Transpose", (name,), (turned,), (("perm", turn),)))
            inputs[place], new[turned] = turned, target
        flags |= dict(zip(_SIDES[place], took or (0, 0), strict=True))
    if not any(flags.values()):
        return replace(operator, op="MatMul", inputs=tuple(inputs), attributes=()), extra
    attributes = tuple(sorted(item for item in flags.items() if item != ("transA", 0)))
    return replace(operator, inputs=tuple(inputs), attributes=attributes), extra
