"""Every rule row against a brute force: perturb a unit, see which positions of the output change."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edgeprune.graph.channel_graph import ChannelGraph
from edgeprune.graph.rules.table import FAMILIES
from edgeprune.graph.tracing import trace

C, H = 8, 6


class Probe(nn.Module):
    """Two convolutions, the operation, and a sum over everything (which pins nothing)."""

    def __init__(self, op: Callable[..., Any], layer: nn.Module | None) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, C, 1), nn.Conv2d(3, C, 1)
        self.op, self.layer = op, layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.result(self.a(x), self.b(x))
        return y.double().sum()

    def result(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return self.op(a, b) if self.layer is None else self.op(self.layer, a, b)


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
    "matmul": row(lambda a, b: _line(a) @ _line(b).transpose(1, 2)),
    "matmul over channels": row(lambda a, b: _line(a).transpose(1, 2) @ _line(b)),
    "matmul with a vector": row(lambda a, b: _line(a) @ b.mean((0, 1)).flatten()),
    "bmm": row(lambda a, b: torch.bmm(_line(a), _line(b).transpose(1, 2))),
    "baddbmm": row(lambda a, b: torch.baddbmm(_line(a)[:, :, :1], _line(a), _line(b).transpose(1, 2))),
    "mm": row(lambda a, b: torch.mm(a.mean((0, 3)), b.mean((0, 3)).T)),
    "mv": row(lambda a, b: torch.mv(a.mean((0, 3)), torch.ones_like(b)[0, 0, 0])),
    "addmm": row(
        lambda layer, a, b: torch.addmm(layer.bias, a.mean((2, 3)), layer.weight.T), layer=lambda: nn.Linear(C, 5)
    ),
    "attention": row(lambda a, b: F.scaled_dot_product_attention(*(_heads(x) for x in (a, a, b))), units=6),
    "attention of values": row(lambda a, b: F.scaled_dot_product_attention(*(_heads(x) for x in (b, b, a))), units=6),
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
    "gather in space": row(lambda a, b: a.gather(2, _order(b))),
    "gather": row(lambda a, b: a.gather(1, _order(b)), units=0),
    "gather of some channels": row(lambda a, b: a.gather(2, _order(b)[:, :4]), units=0),
    "scatter in space": row(lambda a, b: a.scatter(2, _order(b), b)),
    "scatter of a value": row(lambda a, b: a.scatter(2, _order(b)[:, :, :2], 7.0)),
    "scatter itself in place": row(lambda a, b: a.clone().scatter_(2, _order(b), b)),
    "scatter of a value in place": row(lambda a, b: a.clone().scatter_(3, _order(b)[..., :2], 7.0)),
    "scatter and add": row(lambda a, b: a.scatter_add(2, _order(b), b)),
    "scatter over channels": row(lambda a, b: a.scatter(1, _order(b), b), units=0),
    # no rule
    "fft": row(lambda a, b: torch.fft.fft(a, dim=1).real, units=0),
}


ATEN = torch.ops.aten


def _positive(a: torch.Tensor) -> torch.Tensor:
    return a.abs() + 0.5


def _line(a: torch.Tensor) -> torch.Tensor:
    return a.flatten(2)


def _heads(a: torch.Tensor) -> torch.Tensor:
    """Two heads of four head dimensions, the 36 positions as tokens."""
    return a.flatten(2).unflatten(1, (2, C // 2)).transpose(2, 3)


def _order(b: torch.Tensor) -> torch.Tensor:
    """Positions along an axis, the same for each channel."""
    return (torch.arange(H).flip(0).reshape(1, 1, H, 1) + torch.zeros_like(b)).long()


def _grid(a: torch.Tensor) -> torch.Tensor:
    return torch.linspace(-0.9, 0.9, 50).reshape(1, 5, 5, 2).repeat(a.size(0), 1, 1, 1).to(a)


def _weight(layer: Any) -> torch.Tensor:
    """A weight in standard form: each output's part has a variance of one."""
    weight = layer.weight.reshape(1, len(layer.weight), -1)
    return F.batch_norm(weight, None, None, training=True).reshape_as(layer.weight)


