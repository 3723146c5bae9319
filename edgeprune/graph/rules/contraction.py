"""Operations that sum over channels with weights: fresh atoms for outputs, contracted axes go together."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edgeprune.graph.atoms import KEPT, Ids
from edgeprune.graph.labels import Label, vector
from edgeprune.graph.rules._base import Call, Edited, Kept, Rule

if TYPE_CHECKING:
    from edgeprune.graph.propagation import Propagation

_COMPUTED = "its weight is computed in forward"
_COMBINED = "it is read together with channels that keep their size"


def _conv(walk: Propagation, call: Call) -> Label | list[Label]:
    """Weight is [out, in / groups, ...]; a depthwise conv ties its outputs to its inputs."""
    weight = walk.parameter(call, "weight")
    if weight is None:
        return walk.freeze(call, _COMPUTED)
    x, shape, groups = walk.of(call, "input"), walk.parameter_shapes[weight], int(call["groups"])
    channel = len(x.shape) - len(shape) + 1
    event = walk.event(call, _COMBINED, x)
    inputs = walk.collapse(x, channel, event)
    balanced = 1
    if groups > 1 and shape[1] == 1:
        outputs = np.repeat(inputs, shape[0] // groups)
        walk.bind(weight, 0, outputs, "output", event)
    else:
        outputs = walk.axis(weight, 0, "output")
        if groups > 1:
            inputs = walk.atoms.unify_along(inputs.reshape(groups, -1), 0, event)[0]
            walk.atoms.unify_along(outputs.reshape(groups, -1), 0, event)
            balanced = groups
        walk.bind(weight, 1, inputs, "input", event)
        walk.produce(call, outputs, weight, balanced)
    return _with_bias(walk, call, outputs, channel, event)


def _conv_transpose(walk: Propagation, call: Call) -> Label | list[Label]:
    """Weight is [in, out / groups, ...]."""
    weight = walk.parameter(call, "weight")
    if weight is None:
        return walk.freeze(call, _COMPUTED)
    x, shape, groups = walk.of(call, "input"), walk.parameter_shapes[weight], int(call["groups"])
    channel = len(x.shape) - len(shape) + 1
    event = walk.event(call, _COMBINED, x)
    inputs = walk.collapse(x, channel, event)
    if groups > 1 and shape[0] == groups:
        outputs = np.repeat(inputs, shape[1])
        walk.bind(weight, 0, inputs, "output", event)
    else:
        if groups > 1:
            walk.atoms.unify_along(inputs.reshape(groups, -1), 0, event)
        walk.bind(weight, 0, inputs, "input", event)
        outputs = np.tile(walk.axis(weight, 1, "output"), groups)
        walk.produce(call, outputs, weight, groups)
    return _with_bias(walk, call, outputs, channel, event)


def _linear(walk: Propagation, call: Call) -> Label | list[Label]:
    """Weight is [out, in]; channels along other axes of the input pass through."""
    weight = walk.parameter(call, "weight")
    if weight is None:
        return walk.freeze(call, _COMPUTED)
    x, out_shape = walk.of(call, "input"), call.shape()
    last = len(x.shape) - 1
    event = walk.event(call, _COMBINED, x)
    if x.varied and last not in x.varied:
        event = walk.event(call, "its input already carries channels along another axis")
        for axis in (0, 1):
            walk.atoms.pin(walk.axis(weight, axis, "output"), event)
        if walk.parameter(call, "bias") is not None:
            walk.atoms.pin(walk.of(call, "bias").ids, event)
        return Label(x.ids, out_shape, event)
    walk.bind(weight, 1, walk.collapse(x, last, event), "input", event)
    outputs = walk.axis(weight, 0, "output")
    walk.produce(call, outputs, weight)
    return _with_bias(walk, call, outputs, last, event)


def _with_bias(walk: Propagation, call: Call, outputs: Ids, channel: int, event: int) -> Label:
    bias = call.node_of("bias")
    if bias is not None:
        name = walk.parameter(call, "bias")
        if name is not None:
            walk.bind(name, 0, outputs, "vector", event)
        else:
            walk.atoms.unify(walk.collapse(walk.label(bias), 0, event), outputs, event)
    return vector(outputs, call.shape(), channel, event if (outputs == KEPT).any() else -1)


def _conv_groups(call: Call, kept: Kept) -> Edited | None:
    """A depthwise conv has as many conv groups as channels are left."""
    node, weight = call.node_of("input"), call.node_of("weight")
    groups = int(call["groups"])
    if node is None or weight is None or groups == 1:
        return None
    channel = len(node.meta["val"].shape) - len(weight.meta["val"].shape) + 1
    channels = kept.mask(node, channel)
    if len(channels) != groups or channels.all():
        return None
    return Edited({"groups": int(channels.sum())})


_CONV = Rule(_conv, edit=_conv_groups, weights=("weight",))
_CONV_TRANSPOSE = Rule(_conv_transpose, edit=_conv_groups, weights=("weight",))

TABLE = {
    "aten.conv1d.default": _CONV,
    "aten.conv2d.default": _CONV,
    "aten.conv3d.default": _CONV,
    "aten.conv1d.padding": _CONV,
    "aten.conv2d.padding": _CONV,
    "aten.conv3d.padding": _CONV,
    "aten.conv_transpose1d.default": _CONV_TRANSPOSE,
    "aten.conv_transpose2d.input": _CONV_TRANSPOSE,
    "aten.conv_transpose3d.input": _CONV_TRANSPOSE,
    "aten.linear.default": Rule(_linear, weights=("weight",)),
}
