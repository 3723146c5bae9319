"""Attention in the form that the ONNX exporter knows: four axes (batch, heads, tokens, features)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Graph, Node
from torch.fx.traceback import NodeSource, NodeSourceAction

_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
_AXES = 4


def with_four_axes(program: ExportedProgram) -> None:
    """Fold the leading axes of every fused attention that has more than four axes, and give one that has three another.

    The exporter of torch 2.13 refuses both (``aten_scaled_dot_product_attention``: "only 4D query, key, and value are
    supported"). Attention treats all axes but the last two alike, so nothing else changes. The program is edited in place.
    """
    graph = program.graph_module.graph
    for node in list(graph.nodes):
        if node.target is _ATTENTION and node.args[0].meta["val"].ndim != _AXES:
            _fold(graph, node)


def _fold(graph: Graph, node: Node) -> None:
    query = node.args[0]
    assert isinstance(query, Node)
    leading = query.meta["val"].shape[:-2]

    def add(function: Callable[..., Any], *args: Any) -> Node:
        made = graph.call_function(function, args)
        made.meta = {key: value for key, value in node.meta.items() if key != "val"}
        # What is asked later is which operation of the user's program an operation comes from.
        made.meta["from_node"] = [NodeSource(node, "with_four_axes", NodeSourceAction.CREATE)]
        made.meta["val"] = function(*map(_value, args))
        return made

    def folded(value: Any) -> Any:
        if not isinstance(value, Node) or (value.meta["val"].ndim <= 2):
            return value  # a mask that is the same for all
        if value.meta["val"].shape[:-2] != leading:
            value = add(torch.ops.aten.expand.default, value, [*leading, *value.meta["val"].shape[-2:]])
        if len(leading) == 1:
            return add(torch.ops.aten.unsqueeze.default, value, 1)
        return add(torch.ops.aten.flatten.using_ints, value, 0, len(leading) - 2)

    whole = node.meta["val"]
    with graph.inserting_before(node):
        inputs = [folded(value) if place < _AXES else value for place, value in enumerate(node.args)]
        named = {name: folded(value) if name == "attn_mask" else value for name, value in node.kwargs.items()}
    node.args, node.kwargs = tuple(inputs), named
    node.meta["val"] = _ATTENTION(*map(_value, inputs), **{name: _value(value) for name, value in named.items()})
    with graph.inserting_after(node):
        if len(leading) == 1:
            back = add(torch.ops.aten.squeeze.dim, node, 1)
        else:
            back = add(torch.ops.aten.unflatten.int, node, 0, [-1, *leading[1:-1]])
    assert back.meta["val"].shape == whole.shape
    node.replace_all_uses_with(back, delete_user_cb=lambda user: user is not back)


def _value(value: Any) -> Any:
    return value.meta["val"] if isinstance(value, Node) else value
