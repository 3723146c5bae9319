"""Operations that make a tensor from sizes or from the shape of another; they hold no channels of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeprune.graph.labels import Label, kept
from edgeprune.graph.rules._base import Call, Rule
from edgeprune.graph.rules.recurrent import edit_state

if TYPE_CHECKING:
    from edgeprune.graph.propagation import Propagation


def _fixed(walk: Propagation, call: Call) -> Label:
    return kept(call.shape(), walk.event(call, "it is combined with a tensor that forward makes at a fixed size"))


def _like(walk: Propagation, call: Call) -> Label:
    return walk.of(call, "self").of_shape(call.shape())


_FIXED, _LIKE, _STATE = Rule(_fixed), Rule(_like), Rule(_fixed, edit=edit_state)

TABLE = {
    "aten.arange.default": _FIXED,
    "aten.arange.start": _FIXED,
    "aten.arange.start_step": _FIXED,
    "aten.empty.memory_format": _FIXED,
    "aten.eye.default": _FIXED,
    "aten.eye.m": _FIXED,
    "aten.full.default": _FIXED,
    "aten.linspace.default": _FIXED,
    "aten.new_full.default": _FIXED,
    "aten.new_ones.default": _FIXED,
    "aten.new_zeros.default": _STATE,
    "aten.ones.default": _FIXED,
    "aten.scalar_tensor.default": _FIXED,
    "aten.zeros.default": _STATE,
    "aten.full_like.default": _LIKE,
    "aten.ones_like.default": _LIKE,
    "aten.zeros_like.default": _LIKE,
}
