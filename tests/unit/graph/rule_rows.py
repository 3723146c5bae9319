"""Rows of the test of rules: functions of torch, and operations by their names, each with the units that it must leave free."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

C, H = 8, 6


def row(op: Callable[..., Any], units: int = C, layer: Callable[[], nn.Module] | None = None) -> tuple[Any, ...]:
    return op, units, layer


ROWS: dict[str, tuple[Any, ...]] = {
    # element-wise; `units` is how many units of the channels of `a` must be free
    "relu": row(lambda a, b: F.relu(a)),
    "hardswish": row(lambda a, b: F.hardswish(a)),
    "silu": row(lambda a, b: F.silu(a)),
    "gelu": row(lambda a, b: F.gelu(a)),
    "elu": row(lambda a, b: F.elu(a)),
    "clamp": row(lambda a, b: a.clamp(-5, 5)),
    "relu6": row(lambda a, b: F.relu6(a + 2)),
    "leaky_relu": row(lambda a, b: F.leaky_relu(a, 0.1)),
    "sigmoid": row(lambda a, b: torch.sigmoid(a)),
    "tanh": row(lambda a, b: torch.tanh(a)),
    "softplus": row(lambda a, b: F.softplus(a)),
    "dropout": row(lambda a, b: F.dropout(a, 0.5, training=False)),
    "prelu": row(lambda layer, a, b: layer(a), layer=lambda: nn.PReLU(C)),
    "prelu of one slope": row(lambda layer, a, b: layer(a), layer=nn.PReLU),
    "prelu of computed slopes": row(lambda layer, a, b: F.prelu(a, layer.weight.abs()), layer=lambda: nn.PReLU(C)),
    "prelu of one computed slope": row(lambda layer, a, b: F.prelu(a, layer.weight.abs()), layer=nn.PReLU),
    "add": row(lambda a, b: a + b),
    "sub": row(lambda a, b: a - b),
    "mul": row(lambda a, b: a * b),
    "maximum": row(lambda a, b: torch.maximum(a, b)),
    "where": row(lambda a, b: torch.where(a > 0, a, b)),
    "add of a scalar": row(lambda a, b: 2 + a),
    "mul by pooled": row(lambda a, b: a * b.mean((2, 3), keepdim=True)),
    "mul by another rank": row(lambda a, b: a * b.mean((0, 2, 3)).reshape(C, 1, 1)),
    "mul by one map": row(lambda a, b: a * b.mean(1, keepdim=True)),
    "add of one channel": row(lambda a, b: a[:, :1] + b, units=C - 1),
    "add of a fixed tensor": row(lambda a, b: a + torch.arange(C).reshape(C, 1, 1), units=0),
    "add of a fixed map": row(lambda a, b: a + torch.arange(H)),
    "outer product": row(lambda a, b: a.mean((2, 3)).unsqueeze(1) * b.mean((2, 3)).unsqueeze(2)),
    # normalization
    "batch norm": row(lambda layer, a, b: layer(a), layer=lambda: nn.BatchNorm2d(C)),
    "batch norm without affine": row(lambda layer, a, b: layer(a), layer=lambda: nn.BatchNorm2d(C, affine=False)),
    "instance norm": row(lambda layer, a, b: layer(a), layer=lambda: nn.InstanceNorm2d(C, affine=True)),
    "instance norm with running statistics": row(
        lambda layer, a, b: layer(a), layer=lambda: nn.InstanceNorm2d(C, track_running_stats=True)
    ),
    "linear along another axis": row(lambda layer, a, b: layer(a), layer=lambda: nn.Linear(H, 5)),
    # pooling and resizing
    "max pool": row(lambda a, b: F.max_pool2d(a, 2)),
    "average pool": row(lambda a, b: F.avg_pool2d(a, 3, 1)),
    "adaptive average pool": row(lambda a, b: F.adaptive_avg_pool2d(a, 2)),
    "adaptive max pool": row(lambda a, b: F.adaptive_max_pool2d(a, 2)),
    "nearest": row(lambda a, b: F.interpolate(a, scale_factor=2)),
    "bilinear": row(lambda a, b: F.interpolate(a, size=(9, 9), mode="bilinear")),
    "pool over channels": row(lambda a, b: F.max_pool1d(a.mean((2, 3)).unsqueeze(1), 2), units=0),
    # reductions
    "mean over space": row(lambda a, b: a.mean((2, 3))),
    "sum over space": row(lambda a, b: a.sum((-1, -2), keepdim=True)),
    "amax over space": row(lambda a, b: a.amax((2, 3))),
    "mean over channels": row(lambda a, b: a.mean(1)),
    "softmax over space": row(lambda a, b: a.softmax(-1)),
    # data movement
    "flatten": row(lambda a, b: a.flatten(1)),
    "view": row(lambda a, b: a.view(a.size(0), -1)),
    "view in pairs": row(lambda a, b: a.view(a.size(0), 2, C // 2, H, H), units=C // 2),
    "view with channels beside the batch": row(lambda a, b: a.view(a.size(0) * 4, C // 4, H, H), units=C // 4),
    "view without a batch": row(lambda a, b: a.view(-1), units=0),
    "permute": row(lambda a, b: a.permute(0, 2, 3, 1)),
    "transpose": row(lambda a, b: a.transpose(1, 2).contiguous()),
    "movedim": row(lambda a, b: a.movedim(1, -1)),
    "squeeze": row(lambda a, b: a.mean((2, 3), keepdim=True).squeeze(3)),
    "unsqueeze": row(lambda a, b: a.unsqueeze(1)),
    "expand": row(lambda a, b: a.mean(3, keepdim=True).expand(-1, -1, -1, 5)),
    "unflatten": row(lambda a, b: a.unflatten(3, (2, 3))),
    "cat": row(lambda a, b: torch.cat([a, b], 1)),
    "cat of one with itself": row(lambda a, b: torch.cat([a, b, a], 1)),
    "cat in space": row(lambda a, b: torch.cat([a, b], 2)),
    "cat with a fixed tensor": row(lambda a, b: torch.cat([a, torch.ones(a.size(0), 2, H, H), b], 1)),
    "stack": row(lambda a, b: torch.stack([a, b], 1)),
    "slice": row(lambda a, b: a[:, 2:5]),
    "slice in space": row(lambda a, b: a[:, :, ::2, 1:]),
    "slice with a step": row(lambda a, b: torch.cat([a[:, 1::2], a[:, :7:2]], 1), units=C // 2),
    "slice with a step that does not fit": row(lambda a, b: a[:, ::3], units=0),
    "slice with a step of another start": row(lambda a, b: a[:, 3::2], units=0),
    "select": row(lambda a, b: a[:, 3], units=C - 1),
    "select in space": row(lambda a, b: a[:, :, 3]),
    "narrow": row(lambda a, b: a.narrow(1, 3, 4)),
    "chunk": row(lambda a, b: torch.cat(a.chunk(3, 1)[::-1], 1)),
    "split": row(lambda a, b: torch.cat([a.split(3, 1)[2], b], 1)),
    "split in sizes": row(lambda a, b: a.split([1, 5, 2], 1)[1], units=C - 1),
    "chunk and multiply": row(lambda a, b: a.chunk(2, 1)[0] * a.chunk(2, 1)[1], units=C // 2),
    "unbind": row(lambda a, b: a.unbind(2)[1]),
    "pad": row(lambda a, b: F.pad(a, (0, 0, 0, 0, 3, 1))),
    "pad by reflection": row(lambda a, b: F.pad(a, (1, 1, 2, 2), mode="reflect")),
    "flip": row(lambda a, b: a.flip(1)),
    "roll in space": row(lambda a, b: a.roll(2, 3)),
    "roll": row(lambda a, b: a.roll(2, 1), units=0),
    "repeat": row(lambda a, b: a.repeat(1, 3, 1, 1)),
    "pixel shuffle": row(lambda a, b: F.pixel_shuffle(a, 2), units=2),
    "pixel unshuffle": row(lambda a, b: F.pixel_unshuffle(a, 2)),
    "channel shuffle": row(lambda a, b: F.channel_shuffle(a, 2), units=C // 2),
    "zeros like": row(lambda a, b: a + torch.zeros_like(b)),
    # over an axis, the last axes, or the channels of a group
    "layer norm over channels": row(
        lambda layer, a, b: layer(a.movedim(1, -1)), layer=lambda: nn.LayerNorm(C, elementwise_affine=True)
    ),
    "layer norm over space": row(lambda layer, a, b: layer(a), layer=lambda: nn.LayerNorm((H, H))),
    "rms norm": row(lambda layer, a, b: layer(a.movedim(1, -1)), layer=lambda: nn.RMSNorm(C)),
    "group norm": row(lambda layer, a, b: layer(a), units=C // 2, layer=lambda: nn.GroupNorm(2, C)),
    "group norm of one group": row(lambda layer, a, b: layer(a), layer=lambda: nn.GroupNorm(1, C)),
    "variance over space": row(lambda a, b: a.var((2, 3))),
    "variance with a correction": row(lambda a, b: a.var((2, 3), correction=0)),
    "deviation with a correction": row(lambda a, b: a.std((2, 3), correction=0)),
    "deviation over space": row(lambda a, b: a.std((2, 3), keepdim=True)),
    "norm over space": row(lambda a, b: torch.linalg.vector_norm(a, dim=(2, 3))),
    "norm over channels": row(lambda a, b: torch.linalg.vector_norm(a, dim=1)),
    "softmax over channels": row(lambda a, b: a.softmax(1)),
    # products of two computed tensors
    "matmul": row(lambda a, b: line(a) @ line(b).transpose(1, 2)),
    "matmul over channels": row(lambda a, b: line(a).transpose(1, 2) @ line(b)),
    "matmul with a vector": row(lambda a, b: line(a) @ b.mean((0, 1)).flatten()),
    "bmm": row(lambda a, b: torch.bmm(line(a), line(b).transpose(1, 2))),
    "baddbmm": row(lambda a, b: torch.baddbmm(line(a)[:, :, :1], line(a), line(b).transpose(1, 2))),
    "mm": row(lambda a, b: torch.mm(a.mean((0, 3)), b.mean((0, 3)).T)),
    "mv": row(lambda a, b: torch.mv(a.mean((0, 3)), torch.ones_like(b)[0, 0, 0])),
    "addmm": row(
        lambda layer, a, b: torch.addmm(layer.bias, a.mean((2, 3)), layer.weight.T), layer=lambda: nn.Linear(C, 5)
    ),
    "attention": row(lambda a, b: F.scaled_dot_product_attention(*(heads(x) for x in (a, a, b))), units=6),
    "attention of values": row(lambda a, b: F.scaled_dot_product_attention(*(heads(x) for x in (b, b, a))), units=6),
    # positions that are computed
    "cumsum": row(lambda a, b: a.cumsum(1), units=0),
    "cumsum in space": row(lambda a, b: a.cumsum(2)),
    "sort": row(lambda a, b: a.sort(1)[0], units=0),
    "sort in space": row(lambda a, b: a.sort(2)[0]),
    "largest in space": row(lambda a, b: a.topk(2, 3)[0]),
    "max in space": row(lambda a, b: a.max(2)[0]),
    "min in space": row(lambda a, b: a.min(3, keepdim=True)[0]),
    "argmax in space": row(lambda a, b: a.argmax(2).float()),
    "argmin in space": row(lambda a, b: a.argmin(2).float()),
    "index select in space": row(lambda a, b: a.index_select(2, torch.tensor([3, 1, 1]))),
    "index select": row(lambda a, b: a.index_select(1, torch.tensor([3, 1, 1])), units=0),
    "index in space": row(lambda a, b: a[:, :, torch.tensor([[0, 1], [2, 2]])]),
    "index of two axes": row(lambda a, b: a[:, :, torch.tensor([0, 1]), torch.tensor([2, 3])]),
    "index of axes apart": row(lambda a, b: a.movedim(1, 2)[:, torch.tensor([0, 1]), :, torch.tensor([2, 3])]),
    "embedding": row(
        lambda layer, a, b: a * layer(torch.arange(H)).T.reshape(C, 1, H), layer=lambda: nn.Embedding(9, C)
    ),
    "repeat interleave": row(lambda a, b: a.repeat_interleave(3, dim=1)),
    "repeat interleave in space": row(lambda a, b: a.repeat_interleave(3, dim=2)),
    "differences": row(lambda a, b: a.diff(dim=2)),
    "cumprod": row(lambda a, b: a.cumprod(1), units=0),
    "argsort in space": row(lambda a, b: a.argsort(2).float()),
    "gather in space": row(lambda a, b: a.gather(2, order(b))),
    "gather": row(lambda a, b: a.gather(1, order(b)), units=0),
    "gather of some channels": row(lambda a, b: a.gather(2, order(b)[:, :4]), units=0),
    "scatter in space": row(lambda a, b: a.scatter(2, order(b), b)),
    "scatter of a value": row(lambda a, b: a.scatter(2, order(b)[:, :, :2], 7.0)),
    "scatter itself in place": row(lambda a, b: a.clone().scatter_(2, order(b), b)),
    "scatter of a value in place": row(lambda a, b: a.clone().scatter_(3, order(b)[..., :2], 7.0)),
    "scatter and add": row(lambda a, b: a.scatter_add(2, order(b), b)),
    "scatter over channels": row(lambda a, b: a.scatter(1, order(b), b), units=0),
    # no rule
    "fft": row(lambda a, b: torch.fft.fft(a, dim=1).abs(), units=0),
}


ATEN = torch.ops.aten


def positive(a: torch.Tensor) -> torch.Tensor:
    return a.abs() + 0.5


def line(a: torch.Tensor) -> torch.Tensor:
    return a.flatten(2)


def heads(a: torch.Tensor) -> torch.Tensor:
    """Two heads of four head dimensions, the 36 positions as tokens."""
    return a.flatten(2).unflatten(1, (2, C // 2)).transpose(2, 3)


def order(b: torch.Tensor) -> torch.Tensor:
    """Positions along an axis, the same for each channel."""
    return (torch.arange(H).flip(0).reshape(1, 1, H, 1) + torch.zeros_like(b)).long()


def grid(a: torch.Tensor) -> torch.Tensor:
    return torch.linspace(-0.9, 0.9, 50).reshape(1, 5, 5, 2).repeat(a.size(0), 1, 1, 1).to(a)


def standard_weight(layer: Any) -> torch.Tensor:
    """A weight in standard form: each output's part has a variance of one."""
    weight = layer.weight.reshape(1, len(layer.weight), -1)
    return F.batch_norm(weight, None, None, training=True).reshape_as(layer.weight)


