"""Normalization per channel: the statistics of one channel do not depend on the others."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeprune.graph.labels import Label, vector
from edgeprune.graph.rules._base import Call, Rule

if TYPE_CHECKING:
    from edgeprune.graph.propagation import Propagation

_VECTORS = ("weight", "bias", "running_mean", "running_var")


def _per_channel(walk: Propagation, call: Call) -> Label | list[Label]:
    x = walk.of(call, "input")
    if any(call.node_of(name) is not None and walk.parameter(call, name) is None for name in _VECTORS):
        return walk.freeze(call, "its weights are computed in forward")
    event = walk.event(call, "it is normalized together with channels that keep their size", x)
    channels = walk.collapse(x, 1, event)
    for name in _VECTORS:
        parameter = walk.parameter(call, name)
        if parameter is not None:
            walk.bind(parameter, 0, channels, "vector", event)
    return vector(channels, call.shape(), 1, x.event)


TABLE = {
    "aten.batch_norm.default": Rule(_per_channel),
    "aten.instance_norm.default": Rule(_per_channel),
}
