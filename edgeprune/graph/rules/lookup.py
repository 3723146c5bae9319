"""Operations that read or write positions that are computed: all of the axis that is read stays, the others pass."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from edgeprune.graph.atoms import Ids
from edgeprune.graph.labels import Label, vector
from edgeprune.graph.rules._base import Call, Rule

if TYPE_CHECKING:
    from edgeprune.graph.propagation import Propagation

_READ = "it is read by computed positions"


def _pick(walk: Propagation, call: Call) -> Label | list[Label]:
    """``index_select``: all of the axis that is read stays."""
    label, shape = walk.of(call, "self"), call.shape()
    dim = call.axis("dim", len(label.shape))
    event = walk.event(call, _READ, label)
    return walk.keep_whole(label, (dim,), event).of_shape(shape)


def _index(walk: Propagation, call: Call) -> Label | list[Label]:
    """``x[i, :, j]`` with index tensors: axes that are read by an index stay, the others pass through."""
    label, shape = walk.of(call, "self"), call.shape()
    indices = call.arguments["indices"]
    read = [axis for axis, index in enumerate(indices) if index is not None]
    if any(_is_mask(indices[axis]) for axis in read):
        return walk.freeze(call, "it is indexed by a mask")
    label = walk.keep_whole(label, read, walk.event(call, _READ, label))
    rank = max(len(indices[axis].meta["val"].shape) for axis in read)
    # Index tensors side by side put their axes in the place of the first; else they come first.
    together = read == list(range(read[0], read[-1] + 1))
    left = label.without(*read)
    at = read[0] if together else 0
    for offset in range(rank):
        left = left.inserted(at + offset)
    return left.of_shape(shape)


def _index_put(walk: Propagation, call: Call) -> Label | list[Label]:
    """``x[mask] = value``: a mask of the shape of `x` tells element by element, one value is the same everywhere."""
    indices = call.arguments["indices"]
    label, value = walk.of(call, "self"), walk.of(call, "values")
    if len(indices) != 1 or not _is_mask(indices[0]) or math.prod(value.shape) != 1:
        return walk.freeze(call, "it is written at computed positions")
    mask = walk.label(indices[0])
    if len(mask.shape) != len(label.shape):
        return walk.freeze(call, "it is written at computed positions")
    return walk.together([label, mask], call.shape(), walk.event(call, _READ, label, mask))


def _is_mask(node: Any) -> bool:
    return str(node.meta["val"].dtype) in ("torch.bool", "torch.uint8")


def _embedding(walk: Propagation, call: Call) -> Label:
    """Rows of a table by computed positions."""
    table, shape = walk.of(call, "weight"), call.shape()
    event = walk.event(call, _READ, table)
    walk.atoms.pin(table.axes[0], event)
    ids = walk.made(call, "weight", 1)
    walk.produce(call, ids)
    return vector(ids, shape, len(shape) - 1)


def _gather(walk: Propagation, call: Call) -> Label:
    """Along the other axes each position of the index reads the same position of the tensor."""
    label, index, shape = walk.of(call, "self"), walk.of(call, "index"), call.shape()
    dim = call.axis("dim", len(shape))
    event = walk.event(call, _READ, label, index)
    label = walk.keep_whole(label, (dim,), event)
    axes = _side_by_side(walk, [label, index], dim, event)
    axes[dim] = index.axes[dim]
    return Label(tuple(axes), shape, label.event)


def _scatter(walk: Propagation, call: Call) -> Label:
    """Written at computed positions of one axis, the same position along the others."""
    label, shape = walk.of(call, "self"), call.shape()
    dim = call.axis("dim", len(shape))
    written = [walk.label(node) for node in list(call.tensor_nodes())[1:]]
    event = walk.event(call, _READ, label, *written)
    label = walk.keep_whole(label, (dim,), event)
    for other in written:
        walk.keep_whole(other, (dim,), event)
    axes = _side_by_side(walk, [label, *written], dim, event)
    return Label(tuple(axes), shape, label.event)


def _side_by_side(walk: Propagation, labels: list[Label], dim: int, event: int) -> list[Ids | None]:
    """All axes but one meet; where the sizes differ only a part is read, and all of it stays."""
    axes: list[Ids | None] = list(labels[0].axes)
    for axis in range(len(axes)):
        if axis == dim:
            continue
        same = len({label.shape[axis] for label in labels}) == 1
        for label in labels[1:]:
            axes[axis] = walk.meet(axes[axis], label.axes[axis] if same else None, event)
            if not same:
                walk.atoms.pin(label.axes[axis], event)
    return axes


_INDEX_PUT, _SCATTER = Rule(_index_put), Rule(_scatter)

TABLE = {
    "aten.embedding.default": Rule(_embedding),
    "aten.gather.default": Rule(_gather),
    "aten.index.Tensor": Rule(_index),
    "aten.index_put.default": _INDEX_PUT,
    "aten.index_put_.default": _INDEX_PUT,
    "aten.index_select.default": Rule(_pick),
    "aten.scatter.src": _SCATTER,
    "aten.scatter.value": _SCATTER,
    "aten.scatter_.src": _SCATTER,
    "aten.scatter_.value": _SCATTER,
    "aten.scatter_add.default": _SCATTER,
}
