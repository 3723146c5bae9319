"""Recurrent layers: what is computed at one step is read at the next, so all of it stays."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeprune.graph.labels import Label
from edgeprune.graph.rules._base import Call, Rule

if TYPE_CHECKING:
    from edgeprune.graph.propagation import Propagation


def _whole(walk: Propagation, call: Call) -> Label | list[Label]:
    return walk.freeze(call, "a recurrent layer reads and makes it at every step")


_WHOLE = Rule(_whole)

TABLE = {
    "aten.gru.input": _WHOLE,
    "aten.gru_cell.default": _WHOLE,
    "aten.lstm.input": _WHOLE,
    "aten.lstm_cell.default": _WHOLE,
    "aten.rnn_relu.input": _WHOLE,
    "aten.rnn_relu_cell.default": _WHOLE,
    "aten.rnn_tanh.input": _WHOLE,
    "aten.rnn_tanh_cell.default": _WHOLE,
}
