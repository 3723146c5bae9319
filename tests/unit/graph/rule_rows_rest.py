"""More rows of the test of rules, and what of all rows a perturbation tells."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from rule_rows import (
    ATEN,
    C,
    H,
    box,
    complex_pairs,
    each,
    fill_slice,
    grid,
    heads,
    line,
    positive,
    row,
    standard_weight,
    zeroed_below,
)
from torch import nn

ROWS: dict[str, tuple[Any, ...]] = {}
for _name in ["nearest", "nearest-exact", "linear"]:
    ROWS[f"{_name} of lines"] = row(lambda a, b, mode=_name: F.interpolate(line(a), scale_factor=2, mode=mode))
for _name in ["nearest", "nearest-exact", "trilinear"]:
    ROWS[f"{_name} of boxes"] = row(lambda a, b, mode=_name: F.interpolate(box(a), scale_factor=2, mode=mode))
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
    "written in place": each(
        lambda a, b: a.clamp_(b - 9, b + 9),
        lambda a, b: a.addcmul_(b, b),
        lambda a, b: a.addcdiv_(b, positive(b)),
        lambda a, b: a.lerp_(b, 0.3),
        lambda a, b: a.lerp_(b, torch.sigmoid(b)),
        lambda a, b: positive(a).pow_(b),
        lambda a, b: torch.xlogy(positive(a), positive(b)),
    ),
    "division by a scalar in a mode": row(lambda a, b: ATEN.div.Scalar_mode(a, 0.1, rounding_mode="floor")),
    "division in a mode": row(lambda a, b: torch.div(a, positive(b), rounding_mode="floor")),
    "addcdiv": row(lambda a, b: torch.addcdiv(a, a, positive(b))),
    "not": row(lambda a, b: ~(a > 0)),
    "fill with a tensor": row(lambda a, b: a + b.clone().fill_(torch.tensor(2.0))),
    "zero": row(lambda a, b: a + b.clone().zero_()),
    "write into a slice": row(fill_slice),
    "power of a scalar": row(lambda a, b: 2.0**a),
    "where with scalars": row(lambda a, b: torch.where(a > 0, 1.0, 2.0)),
    "where with a scalar": row(lambda a, b: torch.where(b > 0, a, 2.0)),
    "where with a scalar first": row(lambda a, b: torch.where(b > 0, 2.0, a)),
    "masked fill": row(lambda a, b: a.masked_fill(b > 0, 2.0)),
    "masked fill by a tensor": row(lambda a, b: a.masked_fill(b > 0, torch.tensor(2.0))),
    "masked fill in place": row(lambda a, b: a.clone().masked_fill_(b > 0, 2.0)),
    "masked fill in place by a tensor": row(lambda a, b: ATEN.masked_fill_.Tensor(a.clone(), b > 0, torch.tensor(2.0))),
    "write where a mask is": row(lambda a, b: ATEN.index_put(a, [b > 0], torch.tensor(2.0))),
    "write where its own mask is, in place": row(lambda a, b: zeroed_below(a)),
    "write at computed positions": row(
        lambda a, b: ATEN.index_put(a, [None, torch.tensor([1, 2])], b[:, 1:3]), units=0
    ),
    "glu": row(lambda a, b: F.glu(a, 1), units=C // 2),
    "glu in space": row(lambda a, b: F.glu(a, 2)),
    "lower triangle": row(lambda a, b: a.tril()),
    "upper triangle": row(lambda a, b: a.triu()),
    "upper triangle over channels": row(lambda a, b: line(a).transpose(1, 2).triu(), units=0),
    "to a device": row(lambda a, b: ATEN.to.device(a, torch.device("cpu"), torch.float64)),
    "to the kind of another": row(lambda a, b: ATEN.to.other(a, b)),
    "power": row(lambda a, b: a**3),
    "power of tensors": row(lambda a, b: positive(a) ** b),
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
    "average pool of lines": row(lambda a, b: F.avg_pool1d(line(a), 2)),
    "average pool of boxes": row(lambda a, b: F.avg_pool3d(box(a), 2)),
    "max pool of lines": row(lambda a, b: F.max_pool1d(line(a), 2)),
    "max pool of boxes": row(lambda a, b: F.max_pool3d(box(a), 2)),
    "adaptive average pool of lines": row(lambda a, b: F.adaptive_avg_pool1d(line(a), 2)),
    "adaptive average pool of boxes": row(lambda a, b: F.adaptive_avg_pool3d(box(a), 2)),
    "adaptive max pool of lines": row(lambda a, b: F.adaptive_max_pool1d(line(a), 2)),
    "adaptive max pool of boxes": row(lambda a, b: F.adaptive_max_pool3d(box(a), 2)),
    "bicubic": row(lambda a, b: F.interpolate(a, scale_factor=2, mode="bicubic")),
    "max pool with indices": row(lambda a, b: F.max_pool2d(a, 2, return_indices=True)[0]),
    "nearest exact": row(lambda a, b: F.interpolate(a, scale_factor=2, mode="nearest-exact")),
    "max pool of boxes with indices": row(lambda a, b: F.max_pool3d(box(a), 2, return_indices=True)[0]),
    "max unpool": row(lambda a, b: F.max_unpool2d(*F.max_pool2d(a, 2, return_indices=True), 2)),
    "max unpool of boxes": row(lambda a, b: F.max_unpool3d(*F.max_pool3d(box(a), 2, return_indices=True), 2)),
    "maximum over channels": row(lambda a, b: a.max(1)[0]),
    "minimum over channels": row(lambda a, b: a.min(1, keepdim=True)[0]),
    "maximum over channels and where it is": row(lambda a, b: torch.stack([x.double() for x in a.max(1)]), units=0),
    "minimum over channels and where it is": row(lambda a, b: torch.stack([x.double() for x in a.min(1)]), units=0),
    "scaled by the largest": row(lambda a, b: a / a.abs().max() - b.min()),
    "dot": row(lambda a, b: torch.dot(a.mean((0, 2, 3)), b.mean((0, 2, 3)))),
    "vdot": row(lambda a, b: torch.vdot(a.mean((0, 2, 3)), b.mean((0, 2, 3)))),
    "complex numbers": row(lambda a, b: torch.view_as_real(complex_pairs(a) * complex_pairs(b)), units=C // 2),
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
    "matrices mT": row(lambda a, b: line(a).mT),
    "matrix T": row(lambda a, b: a.mean((2, 3)).T),
    "ravel": row(lambda a, b: a.mean((0, 2, 3)).ravel()),
    "reshape as": row(lambda a, b: a.flatten(1).reshape_as(b)),
    "view as": row(lambda a, b: a.flatten(1).view_as(b)),
    "reshape as a fixed tensor": row(lambda a, b: a.mean(0).reshape(C, -1).reshape_as(torch.ones(C, H, H)), units=0),
    "broadcast": row(lambda a, b: a.mean(3, keepdim=True).broadcast_to((a.size(0), C, H, H))),
    "mul by one map that is expanded": row(lambda a, b: a * b.mean(1, keepdim=True).expand(-1, C, -1, -1)),
    "mul by one map that is repeated": row(lambda a, b: a * b.mean(1, keepdim=True).repeat(1, C, 1, 1)),
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
    "windows from channels": row(lambda a, b: F.fold(line(a), (7, 7), 2), units=2),
    "windows along an axis": row(lambda a, b: a.unfold(2, 3, 1)),
    "windows of channels": row(lambda a, b: a.unfold(1, 3, 1), units=0),
    "sampled by a grid": row(lambda a, b: F.grid_sample(a, grid(a), align_corners=False)),
    "bilinear without aliases": row(lambda a, b: F.interpolate(a, size=(3, 3), mode="bilinear", antialias=True)),
    "bicubic without aliases": row(lambda a, b: F.interpolate(a, size=(3, 3), mode="bicubic", antialias=True)),
    "einsum": row(lambda a, b: torch.einsum("nchw,ndhw->ncd", a, b)),
    "einsum over channels": row(lambda a, b: torch.einsum("nchw,nchw->nhw", a, b)),
    "einsum of heads": row(lambda a, b: torch.einsum("...hid,...hjd->...hij", heads(a), heads(b)), units=6),
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
    "lstm": row(lambda layer, a, b: layer(line(a))[0], units=0, layer=lambda: nn.LSTM(H * H, 5, batch_first=True)),
    "gru": row(lambda layer, a, b: layer(line(a))[0], units=0, layer=lambda: nn.GRU(H * H, 5, batch_first=True)),
    "rnn": row(lambda layer, a, b: layer(line(a))[0], units=0, layer=lambda: nn.RNN(H * H, 5, batch_first=True)),
    "rnn with relu": row(
        lambda layer, a, b: layer(line(a))[0],
        units=0,
        layer=lambda: nn.RNN(H * H, 5, nonlinearity="relu", batch_first=True),
    ),
    "lstm over channels": row(
        lambda layer, a, b: layer(line(a).mT)[0], layer=lambda: nn.LSTM(C, 5, 2, batch_first=True, bidirectional=True)
    ),
    "gru over channels": row(lambda layer, a, b: layer(line(a).mT)[0], layer=lambda: nn.GRU(C, 5, batch_first=True)),
    "rnn over channels": row(lambda layer, a, b: layer(line(a).mT)[0], layer=lambda: nn.RNN(C, 5, batch_first=True)),
    "lstm with projections": row(
        lambda layer, a, b: layer(line(a).mT)[0], units=0, layer=lambda: nn.LSTM(C, 5, proj_size=2, batch_first=True)
    ),
    "gru with computed weights": row(
        lambda layer, a, b: torch.gru(
            line(a).mT,
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
    "weight in standard form": row(
        lambda layer, a, b: F.conv2d(a, standard_weight(layer)), layer=lambda: nn.Conv2d(C, 5, 3)
    ),
    "conv1d along channels": row(
        lambda layer, a, b: layer(line(a).transpose(1, 2)), layer=lambda: nn.Conv1d(H * H, 4, 1)
    ),
    "conv1d over channels": row(
        lambda layer, a, b: layer(line(a).transpose(1, 2)), layer=lambda: nn.Conv1d(H * H, 4, 3, padding=1)
    ),
    "conv1d that sees fewer places than channels": row(
        lambda layer, a, b: layer(line(a).transpose(1, 2)), units=0, layer=lambda: nn.Conv1d(H * H, 4, 3)
    ),
    "conv1d with a stride over channels": row(
        lambda layer, a, b: layer(line(a).transpose(1, 2)), units=0, layer=lambda: nn.Conv1d(H * H, 4, 1, 2)
    ),
    "conv1d with padded channels": row(
        lambda layer, a, b: layer(line(a).transpose(1, 2)), units=0, layer=lambda: nn.Conv1d(H * H, 4, 1, padding=1)
    ),
    "conv1d": row(lambda layer, a, b: layer(line(a)), layer=lambda: nn.Conv1d(C, 4, 3)),
    "conv1d same": row(lambda layer, a, b: layer(line(a)), layer=lambda: nn.Conv1d(C, 4, 3, padding="same")),
    "conv2d": row(lambda layer, a, b: layer(a), layer=lambda: nn.Conv2d(C, 4, 3)),
    "conv2d same": row(lambda layer, a, b: layer(a), layer=lambda: nn.Conv2d(C, 4, 3, padding="same")),
    "conv2d transposed": row(lambda layer, a, b: layer(a), layer=lambda: nn.ConvTranspose2d(C, 4, 2)),
    "conv3d": row(lambda layer, a, b: layer(box(a)), layer=lambda: nn.Conv3d(C, 4, 1)),
    "conv3d same": row(lambda layer, a, b: layer(box(a)), layer=lambda: nn.Conv3d(C, 4, 3, padding="same")),
    "conv1d transposed": row(lambda layer, a, b: layer(line(a)), layer=lambda: nn.ConvTranspose1d(C, 4, 2)),
    "conv3d transposed": row(lambda layer, a, b: layer(box(a)), layer=lambda: nn.ConvTranspose3d(C, 4, 2)),
}

COARSE = {
    "coarse functions", "coarse, with scalars", "coarse, of two", "coarse, of two by default", "logic", "logic of bits", "not",
    "amin over space", "argmax in space", "argmin in space", "max in space", "min in space", "largest in space",
    "argsort in space", "gather of some channels", "scatter of a value", "scatter of a value in place", "division in a mode",
    "division by a scalar in a mode",
    "where with scalars", "where with a scalar first", "masked fill", "masked fill by a tensor", "masked fill in place",
    "masked fill in place by a tensor", "write where a mask is", "write where its own mask is, in place",
    "max unpool", "max unpool of boxes", "lower triangle",
    "upper triangle", "any in space", "all in space",
}  # fmt: skip
"""Such an operation may give the same value after a perturbation: nothing outside the unit may change."""

MIXING = {
    "mean over channels", "maximum over channels", "minimum over channels", "scaled by the largest", "dot", "vdot",
    "mean over everything", "conv2d", "conv2d same", "conv2d transposed",
    "conv1d", "conv1d same", "conv1d over channels", "lstm over channels", "gru over channels",
    "rnn over channels", "conv3d", "conv3d same", "conv1d transposed",
    "conv3d transposed", "layer norm over channels", "rms norm", "group norm", "group norm of one group",
    "norm over channels", "softmax over channels", "matmul over channels", "addmm",
    "expand as over channels", "normalize over channels", "logsumexp over channels", "einsum over channels",
    "einsum with a weight", "bilinear layer", "weight norm", "weight in standard form", "einsum without a result",
}  # fmt: skip
