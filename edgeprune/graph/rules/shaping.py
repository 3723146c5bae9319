"""Views and transpositions: the label is viewed and transposed in the same way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from edgeprune.graph.atoms import Ids
from edgeprune.graph.labels import Label, reshape
from edgeprune.graph.rules._base import Call, Edited, Kept, Rule, edit_groups

if TYPE_CHECKING:
    from edgeprune.graph.propagation import Propagation


def _view(walk: Propagation, call: Call) -> Label:
    return reshape(walk.of(call, "self"), call.shape(), walk.atoms)


def _view_as(walk: Propagation, call: Call) -> Label:
    """The shape is read from another tensor when the model runs, so both must be cut alike."""
    found, other = reshape(walk.of(call, "self"), call.shape(), walk.atoms), walk.of(call, "other")
    event = walk.event(call, "it takes the shape of a tensor that keeps its size", found, other)
    axes = [walk.meet(ids, like, event) for ids, like in zip(found.axes, other.axes, strict=True)]
    return Label(tuple(axes), call.shape(), max(found.event, other.event))


def _edit_sizes(argument: str, first_axis: str | None = None) -> Any:
    """New sizes in an argument that spells out the output's shape; -1 and symbolic sizes stay."""

    def edit(call: Call, kept: Kept) -> Edited | None:
        sizes = call.arguments[argument]
        offset = 0 if first_axis is None else call.axis(first_axis, len(call.node_of("self").meta["val"].shape))  # type: ignore[union-attr]
        new = list(sizes)
        for position, size in enumerate(sizes):
            cut = not kept.mask(call.node, offset + position).all()
            if isinstance(size, Node) and cut:
                # Heads beside the batch: only the size as a whole is written, so it is left for torch to find out.
                new = [kept.size(call.node, offset + at) if other == -1 else other for at, other in enumerate(new)]
                new[position] = -1
            elif not isinstance(size, Node) and size != -1:
                new[position] = kept.size(call.node, offset + position)
        return None if new == list(sizes) else Edited({argument: new})

    return edit


def _edit_expand(call: Call, kept: Kept) -> Edited | None:
    sizes = call.arguments["size"]
    new = list(sizes)
    for axis, size in enumerate(sizes):
        if kept.mask(call.node, axis).all():
            continue
        if isinstance(size, Node):
            # Heads beside the batch: only the size as a whole is written, and no copies are made along it.
            new[axis] = -1
        elif size not in (-1, 1):
            new[axis] = kept.size(call.node, axis)
    return None if new == list(sizes) else Edited({"size": new})


def _permute(walk: Propagation, call: Call) -> Label:
    label = walk.of(call, "self")
    return label.permuted([int(dim) % len(label.shape) for dim in call["dims"]])


def _transposition(one: str, other: str) -> Rule:
    def propagate(walk: Propagation, call: Call) -> Label:
        label = walk.of(call, "self")
        rank = len(label.shape)
        order = list(range(rank))
        first, second = call.axis(one, rank), call.axis(other, rank)
        order[first], order[second] = second, first
        return label.permuted(order)

    return Rule(propagate)


def _matrix_transpose(walk: Propagation, call: Call) -> Label:
    label = walk.of(call, "self")
    return label.permuted(list(reversed(range(len(label.shape)))))


def _last_transpose(walk: Propagation, call: Call) -> Label:
    label = walk.of(call, "self")
    *lead, rows, columns = range(len(label.shape))
    return label.permuted([*lead, columns, rows])


def _movedim(walk: Propagation, call: Call) -> Label:
    label = walk.of(call, "self")
    rank = len(label.shape)
    source, destination = ([axis % rank for axis in _axes(call[name])] for name in ("source", "destination"))
    order = [axis for axis in range(rank) if axis not in source]
    for target, axis in sorted(zip(destination, source, strict=True)):
        order.insert(target, axis)
    return label.permuted(order)


def _squeeze(walk: Propagation, call: Call) -> Label:
    """Only axes of length 1 go, so nothing is removed but ones."""
    return reshape(walk.of(call, "self"), call.shape(), walk.atoms)


def _edit_squeeze(call: Call, kept: Kept) -> Edited | None:
    """A width of 1 must not be squeezed away with the axes that always have length 1."""
    source = call.node_of("self")
    assert source is not None
    axes = range(len(source.meta["val"].shape))
    ones = [axis for axis in axes if len(kept.mask(source, axis)) == 1]
    if all(axis in ones or kept.size(source, axis) > 1 for axis in axes):
        return None
    return Edited({"self": source, "dim": ones}, op="aten.squeeze.dims")


def _unsqueeze(walk: Propagation, call: Call) -> Label:
    return walk.of(call, "self").inserted(call.axis("dim", len(call.shape())))


def _expand(walk: Propagation, call: Call) -> Label:
    """Copies along an axis of length 1; of channels there can be fewer copies too, as heads that share keys are made."""
    label, shape = walk.of(call, "self"), call.shape()
    missing = len(shape) - len(label.shape)
    sizes = call.node.meta["val"].shape
    axes: list[Ids | None] = [*[None] * missing, *label.axes]
    for axis in range(missing, len(shape)):
        copied = label.shape[axis - missing] == 1 and shape[axis] > 1
        if copied and not isinstance(sizes[axis], torch.SymInt):
            axes[axis] = walk.atoms.fresh(shape[axis])
    return Label(tuple(axes), shape, label.event)


