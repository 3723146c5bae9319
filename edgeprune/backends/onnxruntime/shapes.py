"""Shapes of an operator's tensors from those of its other tensors, at any widths.

Most tensors of ONNX Runtime's graph are values of the traced program, whose shapes follow from the widths. What the exporter
and the runtime put in between (the scores of an attention, a product before its bias, a folded constant) are not; their
shapes follow from the operator that makes or reads them.

Source: the operator definitions of ONNX (onnx.ai/onnx/operators), opset 18, and ONNX Runtime's ContribOperators.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from edgeprune.backends._base import Operator
from edgeprune.backends.onnxruntime.operators import FAMILY, VIEWS, base
from edgeprune.spec import AttributeValue

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]

_SAME = frozenset(
    {"Softmax", "LogSoftmax", "LayerNormalization", "SimplifiedLayerNormalization", "SkipLayerNormalization"}
)
_PER_CHANNEL = frozenset({"InstanceNormalization", "BatchNormalization"})
_BROADCAST = frozenset(op for op, family in FAMILY.items() if family == "elementwise") - _PER_CHANNEL
_MATMULS = frozenset({"MatMul", "FusedMatMul"})


def inferred(operator: Operator, dense: Shapes, shapes: Shapes) -> dict[str, Shape] | None:
    """Shapes of the operator's inputs, constants and outputs that are not known.

    Args:
        operator: The operator.
        dense: Name to shape of every tensor at dense widths.
        shapes: The same at other widths, as far as it is known.

    Returns:
        None where they do not follow from what is known.
    """
    op = base(operator.op)
    if op in _BROADCAST or op in _SAME:
        return _aligned(operator, dense, shapes)
    attributes = dict(operator.attributes)
    if op in _MATMULS and len(operator.inputs) == 2 and operator.outputs[0] in shapes:
        return _factor(operator, dense, shapes, attributes)
    if op == "Split":
        return _parts(operator, dense, shapes, attributes)
    if len(operator.outputs) != 1 or not operator.inputs:
        return None
    if op in VIEWS and operator.outputs[0] in shapes:
        before, after = operator.outputs[0], operator.inputs[0]
        viewed = _viewed(dense[before], shapes[before], dense[after])
        return None if viewed is None else {after: viewed}
    if operator.inputs[0] not in shapes:
        return None
    first = shapes[operator.inputs[0]]
    if op in _PER_CHANNEL:
        found = dict.fromkeys(operator.inputs[1:], (first[1],)) | {operator.outputs[0]: first}
        return {name: shape for name, shape in found.items() if name not in shapes}
    if any(name not in shapes for name in operator.inputs):
        return None
    shape: Shape | None = None
    if op == "Transpose":
        order = attributes.get("perm", tuple(reversed(range(len(first)))))
        shape = tuple(first[int(axis)] for axis in order)  # type: ignore[union-attr]
    elif op in _MATMULS and len(operator.inputs) == 2:
        shape = _product(first, shapes[operator.inputs[1]], attributes)
    elif op == "Concat":
        shape = _joined([shapes[name] for name in operator.inputs], int(attributes["axis"]))  # type: ignore[arg-type]
    elif FAMILY.get(op) == "reduce":
        shape = _reduced(first, attributes)
    elif op in ("Gather", "Slice"):
        shape = _taken(operator, dense, first, attributes)
    elif op in VIEWS:
        shape = _viewed(dense[operator.inputs[0]], first, dense[operator.outputs[0]])
    return None if shape is None else {operator.outputs[0]: shape}


def _aligned(operator: Operator, dense: Shapes, shapes: Shapes) -> dict[str, Shape] | None:
    """Element by element: axes counted from the last one; what is as long as the result stays so, and so do constants."""
    output, *more = operator.outputs
    target = dense[output]
    if more or any(len(dense[name]) > len(target) for name in operator.inputs):
        return None
    if output in shapes:
        sizes = list(shapes[output])
    else:
        sizes = [0] * len(target)
        for name in operator.inputs:
            for axis in range(1, len(dense[name]) + 1):
                # Who is as long as the result at dense widths is so at all widths.
                if name in shapes and dense[name][-axis] == target[-axis]:
                    sizes[-axis] = shapes[name][-axis]
        if 0 in sizes:
            return None
    found = {output: tuple(sizes)}
    for name in operator.inputs:
        lengths = dense[name]
        found[name] = tuple(
            sizes[-axis] if lengths[-axis] == target[-axis] else lengths[-axis] for axis in range(len(lengths), 0, -1)
        )
    return {name: shape for name, shape in found.items() if name not in shapes}


def _product(one: Shape, other: Shape, attributes: Mapping[str, AttributeValue]) -> Shape | None:
    if len(one) < 2 or len(other) < 2:
        return None
    # FusedMatMul can also take its first axis as the one before the last.
    one = (*one[1:-1], one[0], one[-1]) if attributes.get("transBatchA") else one
    other = (*other[1:-1], other[0], other[-1]) if attributes.get("transBatchB") else other
    rows = one[-1] if attributes.get("transA") else one[-2]
    columns = other[-2] if attributes.get("trans_b") else other[-1]
    rank = max(len(one), len(other)) - 2
    padded = [(1,) * (rank + 2 - len(shape)) + shape[:-2] for shape in (one, other)]
    return (*(max(pair) for pair in zip(*padded, strict=True)), rows, columns)


def _factor(
    operator: Operator, dense: Shapes, shapes: Shapes, attributes: Mapping[str, AttributeValue]
) -> dict[str, Shape] | None:
    """The operand of a matrix product that is a constant, from the other one and the result."""
    one, other = operator.inputs
    target = shapes[operator.outputs[0]]
    unknown = [name for name in (one, other) if name not in shapes]
    if attributes.get("transBatchA") or attributes.get("transBatchB"):
        return None
    if len(unknown) != 1 or min(len(dense[one]), len(dense[other]), len(target)) < 2:
        return None
    if unknown == [one]:
        inner, outer = shapes[other][-1 if attributes.get("trans_b") else -2], target[-2]
        matrix = (inner, outer) if attributes.get("transA") else (outer, inner)
    else:
        inner, outer = shapes[one][-2 if attributes.get("transA") else -1], target[-1]
        matrix = (outer, inner) if attributes.get("trans_b") else (inner, outer)
    lead = dense[unknown[0]][:-2]
    facing = target[len(target) - 2 - len(lead) : -2]
    return {unknown[0]: (*(new if old > 1 else 1 for old, new in zip(lead, facing, strict=True)), *matrix)}


def _joined(shapes: Sequence[Shape], axis: int) -> Shape:
    return _with(shapes[0], axis, sum(shape[axis] for shape in shapes))


def _parts(
    operator: Operator, dense: Shapes, shapes: Shapes, attributes: Mapping[str, AttributeValue]
) -> dict[str, Shape] | None:
    """What a Split cuts up, from all of its outputs, and the outputs that are not known.

    The axis is as long as all of them together. Where none is known (the gates of a recurrent layer, which stay alike) they
    are as they were if the axis is as long as it was, else equal ones of an equal split.
    """
    source, axis = operator.inputs[0], int(attributes.get("axis", 0))  # type: ignore[arg-type]
    unknown = [name for name in operator.outputs if name not in shapes]
    told = [shapes[name] for name in operator.outputs if name in shapes]
    if source not in shapes:
        return None if unknown else {source: _joined(told, axis)}
    now = shapes[source]
    if now[axis] == dense[source][axis]:
        sizes = [dense[name][axis] for name in unknown]
    elif len(unknown) == 1:
        sizes = [now[axis] - sum(shape[axis] for shape in told)]
    elif not told and len({dense[name][axis] for name in unknown}) == 1 and now[axis] % len(unknown) == 0:
        sizes = [now[axis] // len(unknown)] * len(unknown)
    else:
        return None
    return {name: _with(now, axis, size) for name, size in zip(unknown, sizes, strict=True)}


def _taken(operator: Operator, dense: Shapes, now: Shape, attributes: Mapping[str, AttributeValue]) -> Shape | None:
    """What a Gather or a Slice with constant positions leaves, where the axes that it reads are as long as they were."""
    before, after = dense[operator.inputs[0]], dense[operator.outputs[0]]
    if operator.op == "Gather":
        axes = {int(attributes.get("axis", 0)) % len(now)}  # type: ignore[arg-type]
        index = attributes.get("operand1")
        if index is None or len(operator.inputs) > 1:
            return None
        gone = not isinstance(index, tuple)
    else:
        listed = attributes.get("operand3", tuple(range(len(now))))
        axes = {int(axis) % len(now) for axis in (listed if isinstance(listed, tuple) else (listed,))}
        gone = False
    if any(now[axis] != before[axis] for axis in axes):
        return None
    lengths = [after[axis] if axis in axes and not gone else size for axis, size in enumerate(now)]
    return tuple(size for axis, size in enumerate(lengths) if not (gone and axis in axes))


def _with(shape: Shape, axis: int, size: int) -> Shape:
    axis %= len(shape)
    return (*shape[:axis], size, *shape[axis + 1 :])


def _reduced(shape: Shape, attributes: Mapping[str, AttributeValue]) -> Shape:
    axes = attributes.get("operand1", attributes.get("axes", tuple(range(len(shape)))))
    gone = {int(axis) % len(shape) for axis in (axes if isinstance(axes, tuple) else (axes,))}
    if attributes.get("keepdims", 1):
        return tuple(1 if axis in gone else size for axis, size in enumerate(shape))
    return tuple(size for axis, size in enumerate(shape) if axis not in gone)


def _viewed(before: Shape, now: Shape, after: Shape) -> Shape | None:
    """A view at other sizes: runs of axes that hold the same elements, of which at most one may be split anew."""
    if math.prod(before) != math.prod(after) or 0 in before:
        return None
    found: list[int] = []
    i = j = 0
    while i < len(before) and j < len(after):
        start, stop = i, j
        left, right = before[i], after[j]
        i, j = i + 1, j + 1
        while left != right:
            if left < right:
                left *= before[i]
                i += 1
            else:
                right *= after[j]
                j += 1
        run = after[stop:j]
        if now[start:i] == before[start:i]:
            found += run
        elif sum(size > 1 for size in run) == 1:
            found += [math.prod(now[start:i]) if size > 1 else 1 for size in run]
        else:
            return None
    return (*found, *after[j:])
