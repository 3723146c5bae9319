"""Pooling and resizing: every channel on its own, over the trailing axes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeprune.graph.labels import Label, free
from edgeprune.graph.rules._base import Call, Rule

if TYPE_CHECKING:
    from edgeprune.graph.propagation import Propagation


def _over_last(axes: int) -> Rule:
    def propagate(walk: Propagation, call: Call) -> Label | list[Label]:
        label = walk.label(next(call.tensor_nodes()))
        rank = len(label.shape)
        event = walk.event(call, f"{call.op} mixes the positions that it could be removed from", label)
        whole = walk.keep_whole(label, range(rank - axes, rank), event)
        if isinstance(call.node.meta["val"], list | tuple):
            return [whole.of_shape(shape) for shape in call.shapes()]
        return whole.of_shape(call.shape())

    return Rule(propagate)


def _windows(walk: Propagation, call: Call) -> Label:
    """[n, c, h, w] becomes [n, c * window, places], the channel running slowest."""
    label, shape = walk.of(call, "self"), call.shape()
    event = walk.event(call, f"{call.op} mixes the positions that it could be removed from", label)
    label = walk.keep_whole(label, range(len(label.shape) - 2, len(label.shape)), event)
    channels = label.shape[-3]
    ids = walk.atoms.merge([label.axes[-3], None], [channels, shape[-2] // channels])
    return Label((*label.axes[:-3], free(ids), None), shape, label.event)


def _from_windows(walk: Propagation, call: Call) -> Label:
    """[n, c * window, places] becomes [n, c, h, w]; the positions of a window are told apart."""
    label, shape = walk.of(call, "self"), call.shape()
    event = walk.event(call, f"{call.op} mixes the positions that it could be removed from", label)
    label = walk.keep_whole(label, (len(label.shape) - 1,), event)
    channels = shape[-3]
    ids, window = walk.atoms.split(label.axes[-2], (channels, label.shape[-2] // channels))
    walk.atoms.pin(window, event)
    return Label((*label.axes[:-2], free(ids), None, None), shape, label.event)


def _unpooled(walk: Propagation, call: Call) -> Label:
    """Values put back where a pooling found them, channel by channel; zeros elsewhere."""
    label, places = walk.of(call, "self"), walk.of(call, "indices")
    event = walk.event(call, f"{call.op} mixes the positions that it could be removed from", label, places)
    axes = len(call["output_size"])
    both = walk.together([label, places], label.shape, event)
    return walk.keep_whole(both, range(len(label.shape) - axes, len(label.shape)), event).of_shape(call.shape())


def _sliding(walk: Propagation, call: Call) -> Label:
    """``x.unfold(dim, size, step)``: windows along one axis, the position in the window as a new last axis."""
    label = walk.of(call, "self")
    dim = call.axis("dimension", len(label.shape))
    event = walk.event(call, f"{call.op} mixes the positions that it could be removed from", label)
    label = walk.keep_whole(label, (dim,), event)
    return label.inserted(len(label.shape)).of_shape(call.shape())


def _sampled(walk: Propagation, call: Call) -> Label:
    """Values of [n, c, ...] at the positions of a grid, channel by channel."""
    label, shape = walk.of(call, "input"), call.shape()
    grid = walk.of(call, "grid")
    event = walk.event(call, "it is read at computed positions", label)
    walk.keep_whole(grid, range(len(grid.shape)), event)
    return walk.keep_whole(label, range(2, len(label.shape)), event).of_shape(shape)


_RULES: dict[int, Rule] = {axes: _over_last(axes) for axes in (1, 2, 3)}

TABLE: dict[str, Rule] = {
    "aten.adaptive_avg_pool1d.default": _RULES[1],
    "aten.adaptive_avg_pool2d.default": _RULES[2],
    "aten.adaptive_avg_pool3d.default": _RULES[3],
    "aten.adaptive_max_pool1d.default": _RULES[1],
    "aten.adaptive_max_pool2d.default": _RULES[2],
    "aten.adaptive_max_pool3d.default": _RULES[3],
    "aten.avg_pool1d.default": _RULES[1],
    "aten.avg_pool2d.default": _RULES[2],
    "aten.avg_pool3d.default": _RULES[3],
    "aten.max_pool1d.default": _RULES[1],
    "aten.max_pool2d.default": _RULES[2],
    "aten.max_pool3d.default": _RULES[3],
    "aten.max_pool2d_with_indices.default": _RULES[2],
    "aten.max_pool3d_with_indices.default": _RULES[3],
    "aten.col2im.default": Rule(_from_windows),
    "aten.grid_sampler.default": Rule(_sampled),
    "aten.im2col.default": Rule(_windows),
    "aten.max_unpool2d.default": Rule(_unpooled),
    "aten.max_unpool3d.default": Rule(_unpooled),
    "aten.unfold.default": Rule(_sliding),
    "aten._upsample_bicubic2d_aa.vec": _RULES[2],
    "aten._upsample_bilinear2d_aa.vec": _RULES[2],
    "aten._upsample_nearest_exact1d.vec": _RULES[1],
    "aten._upsample_nearest_exact2d.vec": _RULES[2],
    "aten._upsample_nearest_exact3d.vec": _RULES[3],
    "aten.upsample_bicubic2d.vec": _RULES[2],
    "aten.upsample_bilinear2d.vec": _RULES[2],
    "aten.upsample_linear1d.vec": _RULES[1],
    "aten.upsample_nearest1d.vec": _RULES[1],
    "aten.upsample_nearest2d.vec": _RULES[2],
    "aten.upsample_nearest3d.vec": _RULES[3],
    "aten.upsample_trilinear3d.vec": _RULES[3],
}