def fill_slice(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    a = a.clone()
    a[:, :4].copy_(b[:, 4:])
    return a


def complex_pairs(a: torch.Tensor) -> torch.Tensor:
    """Two channels side by side are the parts of a complex number."""
    return torch.view_as_complex(a.unflatten(1, (C // 2, 2)).movedim(2, -1).contiguous())


def zeroed_below(a: torch.Tensor) -> torch.Tensor:
    a = a.clone()
    a[a < 0] = 0
    return a


def box(a: torch.Tensor) -> torch.Tensor:
    return a.unsqueeze(2).repeat(1, 1, 2, 1, 1)


# The rest of the tables, by the operation itself where no function of torch leads to it; several share a trace.
def each(*calls: Callable[..., Any]) -> tuple[Any, ...]:
    """The results of several operations side by side."""
    return row(lambda a, b: torch.stack([call(a.clone(), b).to(a.dtype) for call in calls]))


def _named(names: str, overload: str = "default") -> list[Any]:
    return [getattr(getattr(ATEN, name), overload) for name in names.split()]


def _of_one(op: Any) -> Callable[..., Any]:
    return lambda a, b: op(a)


def _of_positive(op: Any) -> Callable[..., Any]:
    return lambda a, b: op(positive(a))


def _with_scalar(op: Any) -> Callable[..., Any]:
    return lambda a, b: op(a, 2)


def _with_positive(op: Any) -> Callable[..., Any]:
    return lambda a, b: op(a, positive(b))


def _of_masks(op: Any) -> Callable[..., Any]:
    return lambda a, b: op(a > 0, b > 0)


_ONE = (
    "alias celu clone cos detach erf exp expm1 leaky_relu_ lift_fresh_copy log_sigmoid mish neg selu silu_ sin square _to_copy "
    "detach_ atan elu_ exp2 exp_ frac gelu_ mish_ nan_to_num sigmoid_ tan tanh_ "
    "abs_ celu_ cosh neg_ selu_ sinc sinh asinh deg2rad rad2deg erfc atan_ cos_ erf_ exp2_ expm1_ frac_ sin_ square_ tan_"
)
_POSITIVE = (
    "log log10 log1p log2 reciprocal rsqrt sqrt sqrt_ lgamma digamma log10_ log1p_ log2_ log_ reciprocal_ rsqrt_"
)
_ONE_COARSE = (
    "hardshrink softshrink sign sgn ceil floor round trunc hardsigmoid hardsigmoid_ hardswish_ hardtanh hardtanh_ relu6_ relu_ "
    "isfinite isinf isnan logical_not zero_ ceil_ floor_ round_ sign_ trunc_"
)
ROWS |= {
    "functions": each(*map(_of_one, _named(_ONE))),
    "coarse functions": each(*map(_of_one, _named(_ONE_COARSE))),
    "functions of positive values": each(*map(_of_positive, _named(_POSITIVE))),
    "functions of small values": each(
        lambda a, b: a.tanh().acos(),
        lambda a, b: a.tanh().asin(),
        lambda a, b: (a / 9).tanh().erfinv(),
        lambda a, b: (a / 9).tanh().atanh(),
        lambda a, b: (a / 9).sigmoid().logit(),
    ),
    "arithmetic with scalars": each(
        *map(_with_scalar, _named("add add_ div div_ fmod mul mul_ pow_ remainder rsub sub sub_", "Scalar"))
    ),
    "coarse, with scalars": each(*map(_with_scalar, _named("eq ge gt le lt ne floor_divide fill_", "Scalar"))),
    "arithmetic": each(*map(_with_positive, _named("add_ div div_ fmod mul_ remainder rsub sub_", "Tensor"))),
    "arithmetic of two": each(*map(_with_positive, _named("atan2 copy_ hypot logaddexp logaddexp2"))),
    "coarse, of two": each(
        *map(_with_positive, _named("eq ge gt le lt ne clamp_max clamp_max_ clamp_min clamp_min_", "Tensor"))
    ),
    "coarse, of two by default": each(
        *map(_with_positive, _named("minimum floor_divide heaviside isclose") + _named("max min", "other"))
    ),
    "logic": each(*map(_of_masks, _named("logical_and logical_or logical_xor"))),
    "logic of bits": each(*map(_of_masks, _named("bitwise_and bitwise_or __and__ __or__", "Tensor"))),
    "dropouts": each(
        *(lambda a, b, op=op: op(a, 0.5, False) for op in _named("dropout_ alpha_dropout feature_dropout"))
    ),
    "softmaxes": each(*(lambda a, b, op=op: op(a, 3, False) for op in _named("_softmax _log_softmax"))),
}
