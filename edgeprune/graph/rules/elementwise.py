"""Element-wise operations: positions that meet go together."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from edgeprune.graph.atoms import Ids
from edgeprune.graph.labels import Label
from edgeprune.graph.rules._base import Call, Rule

if TYPE_CHECKING:
    from edgeprune.graph.propagation import Propagation

_COMBINED = "it is combined with values that keep their size"


def _unary(walk: Propagation, call: Call) -> Label:
    return walk.label(next(call.tensor_nodes())).of_shape(call.shape())


def _merge(walk: Propagation, call: Call) -> Label:
    """Axis by axis under broadcasting: a tensor of length 1 along an axis says nothing about the others' channels."""
    shape = call.shape()
    labels = [walk.label(node) for node in call.tensor_nodes()]
    event = walk.event(call, _COMBINED, *labels)
    axes: list[Ids | None] = []
    lost = False
    for axis, size in enumerate(shape):
        places = [(label, axis - len(shape) + len(label.shape)) for label in labels]
        meeting = [label.axes[own] for label, own in places if own >= 0 and (label.shape[own] > 1 or size == 1)]
        ids = meeting[0] if meeting else None
        for other in meeting[1:]:
            ids = walk.meet(ids, other, event)
        axes.append(ids)
        lost = lost or (ids is None and any(other is not None for other in meeting))
    return Label(tuple(axes), shape, event if lost else max(label.event for label in labels))


def _prelu(walk: Propagation, call: Call) -> Label:
    """One slope per channel, along axis 1."""
    x = walk.of(call, "self")
    if math.prod(walk.of(call, "weight").shape) == 1:
        return x.of_shape(call.shape())
    event = walk.event(call, _COMBINED, x)
    walk.bind(call, "weight", 0, x.axes[1], "vector", event)
    return x.of_shape(call.shape())


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