def _fill_slice(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    a = a.clone()
    a[:, :4].copy_(b[:, 4:])
    return a


def _box(a: torch.Tensor) -> torch.Tensor:
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
    return lambda a, b: op(_positive(a))


def _with_scalar(op: Any) -> Callable[..., Any]:
    return lambda a, b: op(a, 2)


def _with_positive(op: Any) -> Callable[..., Any]:
    return lambda a, b: op(a, _positive(b))


def _of_masks(op: Any) -> Callable[..., Any]:
    return lambda a, b: op(a > 0, b > 0)


_ONE = (
    "alias celu clone cos detach erf exp expm1 leaky_relu_ lift_fresh_copy log_sigmoid mish neg selu silu_ sin square _to_copy "
    "detach_ atan elu_ exp2 exp_ frac gelu_ mish_ nan_to_num sigmoid_ tan tanh_ "
    "abs_ celu_ cosh neg_ selu_ sinc sinh"
)
_ONE_COARSE = (
    "hardshrink softshrink sign sgn ceil floor round trunc hardsigmoid hardsigmoid_ hardswish_ hardtanh hardtanh_ relu6_ relu_ "
    "isfinite isinf isnan logical_not zero_"
)
ROWS |= {
    "functions": each(*map(_of_one, _named(_ONE))),
    "coarse functions": each(*map(_of_one, _named(_ONE_COARSE))),
    "functions of positive values": each(
        *map(_of_positive, _named("log log10 log1p log2 reciprocal rsqrt sqrt sqrt_"))
    ),
    "functions of small values": each(
        lambda a, b: a.tanh().acos(), lambda a, b: a.tanh().asin(), lambda a, b: (a / 9).tanh().erfinv()
    ),
    "arithmetic with scalars": each(
        *map(_with_scalar, _named("add add_ div div_ mul mul_ remainder rsub sub sub_", "Scalar"))
    ),
    "coarse, with scalars": each(*map(_with_scalar, _named("eq ge gt le lt ne floor_divide fill_", "Scalar"))),
    "arithmetic": each(*map(_with_positive, _named("add_ div div_ mul_ remainder rsub sub_", "Tensor"))),
    "arithmetic of two": each(*map(_with_positive, _named("atan2 copy_ hypot logaddexp"))),
    "coarse, of two": each(*map(_with_positive, _named("eq ge gt le lt ne clamp_max clamp_min", "Tensor"))),
    "coarse, of two by default": each(
        *map(_with_positive, _named("minimum floor_divide") + _named("max min", "other"))
    ),
    "logic": each(*map(_of_masks, _named("logical_and logical_or logical_xor"))),
    "logic of bits": each(*map(_of_masks, _named("bitwise_and bitwise_or __and__ __or__", "Tensor"))),
    "dropouts": each(
        *(lambda a, b, op=op: op(a, 0.5, False) for op in _named("dropout_ alpha_dropout feature_dropout"))
    ),
    "softmaxes": each(*(lambda a, b, op=op: op(a, 3, False) for op in _named("_softmax _log_softmax"))),
}
for _name in ["nearest", "linear"]:
    ROWS[f"{_name} of lines"] = row(lambda a, b, mode=_name: F.interpolate(_line(a), scale_factor=2, mode=mode))
for _name in ["nearest", "trilinear"]:
    ROWS[f"{_name} of boxes"] = row(lambda a, b, mode=_name: F.interpolate(_box(a), scale_factor=2, mode=mode))
for _name in ["arange.start", "arange.start_step"]:
    _overload = getattr(ATEN.arange, _name.partition(".")[2])
    ROWS[f"add of {_name}"] = row(lambda a, b, op=_overload: a + op(0, C).reshape(C, 1, 1), units=0)
for _name in ["zeros", "empty"]:
    _op = getattr(torch, _name)
    ROWS[f"add of {_name}"] = row(lambda a, b, make=_op: a + 0 * make(C, 1, 1).fill_(1), units=0)
for _name in ["new_zeros", "new_ones"]:
    ROWS[f"add of {_name}"] = row(lambda a, b, name=_name: a + getattr(b, name)((C, 1, 1)), units=0)
ROWS |= {
    "threshold": row(lambda a, b: F.threshold(a, -9, 0)),
    "clamp_": row(lambda a, b: a.clone().clamp_(-9, 9)),
    "clamp_max_": row(lambda a, b: a.clone().clamp_max_(9)),
    "threshold_": row(lambda a, b: F.threshold_(a.clone(), -9, 0)),
    "clamp_max": row(lambda a, b: ATEN.clamp_max(a, 9)),
    "clamp_min": row(lambda a, b: ATEN.clamp_min(a, -9)),
    "clamp_min_": row(lambda a, b: a.clone().clamp_min_(-9)),
    "clamp between tensors": row(lambda a, b: ATEN.clamp.Tensor(a, b - 5, b + 5)),
    "division by a scalar in a mode": row(lambda a, b: ATEN.div.Scalar_mode(a, 0.1, rounding_mode="floor")),
    "division in a mode": row(lambda a, b: torch.div(a, _positive(b), rounding_mode="floor")),
    "addcdiv": row(lambda a, b: torch.addcdiv(a, a, _positive(b))),
    "not": row(lambda a, b: ~(a > 0)),
    "fill with a tensor": row(lambda a, b: a + b.clone().fill_(torch.tensor(2.0))),
    "zero": row(lambda a, b: a + b.clone().zero_()),
    "write into a slice": row(_fill_slice),
    "power of a scalar": row(lambda a, b: 2.0**a),
    "where with scalars": row(lambda a, b: torch.where(a > 0, 1.0, 2.0)),
    "where with a scalar": row(lambda a, b: torch.where(b > 0, a, 2.0)),
    "where with a scalar first": row(lambda a, b: torch.where(b > 0, 2.0, a)),
    "masked fill": row(lambda a, b: a.masked_fill(b > 0, 2.0)),
    "masked fill by a tensor": row(lambda a, b: a.masked_fill(b > 0, torch.tensor(2.0))),
    "masked fill in place": row(lambda a, b: a.clone().masked_fill_(b > 0, 2.0)),
    "masked fill in place by a tensor": row(lambda a, b: ATEN.masked_fill_.Tensor(a.clone(), b > 0, torch.tensor(2.0))),
    "glu": row(lambda a, b: F.glu(a, 1), units=C // 2),
    "glu in space": row(lambda a, b: F.glu(a, 2)),
    "lower triangle": row(lambda a, b: a.tril()),
    "upper triangle": row(lambda a, b: a.triu()),
    "upper triangle over channels": row(lambda a, b: _line(a).transpose(1, 2).triu(), units=0),
    "to a device": row(lambda a, b: ATEN.to.device(a, torch.device("cpu"), torch.float64)),
    "to the kind of another": row(lambda a, b: ATEN.to.other(a, b)),
    "power": row(lambda a, b: a**3),
    "power of tensors": row(lambda a, b: _positive(a) ** b),
    "lerp": row(lambda a, b: torch.lerp(a, b, 0.3)),
    "lerp by a tensor": row(lambda a, b: torch.lerp(a, b, torch.sigmoid(b))),
    "addcmul": row(lambda a, b: torch.addcmul(a, a, b)),
    "to a layout": row(lambda a, b: ATEN.to.dtype_layout(a, dtype=torch.float64, layout=torch.strided)),
    "type_as": row(lambda a, b: a.type_as(b)),
    "add of full": row(lambda a, b: a + torch.full((C, 1, 1), 2.0), units=0),
    "add of new_full": row(lambda a, b: a + b.new_full((C, 1, 1), 2.0), units=0),
    "add of eye": row(lambda a, b: a + torch.eye(C)[0].reshape(C, 1, 1), units=0),
    "add of linspace": row(lambda a, b: a + torch.linspace(0, 1, C).reshape(C, 1, 1), units=0),
    "add of scalar_tensor": row(lambda a, b: a + torch.scalar_tensor(2.0)),
    "ones like": row(lambda a, b: a * torch.ones_like(b)),
    "full like": row(lambda a, b: a * torch.full_like(b, 2.0)),
    "average pool of lines": row(lambda a, b: F.avg_pool1d(_line(a), 2)),
    "average pool of boxes": row(lambda a, b: F.avg_pool3d(_box(a), 2)),
    "max pool of lines": row(lambda a, b: F.max_pool1d(_line(a), 2)),
    "max pool of boxes": row(lambda a, b: F.max_pool3d(_box(a), 2)),
    "adaptive average pool of lines": row(lambda a, b: F.adaptive_avg_pool1d(_line(a), 2)),
    "adaptive average pool of boxes": row(lambda a, b: F.adaptive_avg_pool3d(_box(a), 2)),
    "adaptive max pool of lines": row(lambda a, b: F.adaptive_max_pool1d(_line(a), 2)),
    "adaptive max pool of boxes": row(lambda a, b: F.adaptive_max_pool3d(_box(a), 2)),
    "bicubic": row(lambda a, b: F.interpolate(a, scale_factor=2, mode="bicubic")),
    "max pool with indices": row(lambda a, b: F.max_pool2d(a, 2, return_indices=True)[0]),
    "amin over space": row(lambda a, b: a.amin((2, 3))),
    "mean over everything": row(lambda a, b: a * b.mean()),
    "log softmax over space": row(lambda a, b: a.log_softmax(-1)),
    "unsafe view": row(lambda a, b: ATEN._unsafe_view(a, [a.size(0), C, H * H])),
    "concat": row(lambda a, b: ATEN.concat([a, b], 1)),
    "constant pad": row(lambda a, b: ATEN.constant_pad_nd(a, [0, 0, 0, 0, 1, 2])),
    "movedim of two axes": row(lambda a, b: a.movedim((1, 2), (2, 1))),
    "split by sizes itself": row(lambda a, b: ATEN.split.sizes(a, [1, 5, 2], 1)[1], units=C - 1),
    "squeeze of every one": row(lambda a, b: a.mean((2, 3), keepdim=True).squeeze()),
    "squeeze of two axes": row(lambda a, b: a.mean((2, 3), keepdim=True).squeeze((2, 3))),
    "matrix transpose": row(lambda a, b: a.mean((2, 3)).t()),
    "matrices mT": row(lambda a, b: _line(a).mT),
    "matrix T": row(lambda a, b: a.mean((2, 3)).T),
    "ravel": row(lambda a, b: a.mean((0, 2, 3)).ravel()),
    "reshape as": row(lambda a, b: a.flatten(1).reshape_as(b)),
    "view as": row(lambda a, b: a.flatten(1).view_as(b)),
    "reshape as a fixed tensor": row(lambda a, b: a.mean(0).reshape(C, -1).reshape_as(torch.ones(C, H, H)), units=0),
    "broadcast": row(lambda a, b: a.mean(3, keepdim=True).broadcast_to((a.size(0), C, H, H))),
    "add of a wide eye": row(lambda a, b: a + torch.eye(C, 2)[:, :1].reshape(C, 1, 1), units=0),
    "expand as": row(lambda a, b: a.mean(3, keepdim=True).expand_as(b)),
    "expand as over channels": row(lambda a, b: a / a.mean(1, keepdim=True).expand_as(a)),
    "expand as of fewer axes": row(lambda a, b: a.mean((0, 3))[:, :1].unsqueeze(2).expand_as(b)),
    "normalize": row(lambda a, b: F.normalize(a, dim=2)),
    "normalize over channels": row(lambda a, b: F.normalize(a, dim=1)),
    "swapaxes": row(lambda a, b: a.swapaxes(1, 2)),
    "swapdims": row(lambda a, b: a.swapdims(1, 3)),
    "moveaxis": row(lambda a, b: a.moveaxis(1, 3)),
    "moveaxis of two axes": row(lambda a, b: a.moveaxis((1, 2), (2, 1))),
    "variance and mean": row(lambda a, b: torch.var_mean(a, (2, 3), correction=0)[0]),
    "deviation and mean": row(lambda a, b: torch.std_mean(a, (2, 3), correction=0)[1]),
    "logsumexp over space": row(lambda a, b: a.logsumexp((2, 3))),
    "logsumexp over channels": row(lambda a, b: a.logsumexp(1)),
    "product over space": row(lambda a, b: a.prod(2)),
    "norm itself": row(lambda a, b: ATEN.norm.ScalarOpt_dim(a, 2, [2])),
    "any in space": row(lambda a, b: (a > 0).any(2)),
    "all in space": row(lambda a, b: (a > 0).all(2)),
    "windows": row(lambda a, b: F.unfold(a, 3)),
    "windows and back": row(lambda a, b: F.fold(F.unfold(a, 3, padding=1), (H, H), 3, padding=1)),
    "windows from channels": row(lambda a, b: F.fold(_line(a), (7, 7), 2), units=2),
    "windows along an axis": row(lambda a, b: a.unfold(2, 3, 1)),
    "windows of channels": row(lambda a, b: a.unfold(1, 3, 1), units=0),
    "sampled by a grid": row(lambda a, b: F.grid_sample(a, _grid(a), align_corners=False)),
    "bilinear without aliases": row(lambda a, b: F.interpolate(a, size=(3, 3), mode="bilinear", antialias=True)),
    "bicubic without aliases": row(lambda a, b: F.interpolate(a, size=(3, 3), mode="bicubic", antialias=True)),
    "einsum": row(lambda a, b: torch.einsum("nchw,ndhw->ncd", a, b)),
    "einsum over channels": row(lambda a, b: torch.einsum("nchw,nchw->nhw", a, b)),
    "einsum of heads": row(lambda a, b: torch.einsum("...hid,...hjd->...hij", _heads(a), _heads(b)), units=6),
    "einsum without a result": row(lambda a, b: torch.einsum("ij,kj", a.mean((2, 3)), b.mean((2, 3)))),
    "einsum with one": row(lambda a, b: torch.einsum("nchw->nc", a)),
    "einsum with a weight": row(
        lambda layer, a, b: torch.einsum("nchw,oc->nohw", a, layer.weight), layer=lambda: nn.Linear(C, 5)
    ),
    "einsum with a fixed tensor": row(lambda a, b: torch.einsum("nchw,c->nhw", a, torch.ones(C)), units=0),
    "bilinear layer": row(
        lambda layer, a, b: layer(a.mean((2, 3)), b.mean((2, 3))), layer=lambda: nn.Bilinear(C, C, 5)
    ),
    "weight norm": row(
        lambda layer, a, b: F.linear(a.mean((2, 3)), torch._weight_norm(layer.weight, layer.weight[:, :1], 0)),
        units=C - 1,
        layer=lambda: nn.Linear(C, 5),
    ),
    "lstm": row(lambda layer, a, b: layer(_line(a))[0], units=0, layer=lambda: nn.LSTM(H * H, 5, batch_first=True)),
    "gru": row(lambda layer, a, b: layer(_line(a))[0], units=0, layer=lambda: nn.GRU(H * H, 5, batch_first=True)),
    "rnn": row(lambda layer, a, b: layer(_line(a))[0], units=0, layer=lambda: nn.RNN(H * H, 5, batch_first=True)),
    "rnn with relu": row(
        lambda layer, a, b: layer(_line(a))[0],
        units=0,
        layer=lambda: nn.RNN(H * H, 5, nonlinearity="relu", batch_first=True),
    ),
    "lstm over channels": row(
        lambda layer, a, b: layer(_line(a).mT)[0], layer=lambda: nn.LSTM(C, 5, 2, batch_first=True, bidirectional=True)
    ),
    "gru over channels": row(lambda layer, a, b: layer(_line(a).mT)[0], layer=lambda: nn.GRU(C, 5, batch_first=True)),
    "rnn over channels": row(lambda layer, a, b: layer(_line(a).mT)[0], layer=lambda: nn.RNN(C, 5, batch_first=True)),
    "lstm with projections": row(
        lambda layer, a, b: layer(_line(a).mT)[0], units=0, layer=lambda: nn.LSTM(C, 5, proj_size=2, batch_first=True)
    ),
    "gru with computed weights": row(
        lambda layer, a, b: torch.gru(
            _line(a).mT,
            a.new_zeros(1, a.shape[0], 5),
            [weight * 2 for weight in layer.parameters()],
            True,
            1,
            0.0,
            False,
            False,
            True,
        )[0],
        units=0,
        layer=lambda: nn.GRU(C, 5),
    ),
    "lstm cell": row(lambda layer, a, b: layer(a.mean((2, 3)))[0], units=0, layer=lambda: nn.LSTMCell(C, 5)),
    "gru cell": row(lambda layer, a, b: layer(a.mean((2, 3))), units=0, layer=lambda: nn.GRUCell(C, 5)),
    "rnn cell": row(lambda layer, a, b: layer(a.mean((2, 3))), units=0, layer=lambda: nn.RNNCell(C, 5)),
    "rnn cell with relu": row(
        lambda layer, a, b: layer(a.mean((2, 3))), units=0, layer=lambda: nn.RNNCell(C, 5, nonlinearity="relu")
    ),
    "weight in standard form": row(lambda layer, a, b: F.conv2d(a, _weight(layer)), layer=lambda: nn.Conv2d(C, 5, 3)),
    "conv1d along channels": row(
        lambda layer, a, b: layer(_line(a).transpose(1, 2)), layer=lambda: nn.Conv1d(H * H, 4, 1)
    ),
    "conv1d over channels": row(
        lambda layer, a, b: layer(_line(a).transpose(1, 2)), layer=lambda: nn.Conv1d(H * H, 4, 3, padding=1)
    ),
    "conv1d that sees fewer places than channels": row(
        lambda layer, a, b: layer(_line(a).transpose(1, 2)), units=0, layer=lambda: nn.Conv1d(H * H, 4, 3)
    ),
    "conv1d with a stride over channels": row(
        lambda layer, a, b: layer(_line(a).transpose(1, 2)), units=0, layer=lambda: nn.Conv1d(H * H, 4, 1, 2)
    ),
    "conv1d with padded channels": row(
        lambda layer, a, b: layer(_line(a).transpose(1, 2)), units=0, layer=lambda: nn.Conv1d(H * H, 4, 1, padding=1)
    ),
    "conv1d": row(lambda layer, a, b: layer(_line(a)), layer=lambda: nn.Conv1d(C, 4, 3)),
    "conv1d same": row(lambda layer, a, b: layer(_line(a)), layer=lambda: nn.Conv1d(C, 4, 3, padding="same")),
    "conv2d": row(lambda layer, a, b: layer(a), layer=lambda: nn.Conv2d(C, 4, 3)),
    "conv2d same": row(lambda layer, a, b: layer(a), layer=lambda: nn.Conv2d(C, 4, 3, padding="same")),
    "conv2d transposed": row(lambda layer, a, b: layer(a), layer=lambda: nn.ConvTranspose2d(C, 4, 2)),
    "conv3d": row(lambda layer, a, b: layer(_box(a)), layer=lambda: nn.Conv3d(C, 4, 1)),
    "conv3d same": row(lambda layer, a, b: layer(_box(a)), layer=lambda: nn.Conv3d(C, 4, 3, padding="same")),
    "conv1d transposed": row(lambda layer, a, b: layer(_line(a)), layer=lambda: nn.ConvTranspose1d(C, 4, 2)),
    "conv3d transposed": row(lambda layer, a, b: layer(_box(a)), layer=lambda: nn.ConvTranspose3d(C, 4, 2)),
}

COARSE = {
    "coarse functions", "coarse, with scalars", "coarse, of two", "coarse, of two by default", "logic", "logic of bits", "not",
    "amin over space", "argmax in space", "argmin in space", "max in space", "min in space", "largest in space",
    "argsort in space", "gather of some channels", "scatter of a value", "scatter of a value in place", "division in a mode",
    "division by a scalar in a mode",
    "where with scalars", "where with a scalar first", "masked fill", "masked fill by a tensor", "masked fill in place",
    "masked fill in place by a tensor", "lower triangle", "upper triangle", "any in space", "all in space",
}  # fmt: skip
"""Such an operation may give the same value after a perturbation: nothing outside the unit may change."""

MIXING = {
    "mean over channels", "mean over everything", "conv2d", "conv2d same", "conv2d transposed",
    "conv1d", "conv1d same", "conv1d over channels", "lstm over channels", "gru over channels",
    "rnn over channels", "conv3d", "conv3d same", "conv1d transposed",
    "conv3d transposed", "layer norm over channels", "rms norm", "group norm", "group norm of one group",
    "norm over channels", "softmax over channels", "matmul over channels", "addmm",
    "expand as over channels", "normalize over channels", "logsumexp over channels", "einsum over channels",
    "einsum with a weight", "bilinear layer", "weight norm", "weight in standard form", "einsum without a result",
}  # fmt: skip
"""Such an operation runs over what is kept: a unit reaches every result and none is labeled with it."""


@pytest.mark.parametrize("name", ROWS)
def test_a_unit_is_exactly_what_a_perturbation_reaches(name: str) -> None:
    probe, graph = _traced(name)
    units = ROWS[name][1]
    input_codes = {"a": graph.unit_of["conv2d"][1], "b": graph.unit_of["conv2d_1"][1]}
    free = sorted(set(input_codes["a"].ravel().tolist()) - {-1})
    assert len(free) == units
    total = next(n for n in graph.program.graph.nodes if n.op == "output").args[0][0]
    result = total.args[0].args[0]
    output_codes = graph.unit_of[result.name]
    for unit in free:
        changed = _changed(probe, {k: (codes == unit).any(axis=0) for k, codes in input_codes.items()})
        expected = torch.zeros(changed.shape, dtype=torch.bool)
        for axis, codes in enumerate(output_codes):
            view = [1] * changed.ndim
            view[axis] = -1
            expected |= torch.from_numpy((codes == unit).any(axis=0)).reshape(view)
        if name in COARSE:
            assert not (changed & ~expected).any(), f"unit {unit}"
        elif name not in MIXING and (name not in ("attention", "einsum of heads") or expected.any()):
            # A head dimension of the queries reaches every result of its head, and none is labeled with it.
            assert torch.equal(changed, expected), f"unit {unit}"


@cache
def _traced(name: str) -> tuple[Probe, ChannelGraph]:
    op, _, make_layer = ROWS[name]
    probe = Probe(op, make_layer() if make_layer else None).eval()
    return probe, trace(probe, torch.randn(2, 3, H, H))


def _changed(probe: Probe, perturbed: dict[str, Any]) -> torch.Tensor:
    """Positions of the result that change for any of several large perturbations of some channels."""
    changed = None
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        values = {k: torch.randn(2, C, H, H, generator=generator, dtype=torch.float64) for k in "ab"}
        moved = {}
        for key, value in values.items():
            noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            mask = torch.from_numpy(perturbed[key]).reshape(1, C, 1, 1)
            moved[key] = value + mask * (noise + 0.7)
        with torch.no_grad():
            before = probe.double().result(**values)
            after = probe.double().result(**moved)
        probe.float()
        now = before != after
        changed = now if changed is None else changed | now
    assert changed is not None
    return changed


def test_every_rule_has_a_row() -> None:
    graphs = [_traced(name)[1] for name in ROWS]
    seen = {str(node.target) for graph in graphs for node in graph.program.graph.nodes if node.op == "call_function"}
    assert {name for family in FAMILIES for name in family.TABLE} - seen == set()


def test_every_rule_is_found_by_the_name_that_torch_prints() -> None:
    names = [name for family in FAMILIES for name in family.TABLE]
    assert len(names) == len(set(names))
    for name in names:
        space, packet, overload = name.split(".")
        assert hasattr(getattr(getattr(torch.ops, space), packet), overload), name
