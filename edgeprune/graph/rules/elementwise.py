"""Element-wise operations: positions that meet go together."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from edgeprune.graph.labels import Label
from edgeprune.graph.rules._base import Call, Rule

if TYPE_CHECKING:
    from edgeprune.graph.propagation import Propagation

_COMBINED = "it is combined with values that keep their size"


def _unary(walk: Propagation, call: Call) -> Label:
    return walk.label(next(call.tensor_nodes())).of_shape(call.shape())


def _merge(walk: Propagation, call: Call) -> Label:
    labels = [walk.label(node) for node in call.tensor_nodes()]
    return walk.together(labels, call.shape(), walk.event(call, _COMBINED, *labels))


def _prelu(walk: Propagation, call: Call) -> Label:
    """One slope per channel, along axis 1."""
    x = walk.of(call, "self")
    if math.prod(walk.of(call, "weight").shape) == 1:
        return x.of_shape(call.shape())
    event = walk.event(call, _COMBINED, x)
    walk.bind(call, "weight", 0, x.axes[1], "vector", event)
    return x.of_shape(call.shape())


def _glu(walk: Propagation, call: Call) -> Label:
    """The first half of an axis, times the sigmoid of the second."""
    x = walk.of(call, "self")
    dim = call.axis("dim", len(x.shape))
    ids = x.axes[dim]
    half = x.shape[dim] // 2
    event = walk.event(call, _COMBINED, x)
    met = None if ids is None else walk.meet(ids[:half], ids[half:], event)
    return x.at(dim, met, half).of_shape(call.shape())


def _triangle(walk: Propagation, call: Call) -> Label:
    """The last two axes are told apart by position."""
    x = walk.of(call, "self")
    event = walk.event(call, f"{call.op} tells its positions apart", x)
    return walk.keep_whole(x, range(len(x.shape) - 2, len(x.shape)), event)


_UNARY, _MERGE, _TRIANGLE = Rule(_unary), Rule(_merge), Rule(_triangle)

_ACTIVATIONS = (
    "celu", "celu_", "elu", "elu_", "gelu", "gelu_", "hardshrink", "hardsigmoid", "hardsigmoid_", "hardswish", "hardswish_",
    "hardtanh", "hardtanh_", "leaky_relu", "leaky_relu_", "log_sigmoid", "mish", "mish_", "relu", "relu_", "relu6", "relu6_",
    "selu", "selu_", "sigmoid", "sigmoid_", "silu", "silu_", "softplus", "softshrink", "tanh", "tanh_", "threshold",
    "threshold_", "alpha_dropout", "dropout", "dropout_", "feature_dropout",
)  # fmt: skip
_FUNCTIONS = (
    "abs", "abs_", "acos", "alias", "asin", "atan", "ceil", "clamp", "clamp_", "clamp_max", "clamp_max_", "clamp_min",
    "clamp_min_", "clone", "contiguous", "cos", "cosh", "detach", "detach_", "erf", "erfinv", "exp", "exp2", "exp_", "expm1",
    "floor", "frac", "isfinite", "isinf", "isnan", "lift_fresh_copy", "log", "log10", "log1p", "log2", "logical_not",
    "nan_to_num", "neg", "neg_", "reciprocal", "round", "rsqrt", "sgn", "sign", "sin", "sinc", "sinh", "sqrt", "sqrt_",
    "square", "tan", "trunc", "zero_", "bitwise_not", "asinh", "atanh", "atan_", "ceil_", "cos_", "deg2rad", "digamma", "erf_",
    "erfc", "exp2_", "expm1_", "floor_", "frac_", "lgamma", "log10_", "log1p_", "log2_", "log_", "logit", "rad2deg",
    "reciprocal_", "round_", "rsqrt_", "sign_", "sin_", "square_", "tan_", "trunc_",
)  # fmt: skip
_WITH_SCALARS = (
    "add", "add_", "div", "div_", "mul", "mul_", "rsub", "sub", "sub_", "eq", "ge", "gt", "le", "lt", "ne", "fill_",
    "floor_divide", "remainder", "pow", "fmod", "pow_",
)  # fmt: skip
_OF_TENSORS = (
    "add", "add_", "sub", "sub_", "mul", "mul_", "div", "div_", "rsub", "eq", "ge", "gt", "le", "lt", "ne", "remainder", "fill_",
    "clamp", "clamp_", "clamp_max", "clamp_max_", "clamp_min", "clamp_min_", "fmod", "pow_", "xlogy",
    "bitwise_and", "bitwise_or", "__and__", "__or__", "masked_fill", "masked_fill_",
)  # fmt: skip
_OF_SEVERAL = (
    "addcdiv", "addcdiv_", "addcmul", "addcmul_", "atan2", "copy_", "floor_divide", "heaviside", "hypot", "isclose", "logaddexp",
    "logaddexp2", "logical_and", "logical_or", "logical_xor", "maximum", "minimum",
)  # fmt: skip

TABLE = {
    **{f"aten.{name}.default": _UNARY for name in _ACTIVATIONS + _FUNCTIONS},
    **{f"aten.{name}.Scalar": _UNARY for name in _WITH_SCALARS},
    **{f"aten.{name}.Tensor": _MERGE for name in _OF_TENSORS},
    **{f"aten.{name}.default": _MERGE for name in _OF_SEVERAL},
    "aten.prelu.default": Rule(_prelu),
    "aten.glu.default": Rule(_glu),
    "aten.tril.default": _TRIANGLE,
    "aten.triu.default": _TRIANGLE,
    "aten._to_copy.default": _UNARY,
    "aten.div.Scalar_mode": _UNARY,
    "aten.pow.Tensor_Scalar": _UNARY,
    "aten.to.device": _UNARY,
    "aten.to.dtype": _UNARY,
    "aten.to.dtype_layout": _UNARY,
    "aten.to.other": _UNARY,
    "aten.type_as.default": _UNARY,
    "aten.div.Tensor_mode": _MERGE,
    "aten.lerp.Scalar": _MERGE,
    "aten.lerp.Tensor": _MERGE,
    "aten.lerp_.Scalar": _MERGE,
    "aten.lerp_.Tensor": _MERGE,
    "aten.masked_fill.Scalar": _MERGE,
    "aten.masked_fill_.Scalar": _MERGE,
    "aten.max.other": _MERGE,
    "aten.min.other": _MERGE,
    "aten.pow.Tensor_Tensor": _MERGE,
    "aten.where.Scalar": _MERGE,
    "aten.where.ScalarOther": _MERGE,
    "aten.where.ScalarSelf": _MERGE,
    "aten.where.self": _MERGE,
}
