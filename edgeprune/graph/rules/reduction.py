"""Reductions drop the reduced axes; over an axis with channels they run over the kept entries only."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeprune.graph.labels import Label, kept
from edgeprune.graph.rules._base import Call, Rule

if TYPE_CHECKING:
    from edgeprune.graph.propagation import Propagation


def _reduce(walk: Propagation, call: Call) -> Label:
    label, shape = walk.of(call, "self"), call.shape()
    rank = len(label.shape)
    dims = call.arguments.get("dim")
    chosen = list(dims) if isinstance(dims, list | tuple) else [] if dims is None else [dims]
    reduced = {axis % rank for axis in chosen} or set(range(rank))
    remaining = [axis for axis in label.varied if axis not in reduced]
    if not remaining:
        return kept(shape)
    ids = label.ids
    event = walk.event(call, "it is reduced together with channels that keep their size", label)
    for axis in label.varied:
        if axis in reduced:
            ids = walk.atoms.unify_along(ids, axis, event)
    if not call.arguments.get("keepdim", False):
        ids = ids.reshape([length for axis, length in enumerate(ids.shape) if axis not in reduced])
    return Label(ids, shape, label.event)


def _softmax(walk: Propagation, call: Call) -> Label:
    label = walk.label(next(call.tensor_nodes()))
    return Label(label.ids, call.shape(), label.event)


_REDUCE, _SOFTMAX = Rule(_reduce), Rule(_softmax)

TABLE = {
    "aten.amax.default": _REDUCE,
    "aten.amin.default": _REDUCE,
    "aten.mean.default": _REDUCE,
    "aten.mean.dim": _REDUCE,
    "aten.sum.default": _REDUCE,
    "aten.sum.dim_IntList": _REDUCE,
    "aten._log_softmax.default": _SOFTMAX,
    "aten._softmax.default": _SOFTMAX,
    "aten.log_softmax.int": _SOFTMAX,
    "aten.softmax.int": _SOFTMAX,
}
