"""Operations without a rule that torch itself writes in terms of others: taken apart where all of those have rules."""

from __future__ import annotations

import logging
import operator
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

log = logging.getLogger("edgeprune.graph")

_WHERE = ("stack_trace", "nn_module_stack")
_ERRORS = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError, NotImplementedError)


def take_apart(program: ExportedProgram) -> None:
    """Replace operations that have no rule by what they consist of, in place.

    It is torch's own definition that is put in line (``hstack`` as ``cat``, ``multiply`` as ``mul``), so the program computes
    the same. An operation whose parts have no rules either stays: its own name says more than theirs.
    """
    module = program.graph_module
    changed = [node for node in list(module.graph.nodes) if _is_composite(node) and _replaced(module.graph, node)]
    if changed:
        module.graph.eliminate_dead_code()
        module.recompile()


def _is_composite(node: Node) -> bool:
    from edgeprune.graph.rules.table import rule_for  # the rules read captured programs

    target = node.target
    return (
        isinstance(target, torch._ops.OpOverload)
        and target.namespace == "aten"
        and not target._schema.is_mutable
        and rule_for(str(target)) is None
        and any(isinstance(value, torch.Tensor) for value in pytree.tree_leaves(node.meta.get("val")))
        and torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), "CompositeImplicitAutograd")  # type: ignore[no-untyped-call]
    )


def _replaced(graph: Graph, node: Node) -> bool:
    inner = _parts(node)
    if inner is None:
        return False
    env = dict(zip((one for one in inner.graph.nodes if one.op == "placeholder"), node.all_input_nodes, strict=True))
    with graph.inserting_before(node):
        for one in inner.graph.nodes:
            if one.op == "call_function":
                env[one] = graph.node_copy(one, env.__getitem__)
                env[one].meta.update({key: node.meta[key] for key in _WHERE if key in node.meta})
    results = inner.graph.output_node().args[0]
    if isinstance(results, Node):
        node.replace_all_uses_with(env[results])
    else:
        for user in list(node.users):
            user.replace_all_uses_with(env[results[user.args[1]]])  # type: ignore[index]
            graph.erase_node(user)
    graph.erase_node(node)
    return True


def _parts(node: Node) -> GraphModule | None:
    """What an operation consists of, as a function of its tensors; None where a part has no rule."""
    from edgeprune.graph.rules.table import rule_for

    given = node.all_input_nodes
    if not all(isinstance(one.meta.get("val"), torch.Tensor) for one in given):
        return None
    several = not isinstance(node.meta["val"], torch.Tensor)
    if several and any(user.target is not operator.getitem for user in node.users):
        return None

    def call(*values: torch.Tensor) -> Any:
        known = dict(zip(given, values, strict=True))
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), known.__getitem__)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    try:
        with torch.no_grad():
            found = make_fx(call)(*(one.meta["val"] for one in given))
    except _ERRORS as error:
        log.debug("%s cannot be taken apart: %s", node.target, error)
        return None
    for one in found.graph.nodes:
        ruled = one.target is operator.getitem or "sym_" in str(one.target) or rule_for(str(one.target)) is not None
        if one.op == "get_attr" or (one.op == "call_function" and not ruled):
            log.debug("%s is not taken apart: %s has no rule", node.target, one.target)
            return None
    return found
