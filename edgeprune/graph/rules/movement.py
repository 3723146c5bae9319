"""Operations that pick, join or pad positions along an axis: the same happens to the label."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgeprune.graph.labels import Label, compact, kept
from edgeprune.graph.rules._base import Call, Edited, Kept, Rule

if TYPE_CHECKING:
    from edgeprune.graph.propagation import Propagation

_JOINED = "it is joined with values that keep their size"


def _pieces(walk: Propagation, call: Call) -> list[Label]:
    """split, split_with_sizes, chunk: consecutive pieces of one axis."""
    label = walk.of(call, "self")
    dim = call.axis("dim", len(label.shape))
    pieces, start = [], 0
    for shape in call.shapes():
        pieces.append(_slice(label, dim, start, start + shape[dim], shape))
        start += shape[dim]
    return pieces


def _edit_pieces(call: Call, kept: Kept) -> Edited | None:
    source = call.node_of("self")
    assert source is not None
    dim = call.axis("dim", len(source.meta["val"].shape))
    mask = kept.mask(source, dim)
    if mask.all():
        return None
    sizes, start = [], 0
    for shape in call.shapes():
        sizes.append(int(mask[start : start + shape[dim]].sum()))
        start += shape[dim]
    left = int(mask.sum())
    if call.op == "aten.chunk.default":
        each = -(-left // int(call["chunks"]))
        if sizes == [min(each, left - at) for at in range(0, left, each)]:
            return None
    elif call.op == "aten.split_with_sizes.default":
        return Edited({"split_sizes": sizes}) if sizes != list(call["split_sizes"]) else None
    return Edited({"self": source, "split_sizes": sizes, "dim": dim}, op="aten.split_with_sizes.default")


def _slice_tensor(walk: Propagation, call: Call) -> Label | list[Label]:
    label, shape = walk.of(call, "self"), call.shape()
    dim = call.axis("dim", len(label.shape))
    if label.ids.shape[dim] == 1:
        return Label(label.ids, shape, label.event)
    if int(call["step"]) != 1:
        return walk.freeze(call, "it is sliced with a step along its channels")
    start, _ = _bounds(call, label.shape[dim])
    return _slice(label, dim, start, start + shape[dim], shape)


def _edit_slice(call: Call, kept: Kept) -> Edited | None:
    source = call.node_of("self")
    assert source is not None
    dim = call.axis("dim", len(source.meta["val"].shape))
    mask = kept.mask(source, dim)
    if mask.all():
        return None
    start, stop = _bounds(call, len(mask))
    new_start, new_stop = int(mask[:start].sum()), int(mask[:stop].sum())
    if (new_start, new_stop) == (start, stop):
        return None
    whole = call["end"] is None or int(call["end"]) >= len(mask)
    if new_start == start and whole:
        return None
    return Edited({"start": new_start, "end": call.arguments["end"] if whole else new_stop})


def _narrow(walk: Propagation, call: Call) -> Label:
    label, shape = walk.of(call, "self"), call.shape()
    dim = call.axis("dim", len(label.shape))
    start = int(call["start"]) % label.shape[dim]
    return _slice(label, dim, start, start + shape[dim], shape)


def _edit_narrow(call: Call, kept: Kept) -> Edited | None:
    source = call.node_of("self")
    assert source is not None
    mask = kept.mask(source, call.axis("dim", len(source.meta["val"].shape)))
    start = int(call["start"]) % len(mask)
    length = int(call["length"])
    new = int(mask[:start].sum()), int(mask[start : start + length].sum())
    return None if new == (start, length) else Edited({"start": new[0], "length": new[1]})


def _select(walk: Propagation, call: Call) -> Label:
    """One position of an axis; where that was the only axis with channels, the position itself must stay."""
    label, shape = walk.of(call, "self"), call.shape()
    dim = call.axis("dim", len(label.shape))
    index = int(call["index"]) % label.shape[dim]
    ids = np.take(label.full_along(dim), index, axis=dim)
    if dim in label.varied and ids.size == 1:
        event = walk.event(call, "it is selected by its position")
        walk.atoms.pin(ids, event)
        return kept(shape, event)
    return Label(ids, shape, label.event)


def _edit_select(call: Call, kept: Kept) -> Edited | None:
    source = call.node_of("self")
    assert source is not None
    mask = kept.mask(source, call.axis("dim", len(source.meta["val"].shape)))
    index = int(call["index"]) % len(mask)
    new = int(mask[:index].sum())
    return None if new == index else Edited({"index": new})


def _unbind(walk: Propagation, call: Call) -> list[Label]:
    label, shapes = walk.of(call, "self"), call.shapes()
    dim = call.axis("dim", len(label.shape))
    event = walk.event(call, "it is one position of an axis that is taken apart")
    whole = walk.keep_whole(label, (dim,), event) if len(label.varied) == 1 else label
    ids = whole.full_along(dim)
    return [Label(np.take(ids, i, axis=dim), shape, whole.event) for i, shape in enumerate(shapes)]


def _cat(walk: Propagation, call: Call) -> Label:
    nodes, shape = list(call.tensor_nodes()), call.shape()
    labels = [walk.label(node) for node in nodes]
    labels = [label for label in labels if label.shape != (0,)]
    dim = call.axis("dim", len(shape))
    if all(label.ids.shape[dim] == 1 for label in labels) and any(label.varied for label in labels):
        return _joined_elsewhere(walk, call, labels, shape)
    widths = [max(label.ids.shape[axis] for label in labels) for axis in range(len(shape))]
    parts = []
    for label in labels:
        target = [label.shape[axis] if axis == dim else widths[axis] for axis in range(len(shape))]
        parts.append(np.broadcast_to(label.ids, target))
    return compact(np.concatenate(parts, axis=dim), shape, max(label.event for label in labels))


def _joined_elsewhere(walk: Propagation, call: Call, labels: Sequence[Label], shape: tuple[int, ...]) -> Label:
    """Joined along an axis without channels: the channels along the other axes meet."""
    event = walk.event(call, _JOINED, *labels)
    ids = labels[0].ids
    for label in labels[1:]:
        walk.atoms.unify(ids, label.ids, event)
        ids = np.minimum(*np.broadcast_arrays(ids, label.ids))
    return compact(ids, shape, event if (ids < 0).any() else -1)


def _stack(walk: Propagation, call: Call) -> Label:
    labels, shape = [walk.label(node) for node in call.tensor_nodes()], call.shape()
    dim = call.axis("dim", len(shape))
    opened = [
        Label(np.expand_dims(label.ids, dim), (*label.shape[:dim], 1, *label.shape[dim:]), label.event)
        for label in labels
    ]
    widths = [max(label.ids.shape[axis] for label in opened) for axis in range(len(shape))]
    parts = [np.broadcast_to(label.ids, [*widths[:dim], 1, *widths[dim + 1 :]]) for label in opened]
    return compact(np.concatenate(parts, axis=dim), shape, max(label.event for label in labels))


def _pad(walk: Propagation, call: Call) -> Label | list[Label]:
    """Padding an axis with channels makes new ones, which hold the fill value and can be removed like any other."""
    label, shape = walk.of(call, "self"), call.shape()
    ids = label.ids
    for axis, (before, after) in _padding(call, len(shape)).items():
        if ids.shape[axis] == 1 or (before, after) == (0, 0):
            continue
        if str(call.arguments.get("mode", "constant")) != "constant":
            return walk.freeze(call, "its channels are padded with copies")
        if before < 0 or after < 0:
            return walk.freeze(call, "its channels are cropped by a negative padding")
        sides = []
        for amount in (before, after):
            side = list(ids.shape)
            side[axis] = amount
            sides.append(walk.atoms.fresh(tuple(side)))
        ids = np.concatenate([sides[0], ids, sides[1]], axis=axis)
    return Label(ids, shape, label.event)


def _edit_pad(call: Call, kept: Kept) -> Edited | None:
    rank = len(call.shape())
    pads = [int(amount) for amount in call["pad"]]
    new = list(pads)
    for axis, (before, after) in _padding(call, rank).items():
        mask = kept.mask(call.node, axis)
        if not mask.all():
            last = 2 * (rank - 1 - axis)
            new[last] = int(mask[:before].sum())
            new[last + 1] = int(mask[len(mask) - after :].sum())
    return None if new == pads else Edited({"pad": new})


def _padding(call: Call, rank: int) -> dict[int, tuple[int, int]]:
    pads = [int(amount) for amount in call["pad"]]
    return {rank - 1 - i: (pads[2 * i], pads[2 * i + 1]) for i in range(len(pads) // 2)}


def _flip(walk: Propagation, call: Call) -> Label:
    label = walk.of(call, "self")
    axes = [int(dim) % len(label.shape) for dim in call["dims"]]
    return Label(np.flip(label.ids, tuple(axes)), call.shape(), label.event)


def _roll(walk: Propagation, call: Call) -> Label | list[Label]:
    label = walk.of(call, "self")
    dims, shifts = _list(call["dims"]), _list(call["shifts"])
    if any(label.ids.shape[int(dim)] > 1 for dim in dims) or (not dims and label.varied):
        return walk.freeze(call, "its channels are rolled")
    return Label(label.ids, call.shape(), label.event) if shifts else label


def _repeat(walk: Propagation, call: Call) -> Label:
    label, shape = walk.of(call, "self"), call.shape()
    missing = len(shape) - len(label.shape)
    ids = label.ids[(None,) * missing]
    times = [int(count) if ids.shape[axis] > 1 else 1 for axis, count in enumerate(call["repeats"])]
    return Label(np.tile(ids, times), shape, label.event)


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _bounds(call: Call, size: int) -> tuple[int, int]:
    """Start and end of a slice, counted from the front."""
    start, stop, _ = slice(call["start"], call["end"]).indices(size)
    return start, max(start, stop)


def _slice(label: Label, dim: int, start: int, stop: int, shape: tuple[int, ...]) -> Label:
    ids: npt.NDArray[np.int64] = label.ids
    if ids.shape[dim] > 1:
        ids = np.take(ids, np.arange(start, stop), axis=dim)
    return compact(ids, shape, label.event)


TABLE = {
    "aten.split.Tensor": Rule(_pieces, edit=_edit_pieces),
    "aten.split.sizes": Rule(_pieces, edit=_edit_pieces),
    "aten.split_with_sizes.default": Rule(_pieces, edit=_edit_pieces),
    "aten.chunk.default": Rule(_pieces, edit=_edit_pieces),
    "aten.slice.Tensor": Rule(_slice_tensor, edit=_edit_slice),
    "aten.narrow.default": Rule(_narrow, edit=_edit_narrow),
    "aten.select.int": Rule(_select, edit=_edit_select),
    "aten.unbind.int": Rule(_unbind),
    "aten.cat.default": Rule(_cat),
    "aten.concat.default": Rule(_cat),
    "aten.stack.default": Rule(_stack),
    "aten.constant_pad_nd.default": Rule(_pad, edit=_edit_pad),
    "aten.pad.default": Rule(_pad, edit=_edit_pad),
    "aten.flip.default": Rule(_flip),
    "aten.roll.default": Rule(_roll),
    "aten.repeat.default": Rule(_repeat),
}
