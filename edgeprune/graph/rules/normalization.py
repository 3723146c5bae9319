"""Normalizations: per channel, over the channels of one group, or over the last axes; always over the kept entries only."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeprune.graph.labels import Label
from edgeprune.graph.rules._base import Call, Edited, Kept, Rule, edit_groups

if TYPE_CHECKING:
    from edgeprune.graph.propagation import Propagation

_VECTORS = ("weight", "bias", "running_mean", "running_var")
_TOGETHER = "it is normalized together with channels that keep their size"


def _per_channel(walk: Propagation, call: Call) -> Label:
    x = walk.of(call, "input")
    event = walk.event(call, _TOGETHER, x)
    for name in _VECTORS:
        walk.bind(call, name, 0, x.axes[1], "vector", event)
    return x.of_shape(call.shape())


def _over_last(walk: Propagation, call: Call) -> Label:
    """Layer norm and RMS norm: weight and bias have the shape of the last axes."""
    x = walk.of(call, "input")
    event = walk.event(call, _TOGETHER, x)
    count = len(call["normalized_shape"])
    for axis in range(count):
        for name in ("weight", "bias"):
            if name in call.arguments:
                walk.bind(call, name, axis, x.axes[len(x.shape) - count + axis], "vector", event)
    return x.of_shape(call.shape())


def _edit_normalized_shape(call: Call, kept: Kept) -> Edited | None:
    source = call.node_of("input")
    assert source is not None
    old = [int(size) for size in call["normalized_shape"]]
    rank = len(call.shape())
    new = [kept.size(source, rank - len(old) + axis) for axis in range(len(old))]
    return None if new == old else Edited({"normalized_shape": new})


def _group_norm(walk: Propagation, call: Call) -> Label:
    """The channels of each norm group are normalized together: whole groups go, or as many channels of each."""
    x = walk.of(call, "input")
    event = walk.event(call, _TOGETHER, x)
    channels, groups = x.axes[1], int(call["num_groups"])
    if groups > 1:
        walk.atoms.split(channels, (groups, x.shape[1] // groups))
    for name in ("weight", "bias"):
        walk.bind(call, name, 0, channels, "vector", event)
    return x.of_shape(call.shape())


def _weight_norm(walk: Propagation, call: Call) -> Label:
    """``v * g / norm of v``, the norm over all axes but one; `g` has length 1 along the others."""
    v, rank = walk.of(call, "v"), len(call.shape())
    dim = int(call["dim"]) % rank
    walk.bind(call, "g", dim, v.axes[dim], "vector", walk.event(call, _TOGETHER, v))
    return v.of_shape(call.shape())


TABLE = {
    "aten._weight_norm.default": Rule(_weight_norm),
    "aten.batch_norm.default": Rule(_per_channel),
    "aten.instance_norm.default": Rule(_per_channel),
    "aten.layer_norm.default": Rule(_over_last, edit=_edit_normalized_shape),
    "aten.rms_norm.default": Rule(_over_last, edit=_edit_normalized_shape),
    "aten.group_norm.default": Rule(_group_norm, edit=edit_groups("num_groups")),
}
