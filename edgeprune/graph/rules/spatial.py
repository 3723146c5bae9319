"""Pooling and resizing: every channel on its own, over the trailing axes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeprune.graph.labels import Label
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
    "aten.upsample_bicubic2d.vec": _RULES[2],
    "aten.upsample_bilinear2d.vec": _RULES[2],
    "aten.upsample_linear1d.vec": _RULES[1],
    "aten.upsample_nearest1d.vec": _RULES[1],
    "aten.upsample_nearest2d.vec": _RULES[2],
    "aten.upsample_nearest3d.vec": _RULES[3],
    "aten.upsample_trilinear3d.vec": _RULES[3],
}
