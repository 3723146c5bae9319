"""Operations that pick, join or pad positions along an axis: the same happens to the label."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from edgeprune.graph.atoms import Ids
from edgeprune.graph.labels import Label
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


def _slice_tensor(walk: Propagation, call: Call) -> Label:
    label, shape = walk.of(call, "self"), call.shape()
    dim = call.axis("dim", len(label.shape))
    if label.axes[dim] is None:
        return label.of_shape(shape)
    step = int(call["step"])
    if step != 1:
        return _strided(walk, call, label, dim, step)
    start, _ = _bounds(call, label.shape[dim])
    return _slice(label, dim, start, start + shape[dim], shape)


def _strided(walk: Propagation, call: Call, label: Label, dim: int, step: int) -> Label:
    """Every so many channels: those between two of them go together, so that the step stays what it is."""
    shape, size = call.shape(), label.shape[dim]
    start, _ = _bounds(call, size)
    event = walk.event(call, "it is sliced with a step along its channels", label)
    if size % step or start >= step or shape[dim] != size // step:
        return walk.keep_whole(label, (dim,), event).of_shape(shape)
    ids, place = walk.atoms.split(label.axes[dim], (size // step, step))
    walk.atoms.pin(place, event)
    return label.at(dim, ids, size // step).of_shape(shape)


def _edit_slice(call: Call, kept: Kept) -> Edited | None:
    source = call.node_of("self")
    assert source is not None
    dim = call.axis("dim", len(source.meta["val"].shape))
    mask = kept.mask(source, dim)
    if mask.all() or int(call["step"]) != 1:
        return _edit_end(call, mask)
    start, stop = _bounds(call, len(mask))
    new_start, new_stop = int(mask[:start].sum()), int(mask[:stop].sum())
    if (new_start, new_stop) == (start, stop):
        return None
    whole = call["end"] is None or int(call["end"]) >= len(mask)
    if new_start == start and whole:
        return None
    return Edited({"start": new_start, "end": call.arguments["end"] if whole else new_stop})


def _edit_end(call: Call, mask: npt.NDArray[np.bool_]) -> Edited | None:
    """A slice with a step keeps its start, which lies in the first step; its end moves with the channels."""
    whole = call["end"] is None or int(call["end"]) >= len(mask)
    return None if mask.all() or whole else Edited({"end": int(mask[: int(call["end"])].sum())})


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
    """One position of an axis, which must stay."""
    label = walk.of(call, "self")
    dim = call.axis("dim", len(label.shape))
    ids = label.axes[dim]
    event = label.event
    if ids is not None:
        event = walk.event(call, "it is selected by its position", label)
        walk.atoms.pin(ids[[int(call["index"]) % len(ids)]], event)
    return Label(label.without(dim).axes, call.shape(), event)


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
    event = walk.event(call, "it is one position of an axis that is taken apart", label)
    whole = walk.keep_whole(label, (dim,), event).without(dim)
    return [whole.of_shape(shape) for shape in shapes]


def _cat(walk: Propagation, call: Call) -> Label:
    shape = call.shape()
    labels = [walk.label(node) for node in call.tensor_nodes()]
    return _joined(walk, call, [label for label in labels if label.shape != (0,)], call.axis("dim", len(shape)), shape)


def _stack(walk: Propagation, call: Call) -> Label:
    shape = call.shape()
    dim = call.axis("dim", len(shape))
    labels = [walk.label(node).inserted(dim) for node in call.tensor_nodes()]
    return _joined(walk, call, labels, dim, shape)


def _joined(walk: Propagation, call: Call, labels: Sequence[Label], dim: int, shape: tuple[int, ...]) -> Label:
    """Joined along one axis; the channels along the other axes meet."""
    event = walk.event(call, _JOINED, *labels)
    ids = np.concatenate([label.axis(dim) for label in labels])
    others = [label.at(dim, None, 1) for label in labels]
    return walk.together(others, (*shape[:dim], 1, *shape[dim + 1 :]), event).at(dim, ids, shape[dim])


def _pad(walk: Propagation, call: Call) -> Label:
    """Padding an axis with channels makes new ones, which hold the fill value and can be removed like any other."""
    label, shape = walk.of(call, "self"), call.shape()
    for axis, (before, after) in _padding(call, len(shape)).items():
        if label.axes[axis] is None or (before, after) == (0, 0):
            continue
        reason = ""
        if str(call.arguments.get("mode", "constant")) != "constant":
            reason = "its channels are padded with copies"
        elif before < 0 or after < 0:
            reason = "its channels are cropped by a negative padding"
        if reason:
            label = walk.keep_whole(label, (axis,), walk.event(call, reason, label))
            continue
        sides = walk.atoms.fresh(before), walk.atoms.fresh(after)
        walk.filled += sides
        label = label.at(axis, np.concatenate([sides[0], label.axis(axis), sides[1]]))
    return label.of_shape(shape)


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
    for dim in call["dims"]:
        axis = int(dim) % len(label.shape)
        ids = label.axes[axis]
        label = label.at(axis, None if ids is None else ids[::-1].copy())
    return label


def _roll(walk: Propagation, call: Call) -> Label:
    label = walk.of(call, "self")
    dims = [int(dim) % len(label.shape) for dim in _list(call["dims"])] or list(range(len(label.shape)))
    event = walk.event(call, "its channels are rolled", label)
    return walk.keep_whole(label, dims, event).of_shape(call.shape())


def _repeat(walk: Propagation, call: Call) -> Label:
    """Channels one after another, all of them so often; of copies of a single one there can be fewer, as in `expand`."""
    label, shape = walk.of(call, "self"), call.shape()
    missing = len(shape) - len(label.shape)
    sizes = call.node.meta["val"].shape
    axes: list[Ids | None] = [None] * missing
    for axis, (ids, count) in enumerate(zip(label.axes, list(call["repeats"])[missing:], strict=True), start=missing):
        if label.shape[axis - missing] == 1 and int(count) > 1 and not isinstance(sizes[axis], torch.SymInt):
            axes.append(walk.atoms.fresh(shape[axis]))
        else:
            axes.append(None if ids is None else np.tile(ids, int(count)))
    return Label(tuple(axes), shape, label.event)


def _edit_repeat(call: Call, kept: Kept) -> Edited | None:
    source = call.node_of("self")
    assert source is not None
    new = list(call.arguments["repeats"])
    rank = len(source.meta["val"].shape)
    for axis in range(len(new) - rank, len(new)):
        copied = len(kept.mask(source, axis - len(new) + rank)) == 1
        if copied and not kept.mask(call.node, axis).all():
            new[axis] = kept.size(call.node, axis)
    return None if new == list(call.arguments["repeats"]) else Edited({"repeats": new})


def _repeat_interleave(walk: Propagation, call: Call) -> Label | list[Label]:
    label, shape = walk.of(call, "self"), call.shape()
    if call["dim"] is None and len(label.shape) != 1:
        return walk.freeze(call, "it is repeated without a dimension")
    dim = int(call["dim"] or 0) % len(label.shape)
    ids = label.axes[dim]
    if ids is None:
        return label.of_shape(shape)
    # The copies of one channel are a product with it: fewer copies of each are as good as fewer channels.
    copies = walk.atoms.fresh(int(call["repeats"]))
    return label.at(dim, walk.atoms.merge([ids, copies], [len(ids), len(copies)]), shape[dim]).of_shape(shape)


def _edit_repeat_interleave(call: Call, kept: Kept) -> Edited | None:
    source = call.node_of("self")
    assert source is not None
    dim = int(call["dim"] or 0) % len(source.meta["val"].shape)
    left, copies = kept.size(source, dim), kept.size(call.node, dim)
    new = copies // left
    return None if new == int(call["repeats"]) else Edited({"repeats": new})


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _bounds(call: Call, size: int) -> tuple[int, int]:
    """Start and end of a slice, counted from the front."""
    start, stop, _ = slice(call["start"], call["end"]).indices(size)
    return start, max(start, stop)


def _slice(label: Label, dim: int, start: int, stop: int, shape: tuple[int, ...]) -> Label:
    ids = label.axes[dim]
    return label.at(dim, None if ids is None else ids[start:stop], shape[dim]).of_shape(shape)


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
    "aten.repeat.default": Rule(_repeat, edit=_edit_repeat),
    "aten.repeat_interleave.self_int": Rule(_repeat_interleave, edit=_edit_repeat_interleave),
}
