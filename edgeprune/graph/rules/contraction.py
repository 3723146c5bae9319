"""Operations that sum over channels with weights: fresh atoms for outputs, contracted axes go together."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from edgeprune.graph.atoms import Ids
from edgeprune.graph.capture import shape_of
from edgeprune.graph.labels import Label
from edgeprune.graph.rules._base import Call, Edited, Kept, Rule

if TYPE_CHECKING:
    from edgeprune.graph.propagation import Propagation

_COMBINED = "it is read together with channels that keep their size"
_MIXED = "it lies along an axis that a convolution slides over"


def _conv(walk: Propagation, call: Call) -> Label | list[Label]:
    """Weight is [out, in / groups, ...]; a depthwise conv ties its outputs to its inputs."""
    if not isinstance(call.arguments["groups"], int):
        return walk.freeze(call, "it has as many conv groups as there are samples")
    x, shape, groups = walk.of(call, "input"), _weight_shape(call), int(call["groups"])
    channel, x, event = _channels(walk, call, x, len(shape))
    inputs = x.axes[channel]
    if groups > 1 and shape[1] == 1:
        outputs = None if inputs is None else np.repeat(inputs, shape[0] // groups)
        walk.bind(call, "weight", 0, outputs, "output", event)
    else:
        outputs = walk.made(call, "weight", 0)
        if groups > 1:
            inputs = _in_step(walk, inputs, groups, event)
            _in_step(walk, outputs, groups, event)
        walk.bind(call, "weight", 1, inputs, "input", event)
        walk.produce(call, outputs, conv_groups=groups)
    return _with_bias(walk, call, x, outputs, channel, event)


def _conv_transpose(walk: Propagation, call: Call) -> Label:
    """Weight is [in, out / groups, ...]."""
    x, shape, groups = walk.of(call, "input"), _weight_shape(call), int(call["groups"])
    channel, x, event = _channels(walk, call, x, len(shape))
    inputs = x.axes[channel]
    outputs: Ids | None
    if groups > 1 and shape[0] == groups:
        outputs = None if inputs is None else np.repeat(inputs, shape[1])
        walk.bind(call, "weight", 0, inputs, "output", event)
        walk.atoms.pin(walk.made(call, "weight", 1), event)
    else:
        _in_step(walk, inputs, groups, event)
        walk.bind(call, "weight", 0, inputs, "input", event)
        outputs = np.tile(walk.made(call, "weight", 1), groups)
        walk.produce(call, outputs, conv_groups=groups)
    return _with_bias(walk, call, x, outputs, channel, event)


def _weight_shape(call: Call) -> tuple[int, ...]:
    weight = call.node_of("weight")
    assert weight is not None
    return shape_of(weight.meta["val"], call.batch)


def _channels(walk: Propagation, call: Call, x: Label, weight_rank: int) -> tuple[int, Label, int]:
    """The channel axis, and the input with its spatial axes whole."""
    channel = len(x.shape) - weight_rank + 1
    event = walk.event(call, _COMBINED, x)
    in_place = () if walk.captured.parts else _slid_over(call, channel)
    mixed = [
        channel + 1 + axis
        for axis in range(weight_rank - 2)
        if not _one_by_one(call, axis) and channel + 1 + axis not in in_place
    ]
    x = walk.keep_whole(x, mixed, walk.event(call, _MIXED, x))
    weight = call.node_of("weight")
    if weight is not None and walk.parameter(call, "weight") is None:
        walk.keep_whole(walk.label(weight), range(2, weight_rank), event)
    return channel, x, event


def _one_by_one(call: Call, axis: int) -> bool:
    """Whether a convolution reads each position along one spatial axis on its own, and all of them."""

    def along(name: str) -> int:
        value = call[name]
        sizes = value if isinstance(value, list) else [value]
        return 0 if isinstance(value, str) else int(sizes[axis % len(sizes)])

    return _weight_shape(call)[2 + axis] == 1 and along("stride") == 1 and along("padding") == 0


def _slid_over(call: Call, channel: int) -> tuple[int, ...]:
    """The axis over which a ``conv1d`` slides, where each of its results has the place of what it reads in the middle.

    Channels may lie there (ECA-Net: Wang et al., CVPR 2020, section 3.2, equation 9). A removed one then counts as the zeros
    beyond either end do, and its neighbors stay as far apart as they were.
    """
    source = call.node_of("input")
    assert source is not None
    sizes = shape_of(source.meta["val"], call.batch)[channel + 1 :], call.shape()[channel + 1 :]
    strides = call["stride"] if isinstance(call["stride"], list) else [call["stride"]]
    if not call.op.startswith("aten.conv1d.") or sizes[0] != sizes[1] or strides != [1]:
        return ()
    return (channel + 1,)


def _in_step(walk: Propagation, ids: Ids | None, groups: int, event: int) -> Ids | None:
    """Every conv group loses the same channels of its own; returns those of the first group."""
    if ids is None or groups == 1:
        return ids
    table = ids.reshape(groups, -1)
    walk.atoms.unify(table, np.broadcast_to(table[0], table.shape), event)
    first: Ids = table.min(axis=0)
    return first


def _linear(walk: Propagation, call: Call) -> Label:
    """Weight is [out, in]; channels along other axes of the input pass through."""
    x = walk.of(call, "input")
    last = len(x.shape) - 1
    event = walk.event(call, _COMBINED, x)
    walk.bind(call, "weight", 1, x.axes[last], "input", event)
    outputs = walk.made(call, "weight", 0)
    walk.produce(call, outputs)
    return _with_bias(walk, call, x, outputs, last, event)


def _addmm(walk: Propagation, call: Call) -> Label:
    """``bias + x @ weight`` with weight [in, out], as GPT-2's Conv1D is written."""
    x, shape = walk.of(call, "mat1"), call.shape()
    event = walk.event(call, _COMBINED, x)
    walk.bind(call, "mat2", 0, x.axes[1], "input", event)
    outputs = walk.made(call, "mat2", 1)
    walk.produce(call, outputs, "mat2")
    bias = walk.of(call, "self")
    if bias.shape and bias.shape[-1] > 1:
        walk.bind(call, "self", len(bias.shape) - 1, outputs, "vector", event)
    return x.at(1, outputs, shape[1]).of_shape(shape)


def _with_bias(walk: Propagation, call: Call, x: Label, outputs: Ids | None, channel: int, event: int) -> Label:
    walk.bind(call, "bias", 0, outputs, "vector", event)
    shape = call.shape()
    staying = outputs is None or bool((outputs < 0).any())
    found = x.at(channel, outputs, shape[channel])
    return Label(found.axes, shape, event if staying else -1)


def _edit_conv(call: Call, kept: Kept) -> Edited | None:
    """A conv that slides over channels needs zeros for those that are gone."""
    edited = _conv_groups(call, kept) or Edited({})
    source, weight = call.node_of("input"), call.node_of("weight")
    if source is None or weight is None:
        return edited if edited.args else None
    channel = len(source.meta["val"].shape) - len(weight.meta["val"].shape) + 1
    masks = {axis: kept.mask(source, axis) for axis in _slid_over(call, channel) if not _one_by_one(call, 0)}
    edited = replace(edited, in_place={axis: mask for axis, mask in masks.items() if not mask.all()})
    return edited if edited.args or edited.in_place else None


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


_CONV = Rule(_conv, edit=_edit_conv)
_CONV_TRANSPOSE = Rule(_conv_transpose, edit=_conv_groups)

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
    "aten.linear.default": Rule(_linear),
    "aten.addmm.default": Rule(_addmm),
}
