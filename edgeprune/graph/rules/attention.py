"""Products of two computed tensors: matmul and its kin, and scaled dot-product attention.

Axes that both have (batch, heads) go together and stay in the result; contracted axes (head dimensions) go together;
each of the others passes through. Both the heads and the head dimensions of an attention can be removed.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from edgeprune.graph.atoms import Ids
from edgeprune.graph.labels import Label
from edgeprune.graph.rules._base import Call, Edited, Kept, Rule

if TYPE_CHECKING:
    from edgeprune.graph.propagation import Propagation

_COMBINED = "it is multiplied with values that keep their size"


def _matmul(walk: Propagation, call: Call) -> Label:
    """[..., n, k] x [..., k, m], with the broadcasting of ``torch.matmul``; vectors have no n or m."""
    nodes = list(call.tensor_nodes())[-2:]
    one, other = (walk.label(node) for node in nodes)
    shape = call.shape()
    event = walk.event(call, _COMBINED, one, other)
    rows = len(one.shape) > 1
    columns = len(other.shape) > 1
    contracted = walk.meet(one.axes[-1], other.axes[-2 if columns else 0], event)
    leading = _leading(one, 1 + rows), _leading(other, 1 + columns)
    batch = walk.together(leading, shape[: len(shape) - rows - columns], event).axes
    free = [*([one.axes[-2]] if rows else []), *([other.axes[-1]] if columns else [])]
    if any(ids is not None for ids in batch):
        for ids in batch:
            walk.mark(ids, "head")
        for ids in (contracted, *free):
            walk.mark(ids, "head dimension")
    found = Label((*batch, *free), shape, event if contracted is None else max(one.event, other.event))
    return walk.together([found, walk.of(call, "self")], shape, event) if call.op == "aten.baddbmm.default" else found


def _leading(label: Label, last: int) -> Label:
    """A label without its last axes."""
    return label.without(*range(len(label.shape) - last, len(label.shape)))


def _attention(walk: Propagation, call: Call) -> Label | list[Label]:
    """query [..., H, L, E], key [..., G, S, E], value [..., G, S, V] to [..., H, L, V]; H is a multiple of G."""
    query, key, value = (walk.of(call, name) for name in ("query", "key", "value"))
    event = walk.event(call, _COMBINED, query, key, value)
    dimension = walk.meet(query.axes[-1], key.axes[-1], event)
    rank = len(query.shape)
    for label in (query, key, value):
        walk.keep_whole(label, (rank - 2,), event)
    batch: list[Ids | None] = []
    for axis in range(rank - 2):
        ids = query.axes[axis]
        for label in (key, value):
            shared = label.axes[axis]
            copies = query.shape[axis] // max(label.shape[axis], 1)
            if shared is not None and copies > 1 and label.shape[axis] > 1:
                # Grouped queries: each key head is read by as many query heads, of which fewer would do as well.
                shared = walk.atoms.merge([shared, walk.atoms.fresh(copies)], [label.shape[axis], copies])
            elif label.shape[axis] == 1 and query.shape[axis] > 1:
                continue
            ids = walk.meet(ids, shared, event)
        batch.append(ids)
        walk.mark(ids, "head")
        for label in (key, value):
            walk.mark(label.axes[axis], "head")
    mask = call.node_of("attn_mask")
    if mask is not None:
        label = walk.label(mask)
        walk.keep_whole(label, range(max(len(label.shape) - 2, 0), len(label.shape)), event)
        scores = Label(tuple(batch), query.shape[: rank - 2])
        batch = list(walk.together([scores, _leading(label, min(2, len(label.shape)))], scores.shape, event).axes)
    walk.mark(dimension, "head dimension")
    walk.mark(value.axes[-1], "head dimension")
    return Label((*batch, None, value.axes[-1]), call.shape(), event if dimension is None else -1)


def _edit_scale(call: Call, kept: Kept) -> Edited | None:
    """Attention divides by the root of the head dimension: after a cut by the root of the original one."""
    query = call.node_of("query")
    assert query is not None
    mask = kept.mask(query, len(query.meta["val"].shape) - 1)
    if call.arguments.get("scale") is not None or mask.all():
        return None
    return Edited({"scale": 1 / math.sqrt(len(mask))})


_MATMUL = Rule(_matmul)

TABLE = {
    "aten.matmul.default": _MATMUL,
    "aten.bmm.default": _MATMUL,
    "aten.mm.default": _MATMUL,
    "aten.mv.default": _MATMUL,
    "aten.dot.default": _MATMUL,
    "aten.vdot.default": _MATMUL,
    "aten.baddbmm.default": _MATMUL,
    "aten.scaled_dot_product_attention.default": Rule(_attention, edit=_edit_scale),
}