def _expand_as(walk: Propagation, call: Call) -> Label:
    """Copies along axes of length 1, as many as another tensor has positions when the model runs."""
    label, other, shape = walk.of(call, "self"), walk.of(call, "other"), call.shape()
    event = walk.event(call, "it takes the shape of a tensor that keeps its size", label, other)
    axes = list(other.axes)
    for axis, size in enumerate(label.shape):
        at = axis + len(shape) - len(label.shape)
        if size == shape[at]:
            axes[at] = walk.meet(label.axes[axis], other.axes[at], event)
    return Label(tuple(axes), shape, max(label.event, other.event))


def _pixel_shuffle(walk: Propagation, call: Call) -> Label:
    """[..., c * r * r, h, w] becomes [..., c, h * r, w * r]."""
    label, shape = walk.of(call, "self"), call.shape()
    factor = int(call["upscale_factor"])
    *lead, channels, height, width = label.shape
    rank = len(lead)
    opened = reshape(label, (*lead, channels // factor**2, factor, factor, height, width), walk.atoms)
    order = [*range(rank), rank, rank + 3, rank + 1, rank + 4, rank + 2]
    return reshape(opened.permuted(order), shape, walk.atoms)


def _pixel_unshuffle(walk: Propagation, call: Call) -> Label:
    """[..., c, h * r, w * r] becomes [..., c * r * r, h, w]."""
    label, shape = walk.of(call, "self"), call.shape()
    factor = int(call["downscale_factor"])
    *lead, channels, height, width = label.shape
    rank = len(lead)
    opened = reshape(label, (*lead, channels, height // factor, factor, width // factor, factor), walk.atoms)
    order = [*range(rank), rank, rank + 2, rank + 4, rank + 1, rank + 3]
    return reshape(opened.permuted(order), shape, walk.atoms)


def _channel_shuffle(walk: Propagation, call: Call) -> Label:
    label, shape = walk.of(call, "self"), call.shape()
    groups = int(call["groups"])
    opened = reshape(label, (shape[0], groups, shape[1] // groups, *shape[2:]), walk.atoms)
    return reshape(opened.permuted([0, 2, 1, *range(3, len(shape) + 1)]), shape, walk.atoms)


def _as_complex(walk: Propagation, call: Call) -> Label:
    """The last axis holds a real and an imaginary part, and both of each number go."""
    label = walk.of(call, "self")
    last = len(label.shape) - 1
    event = walk.event(call, "it is the real or the imaginary part of a number", label)
    return walk.keep_whole(label, (last,), event).without(last).of_shape(call.shape())


def _as_real(walk: Propagation, call: Call) -> Label:
    label = walk.of(call, "self")
    return label.inserted(len(label.shape), 2)


def _axes(value: Any) -> list[int]:
    return [int(item) for item in value] if isinstance(value, list | tuple) else [int(value)]


TABLE = {
    "aten.view.default": Rule(_view, edit=_edit_sizes("size")),
    "aten.reshape.default": Rule(_view, edit=_edit_sizes("shape")),
    "aten._unsafe_view.default": Rule(_view, edit=_edit_sizes("size")),
    "aten.unflatten.int": Rule(_view, edit=_edit_sizes("sizes", first_axis="dim")),
    "aten.flatten.using_ints": Rule(_view),
    "aten.ravel.default": Rule(_view),
    "aten.reshape_as.default": Rule(_view_as),
    "aten.view_as.default": Rule(_view_as),
    "aten.permute.default": Rule(_permute),
    "aten.transpose.int": _transposition("dim0", "dim1"),
    "aten.swapaxes.default": _transposition("axis0", "axis1"),
    "aten.swapdims.default": _transposition("dim0", "dim1"),
    "aten.t.default": Rule(_matrix_transpose),
    "aten.numpy_T.default": Rule(_matrix_transpose),
    "aten.mT.default": Rule(_last_transpose),
    "aten.movedim.int": Rule(_movedim),
    "aten.movedim.intlist": Rule(_movedim),
    "aten.moveaxis.int": Rule(_movedim),
    "aten.moveaxis.intlist": Rule(_movedim),
    "aten.squeeze.default": Rule(_squeeze, edit=_edit_squeeze),
    "aten.squeeze.dim": Rule(_squeeze),
    "aten.squeeze.dims": Rule(_squeeze),
    "aten.unsqueeze.default": Rule(_unsqueeze),
    "aten.broadcast_to.default": Rule(_expand, edit=_edit_expand),
    "aten.expand.default": Rule(_expand, edit=_edit_expand),
    "aten.expand_as.default": Rule(_expand_as),
    "aten.pixel_shuffle.default": Rule(_pixel_shuffle),
    "aten.pixel_unshuffle.default": Rule(_pixel_unshuffle),
    "aten.view_as_complex.default": Rule(_as_complex),
    "aten.view_as_real.default": Rule(_as_real),
    "aten.channel_shuffle.default": Rule(_channel_shuffle, edit=edit_groups("groups")),
}
