"""Reductions drop the reduced axes; over an axis with channels they run over the kept entries only."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING

from edgeprune.graph.labels import Label, kept
from edgeprune.graph.rules._base import Call, Rule

if TYPE_CHECKING:
    from edgeprune.graph.propagation import Propagation


def _reduce(walk: Propagation, call: Call) -> Label | list[Label]:
    label = walk.label(next(call.tensor_nodes()))
    rank = len(label.shape)
    dims = call.arguments.get("dim")
    chosen = list(dims) if isinstance(dims, list | tuple) else [] if dims is None else [dims]
    reduced = {axis % rank for axis in chosen} or set(range(rank))
    if isinstance(call.node.meta["val"], list | tuple):
        return [_reduced(call, label, reduced, shape) for shape in call.shapes()]
    return _reduced(call, label, reduced, call.shape())


def _reduced(call: Call, label: Label, reduced: set[int], shape: tuple[int, ...]) -> Label:
    if not shape:
        return kept(shape)
    if not call.arguments.get("keepdim", False):
        return label.without(*reduced).of_shape(shape)
    for axis in reduced:
        label = label.at(axis, None, 1)
    return label.of_shape(shape)


def _softmax(walk: Propagation, call: Call) -> Label:
    return walk.label(next(call.tensor_nodes())).of_shape(call.shape())


def _by_position(walk: Propagation, call: Call) -> Label | list[Label]:
    """Positions along one axis are told apart (a running sum, an index, an order): all of that axis stays."""
    label = walk.label(next(call.tensor_nodes()))
    rank = len(label.shape)
    dim = call.arguments.get("dim")
    axes = tuple(range(rank)) if dim is None else (int(call["dim"]) % max(rank, 1),)
    event = walk.event(call, f"{call.op} tells its positions apart", label)
    label = walk.keep_whole(label, axes if rank else (), event)

    def shaped(shape: tuple[int, ...]) -> Label:
        return label.of_shape(shape) if len(shape) == rank else label.without(*axes).of_shape(shape)

    if isinstance(call.node.meta["val"], list | tuple):
        return [shaped(shape) for shape in call.shapes()]
    return shaped(call.shape())


def _extreme(walk: Propagation, call: Call) -> Label | list[Label]:
    """``max`` and ``min`` along an axis: over the kept entries, unless somebody asks at which position it is."""
    asked = any(user.target is not operator.getitem or (user.args[1] == 1 and user.users) for user in call.node.users)
    return _by_position(walk, call) if asked else _reduce(walk, call)


_REDUCE, _SOFTMAX, _BY_POSITION, _EXTREME = Rule(_reduce), Rule(_softmax), Rule(_by_position), Rule(_extreme)

TABLE = {
    "aten.amax.default": _REDUCE,
    "aten.amin.default": _REDUCE,
    "aten.max.default": _REDUCE,
    "aten.min.default": _REDUCE,
    "aten.max.dim": _EXTREME,
    "aten.min.dim": _EXTREME,
    "aten.mean.default": _REDUCE,
    "aten.mean.dim": _REDUCE,
    "aten.sum.default": _REDUCE,
    "aten.sum.dim_IntList": _REDUCE,
    "aten.std.correction": _REDUCE,
    "aten.std.dim": _REDUCE,
    "aten.var.correction": _REDUCE,
    "aten.var.dim": _REDUCE,
    "aten.std_mean.correction": _REDUCE,
    "aten.var_mean.correction": _REDUCE,
    "aten.logsumexp.default": _REDUCE,
    "aten.norm.ScalarOpt_dim": _REDUCE,
    "aten.prod.dim_int": _REDUCE,
    "aten.any.dim": _REDUCE,
    "aten.all.dim": _REDUCE,
    "aten.linalg_vector_norm.default": _REDUCE,
    "aten._log_softmax.default": _SOFTMAX,
    "aten._softmax.default": _SOFTMAX,
    "aten.log_softmax.int": _SOFTMAX,
    "aten.softmax.int": _SOFTMAX,
    "aten.cumsum.default": _BY_POSITION,
    "aten.diff.default": _BY_POSITION,
    "aten.cumprod.default": _BY_POSITION,
    "aten.argsort.default": _BY_POSITION,
    "aten.argmax.default": _BY_POSITION,
    "aten.argmin.default": _BY_POSITION,
    "aten.sort.default": _BY_POSITION,
    "aten.topk.default": _BY_POSITION,
}
