"""Splits and slices: the settings that say which pieces of a tensor are taken, at any sizes.

A ``Split`` into equal pieces can be written with their number or with their sizes, and does the same: it is told by the number
here, any other by its sizes. So what is run for `chunk` and for a `split` that leaves equal pieces has equal text.

Source: ONNX, docs/Operators.md, Split (``num_outputs``, since opset 18) and Slice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from edgeprune.backends._base import Operator, OperatorGraph
from edgeprune.spec import AttributeValue, Kernel

Shape = tuple[int, ...]

_COUNT, _SIZES = "num_outputs", "operand1"


def split_settings(attributes: Mapping[str, AttributeValue], sizes: Sequence[int]) -> dict[str, AttributeValue]:
    """The attributes of a ``Split`` into pieces of these sizes, in this module's one form."""
    plain = {name: value for name, value in attributes.items() if name not in (_COUNT, _SIZES)}
    return {**plain, **({_COUNT: len(sizes)} if len(set(sizes)) == 1 else {_SIZES: tuple(sizes)})}


def told_split(attributes: Mapping[str, AttributeValue]) -> dict[str, AttributeValue]:
    """The attributes of a ``Split`` as a file has them, in this module's one form."""
    sizes = attributes.get(_SIZES)
    return split_settings(attributes, sizes) if isinstance(sizes, tuple) and sizes else dict(attributes)  # type: ignore[arg-type]


def written_split(kernel: Kernel) -> dict[str, AttributeValue]:
    """The attributes of a ``Split`` as they can be written in every opset: with the sizes of the pieces."""
    axis = int(kernel.attribute("axis", 0))  # type: ignore[arg-type]
    plain = {name: value for name, value in kernel.attributes if name != _COUNT}
    return {**plain, _SIZES: tuple(shape[axis] for shape in output_shapes(kernel))}


def output_shapes(kernel: Kernel) -> list[Shape]:
    """Shapes of all outputs; only a Split has several: of the sizes that it is told, else equal ones, the last maybe smaller."""
    if kernel.op != "Split" or not kernel.output:
        return [kernel.output]
    axis = int(kernel.attribute("axis", 0)) % len(kernel.output)  # type: ignore[arg-type]
    sizes = kernel.attribute(_SIZES)
    if not isinstance(sizes, tuple):
        parts = int(kernel.attribute(_COUNT, 1))  # type: ignore[arg-type]
        first, whole = kernel.output[axis], kernel.inputs[0][axis]
        sizes = (*[first] * (parts - 1), whole - first * (parts - 1))
    return [(*kernel.output[:axis], int(size), *kernel.output[axis + 1 :]) for size in sizes]


def moved_slice(operator: Operator, graph: OperatorGraph, shapes: Mapping[str, Shape]) -> dict[str, AttributeValue]:
    """Begin and end of a slice of one axis, step by step, at other sizes; empty where they stay or more than that is sliced.

    It begins behind the slices of the same tensor in front of it, where those reach back to its beginning. Otherwise what
    begins within the axis ends with it: how long a slice takes does not depend on where it begins.

    Args:
        operator: A ``Slice`` of `graph`.
        graph: The dense graph.
        shapes: Tensor name to shape of the candidate.
    """
    found = _range(operator, graph)
    if found is None:
        return {}
    axis, start, end = found
    whole, size = shapes[operator.inputs[0]][axis], shapes[operator.outputs[0]][axis]
    if whole == graph.shapes[operator.inputs[0]][axis]:
        return {}
    begin = _begin(operator, graph, shapes)
    if begin is None:
        if len(range(whole)[start:end]) == size:
            return {}
        begin = 0 if start == 0 else whole - size
    # An end at or behind that of the axis is one of any axis that is shorter, and stays as it was written.
    open_end = end >= graph.shapes[operator.inputs[0]][axis]
    return {"operand1": (begin,), "operand2": (end if open_end else begin + size,)}


def _begin(operator: Operator, graph: OperatorGraph, shapes: Mapping[str, Shape]) -> int | None:
    """The sizes of the slices in front of one, together; None where they leave gaps."""
    own = _range(operator, graph)
    if own is None or operator.inputs[0] in graph.notes:
        return None
    before: dict[int, tuple[int, int]] = {}
    for other in graph.operators:
        if other.op == "Slice" and other.inputs == operator.inputs:
            piece = _range(other, graph)
            if piece is not None and piece[0] == own[0] and piece[1] < piece[2]:
                before[piece[2]] = (piece[1], shapes[other.outputs[0]][own[0]])
    place, found = own[1], 0
    while place:
        if place not in before:
            return None
        place, size = before[place]
        found += size
    return found


def _range(operator: Operator, graph: OperatorGraph) -> tuple[int, int, int] | None:
    """Axis, begin and end of a dense slice of one axis, counted from its front; None where it is no such slice."""
    attributes = dict(operator.attributes)
    start, end, axes, step = (attributes.get(f"operand{place}") for place in range(1, 5))
    if not (isinstance(start, tuple) and isinstance(end, tuple) and isinstance(axes, tuple)) or len(axes) != 1:
        return None
    shape = graph.shapes[operator.inputs[0]]
    axis = int(axes[0]) % len(shape)
    if step not in (None, (1,)):
        return None
    begin, stop = (int(place) + shape[axis] if int(place) < 0 else int(place) for place in (start[0], end[0]))
    return axis, begin, stop
