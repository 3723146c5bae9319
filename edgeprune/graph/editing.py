"""The program of a cut model: arguments that spell out sizes rewritten, all of it as plain JSON values.

The JSON names ATen operations, their arguments, parameters and buffers; nothing in it runs code when it is read.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.export.graph_signature import ConstantArgument, InputKind
from torch.fx import Node
from torch.utils import _pytree as pytree

from edgeprune.graph.branches import ResidualBranch, idle
from edgeprune.graph.capture import module_path, source_of
from edgeprune.graph.channel_graph import ChannelGraph
from edgeprune.graph.linear_layers import linear_chains
from edgeprune.graph.places import Places
from edgeprune.graph.rules._base import Call, Kept, named_arguments
from edgeprune.graph.rules.table import rule_for
from edgeprune.graph.scaling import read_elsewhere, scaling_rows

MAX_CONSTANT = 4096
"""Constants of forward with more elements are not written into a program."""

_PYTHON = {
    getattr(operator, name): f"operator.{name}"
    for name in ("getitem", "add", "sub", "mul", "floordiv", "mod", "neg", "pow", "truediv")
}
_ATTENTION = "aten.scaled_dot_product_attention.default"
_ASSERTIONS = ("aten._assert", "aten.sym_constrain_range")


class UnwritableError(ValueError):
    """A program holds something that the JSON form has no word for."""


def written_chains(graph: ChannelGraph, weights: Collection[str]) -> list[dict[str, Any]]:
    """Pairs of linear layers with only element-wise operations between them, as JSON values.

    Args:
        graph: The traced model.
        weights: Pairs that have one of these weights are written.
    """
    parameters = dict(graph.model.named_parameters(remove_duplicate=False))
    found = []
    for chain in linear_chains(graph) if weights else ():
        pair = (chain.producer, chain.consumer)
        if set(pair).isdisjoint(weights):
            continue
        operations = []
        for node in chain.operations:
            named = named_arguments(node)
            reads = next(name for name, value in named.items() if isinstance(value, Node))
            args = {name: _encode(value) for name, value in named.items() if name != reads}
            operations.append({"op": str(node.target), "reads": reads, "args": args})
        shapes = [list(parameters[name].shape) for name in pair]
        found.append({"producer": pair[0], "consumer": pair[1], "shapes": shapes, "operations": operations})
    return found


def masks_of(graph: ChannelGraph, kept_units: Mapping[str, npt.NDArray[np.bool_]]) -> Kept:
    """What is left of every axis when each group keeps the units whose entry is True."""
    total = sum(group.size for group in graph.groups)
    kept = np.ones(total + 1, dtype=bool)
    for name, mask in kept_units.items():
        offset = graph.offset_of[name]
        kept[offset : offset + len(mask)] = mask
    return Kept(lambda node, axis: np.logical_and.reduce(kept[graph.unit_of[node][axis]], axis=0))


def edited_program(
    graph: ChannelGraph, kept: Kept, removed: Collection[ResidualBranch] = ()
) -> tuple[dict[str, Any] | None, list[dict[str, Any]], str]:
    """The program after a cut.

    Args:
        graph: The traced model.
        kept: What is left of every axis.
        removed: Branches that go as a whole: their sums become copies of the other addend.

    Returns:
        The program as JSON values, or None where it cannot be written; the arguments that had to change although no
        module attribute carries them, each with operation and source line; why the program cannot be written, or "".
    """
    nodes: list[dict[str, Any]] = []
    rewrites: list[dict[str, Any]] = []
    reason = ""
    places = Places()
    copies = {branch.addition: branch.kept for branch in removed}
    for branch in removed:
        copies |= dict.fromkeys(idle(graph.program, branch), branch.addition)
    for node in _live(graph, copies, removed):
        if node.name in copies:
            args = {"self": {"node": copies[node.name]}, "memory_format": None}
            nodes.append({"name": node.name, "op": "aten.clone.default", "args": args})
            continue
        edited, op = dict[str, Any](), _op_name(node)
        change = None
        rule = rule_for(op)
        if rule is not None and rule.edit is not None:
            change = rule.edit(Call(node, graph.batch), kept)
            if change is not None:
                edited, op = change.args, change.op or op
                if change.in_place or not _follows_module(graph, node):
                    rewrites.append(_rewrite(graph, node, op, edited))
                    if op == _ATTENTION:
                        rewrites[-1]["fold"] = _fold(graph, node, kept)
        given = named_arguments(node) if op == _op_name(node) else {}
        try:
            args = {name: _encode(value) for name, value in {**given, **edited}.items()}
        except UnwritableError as error:
            reason = reason or str(error)
            continue
        written = {"name": node.name, "op": op, "args": args, **_training(graph, node, args)}
        if change is not None and change.in_place:
            argument, source = next((name, one) for name, one in given.items() if isinstance(one, Node))
            nodes += places.nodes(written, argument, source.meta["val"].ndim, change.in_place)
        else:
            nodes.append(written)
        if not op.startswith(("aten.", "operator.")):
            reason = reason or f"operation {op} has no written form"
    try:
        frame = _frame(graph, {name for branch in removed for name in branch.tensors})
        frame["inputs"] += places.inputs
        frame["constants"] |= places.constants
    except UnwritableError as error:
        reason = reason or str(error)
    return (None if reason else {**frame, "nodes": nodes}), rewrites, reason


def _live(graph: ChannelGraph, copies: Mapping[str, str], removed: Collection[ResidualBranch]) -> list[Node]:
    """Operations that the outputs need, in order; assertions are left out, in-place operations stay."""
    by_name = {node.name: node for node in graph.program.graph.nodes}
    gone = frozenset[str]().union(*(branch.nodes for branch in removed))
    needed: set[Node] = set()
    for node in reversed(list(graph.program.graph.nodes)):
        schema = getattr(node.target, "_schema", None)
        mutates = schema is not None and schema.is_mutable and not str(node.target).startswith(_ASSERTIONS)
        if node.op == "output" or node in needed or (mutates and node.name not in gone):
            needed.update([by_name[copies[node.name]]] if node.name in copies else node.all_input_nodes)
            needed.add(node)
    return [node for node in graph.program.graph.nodes if node in needed and node.op == "call_function"]


def _op_name(node: Node) -> str:
    return _PYTHON.get(node.target, str(node.target)) if callable(node.target) else str(node.target)


def _follows_module(graph: ChannelGraph, node: Node) -> bool:
    """Whether the edited argument is an attribute of a module of torch, which surgery updates."""
    weight = named_arguments(node).get("weight")
    if not isinstance(weight, Node):
        return False
    targets = graph.program.graph_signature.inputs_to_parameters
    return targets.get(weight.name, "").rpartition(".")[0] in graph.modules


def _rewrite(graph: ChannelGraph, node: Node, op: str, edited: dict[str, Any]) -> dict[str, Any]:
    before = named_arguments(node)
    if "split_sizes" in edited and "split_sizes" not in before:
        call = Call(node, graph.batch)
        before["split_sizes"] = [shape[edited["dim"]] for shape in call.shapes()]
    return {
        "op": str(node.target),
        "module": module_path(node),
        "source": source_of(node),
        "from": {name: _plain(before[name]) for name in edited if name in before},
        "to": {"op": op, **{name: _plain(value) for name, value in edited.items()}},
    }


def _fold(graph: ChannelGraph, node: Node, kept: Kept) -> dict[str, Any]:
    """What the rows that make the queries are multiplied by where forward divides by the root of what is left.

    Those of the keys where something besides the attention reads the queries (a bias that depends on them, say).
    """
    query, key = (Call(node, graph.batch).node_of(name) for name in ("query", "key"))
    assert query is not None
    assert key is not None
    mask = kept.mask(query, -1 % len(query.meta["val"].shape))
    scaled = key if read_elsewhere(query, node) and not read_elsewhere(key, node) else query
    return {"factor": math.sqrt(mask.sum() / len(mask)), "rows": scaling_rows(graph, scaled)}


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, int | float | str | bool | None) else str(value)


def _training(graph: ChannelGraph, node: Node, args: dict[str, Any]) -> dict[str, Any]:
    """What an operation needs in train form.

    A batch norm needs its counter, and whether it averages cumulatively; attention the probability with which it drops.
    """
    if str(node.target) == _ATTENTION and node.name in graph.attention_dropout:
        return {"dropout": graph.attention_dropout[node.name]}
    if str(node.target) != "aten.batch_norm.default":
        return {}
    mean = named_arguments(node).get("running_mean")
    targets = graph.program.graph_signature.inputs_to_buffers
    path = targets.get(mean.name, "").rpartition(".")[0] if isinstance(mean, Node) else ""
    counter = f"{path}.num_batches_tracked" if path else "num_batches_tracked"
    if counter not in targets.values():
        return {}
    facts = graph.modules.get(path)
    if facts is not None and facts.cumulative:
        args["momentum"] = None
    return {"counter": counter}


def _frame(graph: ChannelGraph, gone: Collection[str]) -> dict[str, Any]:
    """Inputs, outputs and how they are nested; parameters and buffers that are gone are left out."""
    program = graph.program
    inputs, constants = [], {}
    for spec in program.graph_signature.input_specs:
        if spec.target in gone:
            continue
        kind = {InputKind.PARAMETER: "parameter", InputKind.BUFFER: "buffer", InputKind.USER_INPUT: "input"}.get(
            spec.kind
        )
        if kind is None:
            value = program.constants.get(spec.target or "")
            if not isinstance(value, torch.Tensor) or value.numel() > MAX_CONSTANT:
                raise UnwritableError(f"constant {spec.target} of forward cannot be written as text")
            kind = "constant"
            data = torch.view_as_real(value.resolve_conj()) if value.is_complex() else value
            constants[spec.target] = {"dtype": str(value.dtype).removeprefix("torch."), "data": data.tolist()}
        item = {"name": spec.arg.name, "kind": kind, "target": spec.target}
        if kind == "input" and isinstance(spec.arg, ConstantArgument):
            item["value"] = _encode(spec.arg.value)
        inputs.append(item)
    outputs = next(node for node in program.graph.nodes if node.op == "output").args[0]
    spec = program.call_spec
    try:
        specs = {"in_spec": pytree.treespec_dumps(spec.in_spec), "out_spec": pytree.treespec_dumps(spec.out_spec)}
    except (NotImplementedError, TypeError, ValueError) as error:
        raise UnwritableError(f"inputs or outputs cannot be written as text ({error})") from error
    return {"inputs": inputs, "constants": constants, "outputs": [_encode(item) for item in outputs], **specs}


def _encode(value: Any) -> Any:
    if isinstance(value, Node):
        return {"node": value.name}
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if np.isfinite(value) else {"float": repr(value)}
    if isinstance(value, list | tuple):
        return [_encode(item) for item in value]
    for kind in ("dtype", "memory_format", "layout"):
        if isinstance(value, getattr(torch, kind)):
            return {kind: str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": value.type}
    raise UnwritableError(f"an argument of type {type(value).__name__} has no written form")
