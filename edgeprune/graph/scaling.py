"""Which rows of which parameters a tensor is proportional to, where only data movement lies between."""

from __future__ import annotations

import logging

import torch
from torch.fx import Node

from edgeprune.graph.capture import shape_of
from edgeprune.graph.channel_graph import ChannelGraph
from edgeprune.graph.rules import movement, shaping
from edgeprune.graph.rules._base import Call, named_arguments

log = logging.getLogger("edgeprune.graph")

_LAYERS = ("aten.linear.default", "aten.layer_norm.default", "aten.rms_norm.default")
_UNCHANGED = ("aten.contiguous.default", "aten.clone.default", "aten.dropout.default", "aten.alias.default")
_AT_ONCE = 1 << 20
_PIECES = "<built-in function getitem>"
_TAKES = (_PIECES, "aten.select.int", "aten.slice.Tensor", "aten.narrow.default")
"""What takes a part of a tensor; the other parts have other readers."""


def scaling_rows(graph: ChannelGraph, node: Node) -> dict[str, list[int]]:
    """Rows (entries along axis 0) of the weight and bias of the layer whose outputs a tensor consists of.

    Multiplying these rows by a factor multiplies the tensor by it. Empty where the tensor is not made by a linear layer or
    a norm with weights, followed by data movement alone.
    """
    chain: list[Node] = []
    while str(node.target) not in _LAYERS:
        before = [item for item in node.all_input_nodes if hasattr(item.meta.get("val"), "shape") or _is_pieces(item)]
        if node.op != "call_function" or len(before) != 1 or not _moves(node):
            return {}
        chain.append(node)
        node = before[0]
    maker = node
    shape = shape_of(maker.meta["val"], graph.batch)
    # There is a number for every token and window, so they are small.
    kind = torch.int16 if shape[-1] <= torch.iinfo(torch.int16).max else torch.int32
    left: object = torch.arange(shape[-1], dtype=kind).expand(shape)
    for step in reversed(chain):
        call = Call(step, graph.batch)
        # The program's tensors lie in memory in another way, and a view asks for theirs.
        left = left.contiguous() if isinstance(left, torch.Tensor) else left
        arguments = [left if value is node else call[name] for name, value in call.arguments.items()]
        if str(step.target) not in _UNCHANGED:
            try:
                left = step.target(*arguments)  # type: ignore[operator]
            except (RuntimeError, TypeError, ValueError) as error:
                log.debug("rows that make %s are not known: %s", node.name, error)
                return {}
        node = step
    assert isinstance(left, torch.Tensor)
    seen = torch.zeros(shape[-1], dtype=torch.bool)
    for some in left.reshape(-1).split(_AT_ONCE):  # type: ignore[no-untyped-call]
        seen[some.long()] = True
    found = seen.nonzero().flatten().tolist()
    targets = graph.program.graph_signature.inputs_to_parameters
    layer = named_arguments(maker)
    named = (layer.get(name) for name in ("weight", "bias"))
    return {targets[item.name]: found for item in named if isinstance(item, Node) and item.name in targets}


def read_elsewhere(node: Node, reader: Node) -> bool:
    """Whether anything but one operation reads what a tensor consists of.

    Data movement is followed back to where the tensor is taken from a larger one, or made.
    """
    while all(user is reader for user in node.users):
        before = [item for item in node.all_input_nodes if hasattr(item.meta.get("val"), "shape")]
        if str(node.target) in _TAKES or len(before) != 1 or not _moves(node):
            return False
        node, reader = before[0], node
    return True


def _moves(node: Node) -> bool:
    target = str(node.target)
    return target in movement.TABLE or target in shaping.TABLE or target in _UNCHANGED or target == _PIECES


def _is_pieces(node: Node) -> bool:
    return isinstance(node.meta.get("val"), list | tuple)
