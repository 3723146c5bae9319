"""Element-wise operations: positions that meet go together."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from edgeprune.graph.atoms import Ids
from edgeprune.graph.labels import Label, kept
from edgeprune.graph.rules._base import Call, Rule

if TYPE_CHECKING:
    from edgeprune.graph.propagation import Propagation

_COMBINED = "it is combined with values that keep their size"


def _unary(walk: Propagation, call: Call) -> Label:
    label = walk.label(next(call.tensor_nodes()))
    return Label(label.ids, call.shape(), label.event)


def _merge(walk: Propagation, call: Call) -> Label:
    shape = call.shape()
    labels = [_aligned(walk.label(node), shape) for node in call.tensor_nodes()]
    merged = labels[0]
    for label in labels[1:]:
        merged = _combine(walk, call, merged, label, shape)
    return Label(merged.ids, shape, merged.event)


def _aligned(label: Label, shape: tuple[int, ...]) -> Label:
    missing = len(shape) - len(label.shape)
    return Label(label.ids[(None,) * missing], (1,) * missing + label.shape, label.event)


def _combine(walk: Propagation, call: Call, a: Label, b: Label, shape: tuple[int, ...]) -> Label:
    """Unify two labels under broadcasting.

    Where one tensor has length 1 it says nothing about the other's channels along that axis. If it carries channels
    itself, along another axis, the result would need two atoms per position: its own channels stay then.
    """
    stretched_a = {axis for axis, size in enumerate(shape) if size > 1 and a.shape[axis] == 1}
    stretched_b = {axis for axis, size in enumerate(shape) if size > 1 and b.shape[axis] == 1}
    if stretched_a & set(b.varied) and a.has_atoms:
        a = _pinned(walk, call, a)
    if stretched_b & set(a.varied) and b.has_atoms:
        b = _pinned(walk, call, b)
    event = walk.event(call, _COMBINED, a, b)
    sizes = tuple(max(pair) for pair in zip(a.shape, b.shape, strict=True))
    for one, other, stretched in ((a, b, stretched_a), (b, a, stretched_b)):
        if stretched & set(other.varied):
            fixed = tuple(axis for axis, size in enumerate(one.shape) if size > 1)
            whole = walk.keep_whole(other, fixed, event)
            return Label(whole.ids, sizes, whole.event)
    walk.atoms.unify(a.ids, b.ids, event)
    ids = np.minimum(_narrowed(a.ids, b.ids), _narrowed(b.ids, a.ids))
    return Label(ids, sizes, event if (ids < 0).any() else -1)


def _narrowed(ids: Ids, other: Ids) -> Ids:
    """Ids at length 1 along every axis where the other has length 1: all of them go together by now."""
    axes = tuple(axis for axis in range(ids.ndim) if other.shape[axis] == 1)
    narrowed: Ids = ids.min(axis=axes, keepdims=True)
    return narrowed


def _pinned(walk: Propagation, call: Call, label: Label) -> Label:
    event = walk.event(call, "it is broadcast over the channels of another tensor")
    walk.atoms.pin(label.ids, event)
    return kept(label.shape, event)


def _prelu(walk: Propagation, call: Call) -> Label | list[Label]:
    """One slope per channel, along axis 1."""
    x = walk.of(call, "self")
    if math.prod(walk.of(call, "weight").shape) == 1:
        return Label(x.ids, call.shape(), x.event)
    weight = walk.parameter(call, "weight")
    if weight is None:
        return walk.freeze(call, "its slopes are computed in forward")
    event = walk.event(call, _COMBINED, x)
    ids = walk.collapse(x, 1, event)
    walk.bind(weight, 0, ids, "vector", event)
    view = [1] * len(x.shape)
    view[1] = len(ids)
    return Label(ids.reshape(view), call.shape(), x.event)


_UNARY, _MERGE = Rule(_unary), Rule(_merge)

TABLE = {
    # activations
    "aten.celu.default": _UNARY,
    "aten.elu.default": _UNARY,
    "aten.gelu.default": _UNARY,
    "aten.hardshrink.default": _UNARY,
    "aten.hardsigmoid.default": _UNARY,
    "aten.hardswish.default": _UNARY,
    "aten.hardswish_.default": _UNARY,
    "aten.hardtanh.default": _UNARY,
    "aten.hardtanh_.default": _UNARY,
    "aten.leaky_relu.default": _UNARY,
    "aten.leaky_relu_.default": _UNARY,
    "aten.log_sigmoid.default": _UNARY,
    "aten.mish.default": _UNARY,
    "aten.relu.default": _UNARY,
    "aten.relu_.default": _UNARY,
    "aten.relu6.default": _UNARY,
    "aten.relu6_.default": _UNARY,
    "aten.selu.default": _UNARY,
    "aten.sigmoid.default": _UNARY,
    "aten.silu.default": _UNARY,
    "aten.silu_.default": _UNARY,
    "aten.softplus.default": _UNARY,
    "aten.softshrink.default": _UNARY,
    "aten.tanh.default": _UNARY,
    "aten.threshold.default": _UNARY,
    "aten.prelu.default": Rule(_prelu),
    # dropout
    "aten.alpha_dropout.default": _UNARY,
    "aten.dropout.default": _UNARY,
    "aten.dropout_.default": _UNARY,
    "aten.feature_dropout.default": _UNARY,
    # one tensor
    "aten.abs.default": _UNARY,
    "aten.alias.default": _UNARY,
    "aten.ceil.default": _UNARY,
    "aten.clamp.default": _UNARY,
    "aten.clamp_.default": _UNARY,
    "aten.clamp_max.default": _UNARY,
    "aten.clamp_min.default": _UNARY,
    "aten.clone.default": _UNARY,
    "aten.contiguous.default": _UNARY,
    "aten.cos.default": _UNARY,
    "aten.detach.default": _UNARY,
    "aten.detach_.default": _UNARY,
    "aten.erf.default": _UNARY,
    "aten.exp.default": _UNARY,
    "aten.expm1.default": _UNARY,
    "aten.floor.default": _UNARY,
    "aten.lift_fresh_copy.default": _UNARY,
    "aten.log.default": _UNARY,
    "aten.log1p.default": _UNARY,
    "aten.neg.default": _UNARY,
    "aten.pow.Tensor_Scalar": _UNARY,
    "aten.reciprocal.default": _UNARY,
    "aten.round.default": _UNARY,
    "aten.rsqrt.default": _UNARY,
    "aten.sign.default": _UNARY,
    "aten.sin.default": _UNARY,
    "aten.sqrt.default": _UNARY,
    "aten.square.default": _UNARY,
    "aten.to.dtype": _UNARY,
    "aten.to.dtype_layout": _UNARY,
    "aten._to_copy.default": _UNARY,
    "aten.type_as.default": _UNARY,
    "aten.add.Scalar": _UNARY,
    "aten.div.Scalar": _UNARY,
    "aten.mul.Scalar": _UNARY,
    "aten.rsub.Scalar": _UNARY,
    "aten.sub.Scalar": _UNARY,
    "aten.eq.Scalar": _UNARY,
    "aten.ge.Scalar": _UNARY,
    "aten.gt.Scalar": _UNARY,
    "aten.le.Scalar": _UNARY,
    "aten.lt.Scalar": _UNARY,
    "aten.ne.Scalar": _UNARY,
    # several tensors
    "aten.add.Tensor": _MERGE,
    "aten.add_.Tensor": _MERGE,
    "aten.addcmul.default": _MERGE,
    "aten.atan2.default": _MERGE,
    "aten.div.Tensor": _MERGE,
    "aten.div_.Tensor": _MERGE,
    "aten.eq.Tensor": _MERGE,
    "aten.ge.Tensor": _MERGE,
    "aten.gt.Tensor": _MERGE,
    "aten.le.Tensor": _MERGE,
    "aten.lerp.Scalar": _MERGE,
    "aten.lerp.Tensor": _MERGE,
    "aten.lt.Tensor": _MERGE,
    "aten.maximum.default": _MERGE,
    "aten.minimum.default": _MERGE,
    "aten.mul.Tensor": _MERGE,
    "aten.mul_.Tensor": _MERGE,
    "aten.pow.Tensor_Tensor": _MERGE,
    "aten.rsub.Tensor": _MERGE,
    "aten.sub.Tensor": _MERGE,
    "aten.sub_.Tensor": _MERGE,
    "aten.where.self": _MERGE,
}
