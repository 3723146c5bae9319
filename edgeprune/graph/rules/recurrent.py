"""Recurrent layers: a hidden unit is what all of their steps, layers and directions compute and read under one number."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import numpy as np
from torch.fx import Node

from edgeprune.graph.atoms import Ids
from edgeprune.graph.labels import Label
from edgeprune.graph.rules._base import Call, Edited, Kept, Rule

if TYPE_CHECKING:
    from edgeprune.graph.propagation import Propagation

_GATES = {"aten.lstm.input": 4, "aten.gru.input": 3, "aten.rnn_relu.input": 1, "aten.rnn_tanh.input": 1}
"""Rows of every weight per hidden unit, those of one gate after those of another (``torch.nn.LSTM``, ``GRU``, ``RNN``)."""
_MIXED = "a recurrent layer runs along it"
_COMBINED = "a recurrent layer reads it together with channels that keep their size"
_ZEROS = "aten.zeros.default"


def _sequence(walk: Propagation, call: Call) -> Label | list[Label]:
    """Weights are [gates * hidden, inputs] and [gates * hidden, hidden] per layer and direction, then biases.

    Torch has one hidden size for all layers and directions of a module, so a unit goes from all of them.
    """
    nodes = [node for node in call.arguments["params"] if isinstance(node, Node)]
    names = [walk.parameters.get(node.name, "") for node in nodes]
    gates, directions = _GATES[call.op], 1 + bool(call["bidirectional"])
    per = len(nodes) // (int(call["num_layers"]) * directions)
    if not all(names):
        return walk.freeze(call, "a recurrent layer reads weights that forward computes")
    if per != 2 + 2 * bool(call["has_biases"]):
        return walk.freeze(call, "a recurrent layer projects what it makes at every step")
    x = walk.of(call, "input")
    last = len(x.shape) - 1
    event = walk.event(call, _COMBINED, x)
    x = walk.keep_whole(x, range(last), walk.event(call, _MIXED, x))
    hidden: Ids | None = walk.axis(names[1], 1, "input")
    for node in _states(call):
        if not _is_own_zeros(node):
            state = walk.label(node)
            state = walk.keep_whole(state, range(len(state.shape) - 1), event)
            hidden = walk.meet(hidden, state.axes[-1], event)
    inputs = x.axes[last]
    rows = None if hidden is None else np.tile(hidden, gates)
    for place in range(0, len(nodes), per):
        layer = place // per // directions
        read = inputs if layer == 0 else None if hidden is None else np.tile(hidden, directions)
        own, steps, *biases = nodes[place : place + per]
        walk.bind_node(own, 0, rows, "output", event)
        walk.bind_node(own, 1, read, "input", event)
        walk.bind_node(steps, 0, rows, "output", event)
        walk.bind_node(steps, 1, hidden, "input", event)
        for bias in biases:
            walk.bind_node(bias, 0, rows, "vector", event)
    if hidden is not None:
        # The outputs of all steps, or the last state where nothing else is read.
        value = min(call.node.users, key=lambda user: cast(int, user.args[1]), default=None)
        walk.produce(call, hidden, argument="", weight=names[0], value=value)
    made, *states = call.shapes()
    found = None if hidden is None else np.tile(hidden, directions)
    kept_event = event if hidden is None else -1
    return [
        Label((*x.axes[:last], found), made, kept_event),
        *(Label((*[None] * (len(shape) - 1), hidden), shape, kept_event) for shape in states),
    ]


def _states(call: Call) -> list[Node]:
    """Hidden (and cell) states that it begins with."""
    given = call.arguments["hx"]
    return [node for node in (given if isinstance(given, list | tuple) else [given]) if isinstance(node, Node)]


def _is_own_zeros(node: Node) -> bool:
    """Whether a state is zeros that nothing but one recurrent layer reads, so that it may have any length."""
    return str(node.target) == _ZEROS and [str(user.target) in _GATES for user in node.users] == [True]


def edit_state(call: Call, kept: Kept) -> Edited | None:
    """The zeros that a recurrent layer begins with are as long as what it is left with."""
    if not _is_own_zeros(call.node):
        return None
    layer = Call(next(iter(call.node.users)), call.batch)
    size = list(call.arguments["size"])
    left = kept.size(layer.arguments["params"][1], 1)
    return None if left == size[-1] else Edited({"size": [*size[:-1], left]})


def _whole(walk: Propagation, call: Call) -> Label | list[Label]:
    return walk.freeze(call, "a recurrent cell reads and makes it at every step")


_SEQUENCE, _WHOLE = Rule(_sequence), Rule(_whole)

TABLE = {
    "aten.gru.input": _SEQUENCE,
    "aten.gru_cell.default": _WHOLE,
    "aten.lstm.input": _SEQUENCE,
    "aten.lstm_cell.default": _WHOLE,
    "aten.rnn_relu.input": _SEQUENCE,
    "aten.rnn_relu_cell.default": _WHOLE,
    "aten.rnn_tanh.input": _SEQUENCE,
    "aten.rnn_tanh_cell.default": _WHOLE,
}
