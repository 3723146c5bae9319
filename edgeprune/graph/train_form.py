"""What fused attention drops in train form: in eval form forward gives it a zero there, so a program does not show it."""

from __future__ import annotations

import copy
import logging
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode

from edgeprune.parts import core_of

if TYPE_CHECKING:
    from edgeprune.graph.channel_graph import ChannelGraph

log = logging.getLogger("edgeprune.graph")

_ATTENTION = "aten.scaled_dot_product_attention.default"
_PROBABILITY = 4
"""Position of ``dropout_p`` among its arguments."""
_ERRORS = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError, ArithmeticError)


class _Calls(TorchFunctionMode):
    """Notes with which probability each call of fused attention drops."""

    def __init__(self) -> None:
        super().__init__()
        self.probabilities: list[float] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            given = args[_PROBABILITY] if len(args) > _PROBABILITY else kwargs.get("dropout_p", 0.0)
            self.probabilities.append(float(given))
        return func(*args, **kwargs)


def attention_dropout(graph: ChannelGraph) -> dict[str, float]:
    """Probabilities that are not zero, by the program's nodes of fused attention.

    The model runs once in train form, on tensors without values: its calls of attention are those of the program, in the same
    order. Nothing is known where it makes more calls of it or fewer, or does not run in train form without values.
    """
    nodes = [node.name for node in graph.program.graph.nodes if str(node.target) == _ATTENTION]
    if not nodes:
        return {}
    # Buffers of its own: train form may write to them.
    twin = copy.deepcopy(graph.model, {id(parameter): parameter for parameter in graph.model.parameters()}).train()
    calls = _Calls()
    try:
        args, kwargs = graph.program.example_inputs
        with torch.random.fork_rng(devices=[]), torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True), calls:
            core_of(twin, graph.parts)(*args, **kwargs)
    except _ERRORS as error:
        log.debug("what attention drops in train form is not known: %s", error)
        return {}
    if len(calls.probabilities) != len(nodes):
        log.debug("train form calls attention %d times, eval form %d", len(calls.probabilities), len(nodes))
        return {}
    return {name: given for name, given in zip(nodes, calls.probabilities, strict=True) if given}
