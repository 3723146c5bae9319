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
_ZEROS = ("aten.new_zeros.default", "aten.zeros.default")
_SAME = (
    "aten.alias.default", "aten.clone.default", "aten.contiguous.default", "aten.detach.default", "aten.detach_.default",
    "aten.requires_grad_.default", "aten.to.device", "aten.to.dtype", "aten.to.dtype_layout", "aten._to_copy.default",
)  # fmt: skip
"""What forward may do to the zeros that it begins with: they stay zeros."""


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
    zeros: list[Node] = []
    for node in _states(call):
        if own_zeros := _own_zeros(node):
            zeros += own_zeros
        else:
            state = walk.label(node)
            state = walk.keep_whole(state, range(len(state.shape) - 1), event)
            hidden = walk.meet(hidden, state.axes[-1], event)
    for node in zeros:
        state = walk.label(node)
        walk.labels[node.name] = state.at(len(state.shape) - 1, hidden)
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


def _own_zeros(state: Node) -> list[Node]:
    """The nodes of a state of zeros that nothing but one recurrent layer reads, so that it may have any length; or none."""
    found = [state]
    while str(found[-1].target) in _SAME:
        found.append(found[-1].all_input_nodes[0])
    alone = all(len(_readers(node)) == 1 for node in found)
    return found if str(found[-1].target) in _ZEROS and alone else []


def _readers(node: Node) -> list[Node]:
    """Who reads a node, without what only asserts something of it."""
    return [user for user in node.users if not str(user.target).startswith("aten._assert")]


def edit_state(call: Call, kept: Kept) -> Edited | None:
    """The zeros that a recurrent layer begins with are as long as what it is left with."""
    size = list(call.arguments["size"])
    if not size or kept.mask(call.node, len(size) - 1).all():
        return None
    return Edited({"size": [*size[:-1], kept.size(call.node, len(size) - 1)]})


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
