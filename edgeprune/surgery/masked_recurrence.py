"""Recurrent layers some of whose hidden units are removed, step by step, by our own definitions.

A removed unit is zero wherever a step or a layer reads it, and NaN in what comes out. Nothing here is shared with the cut.
Equations: documentation of ``torch.nn.LSTM``, ``torch.nn.GRU`` and ``torch.nn.RNN``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from edgeprune.errors import SurgeryError
from edgeprune.surgery.masked_math import gone_along

Tensor = torch.Tensor
_Step = Callable[[Tensor, Tensor, list[Tensor]], list[Tensor]]


def _lstm(read: Tensor, fed_back: Tensor, states: list[Tensor]) -> list[Tensor]:
    enter, forget, value, leave = (read + fed_back).chunk(4, -1)
    cell = forget.sigmoid() * states[1] + enter.sigmoid() * value.tanh()
    return [leave.sigmoid() * cell.tanh(), cell]


def _gru(read: Tensor, fed_back: Tensor, states: list[Tensor]) -> list[Tensor]:
    reset, update = (read + fed_back).chunk(3, -1)[:2]
    value = (read.chunk(3, -1)[2] + reset.sigmoid() * fed_back.chunk(3, -1)[2]).tanh()
    return [(1 - update.sigmoid()) * value + update.sigmoid() * states[0]]


STEPS: dict[str, _Step] = {
    "aten.lstm": _lstm,
    "aten.gru": _gru,
    "aten.rnn_relu": lambda read, fed_back, states: [(read + fed_back).relu()],
    "aten.rnn_tanh": lambda read, fed_back, states: [(read + fed_back).tanh()],
}


def recurrence(op: str, named: dict[str, Any]) -> tuple[Tensor, ...]:
    """All outputs of a recurrent layer, from its arguments by name; removed entries of weights and inputs are NaN.

    Raises:
        SurgeryError: If a weight reads units that the plan removes, or loses rows of some gates only.
    """
    step = STEPS[op]
    directions = 1 + bool(named["bidirectional"])
    x = named["input"].transpose(0, 1) if named["batch_first"] else named["input"]
    given = named["hx"] if isinstance(named["hx"], list | tuple) else [named["hx"]]
    per = len(named["params"]) // (int(named["num_layers"]) * directions)
    ends: list[list[Tensor]] = []
    for layer in range(int(named["num_layers"])):
        made = []
        for direction in range(directions):
            place = layer * directions + direction
            weights = named["params"][place * per : (place + 1) * per]
            steps, end = _direction(step, x, [state[place] for state in given], weights, backwards=direction == 1)
            made.append(steps)
            ends.append(end)
        x = torch.cat(made, -1)
    states = [torch.stack([end[index] for end in ends]) for index in range(len(given))]
    return (x.transpose(0, 1) if named["batch_first"] else x), *states


def _direction(
    step: _Step, x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor], *, backwards: bool
) -> tuple[Tensor, list[Tensor]]:
    """One layer in one direction: its outputs [steps, batch, hidden] and its last states."""
    enters, feeds_back, *biases = weights
    gone, unread = gone_along(feeds_back, 1), gone_along(enters, 1)
    gates = len(enters) // len(gone)
    for weight in (enters, feeds_back):
        if not torch.equal(gone_along(weight, 0), gone.repeat(gates)):
            raise SurgeryError("a recurrent layer must lose the rows of all gates of a unit, found one that does not.")
    forgotten = x.isnan().reshape(-1, x.shape[-1]).any(dim=0) & ~unread
    if forgotten.any():
        index = int(forgotten.nonzero()[0])
        raise SurgeryError(f"a recurrent layer must not read units that the plan removes, found input {index}.")
    own, back = (bias.nan_to_num(0.0) for bias in biases) if biases else (0.0, 0.0)
    enters, feeds_back = enters.nan_to_num(0.0), feeds_back.nan_to_num(0.0)
    now = [state.masked_fill(gone, 0.0) for state in states]
    made: list[Tensor] = []
    for one in x.masked_fill(unread, 0.0).flip(0) if backwards else x.masked_fill(unread, 0.0):
        now = [state.masked_fill(gone, 0.0) for state in step(one @ enters.T + own, now[0] @ feeds_back.T + back, now)]
        made.append(now[0])
    found = torch.stack(made[::-1] if backwards else made).masked_fill(gone, math.nan)
    return found, [state.masked_fill(gone, math.nan) for state in now]
