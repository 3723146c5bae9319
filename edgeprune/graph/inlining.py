"""Regions of ``with torch.no_grad()`` and ``with torch.autocast(enabled=False)``: captured apart, put back in line."""

from __future__ import annotations

import operator
from typing import Any

from torch.export import ExportedProgram
from torch.fx import GraphModule, Node


def put_in_line(program: ExportedProgram) -> None:
    """Replace every region that changes nothing of what is computed by its operations, in place.

    A region in which gradients are turned on or off computes the same; so does one in which autocast is turned off, as a
    program is captured without autocast. A region with autocast turned on stays a single operation.
    """
    module = program.graph_module
    while any(_replaced(module, node) for node in list(module.graph.nodes)):
        module.graph.eliminate_dead_code(lambda node: node.op != "get_attr")
        module.delete_all_unused_submodules()
        module.recompile()


def _replaced(module: GraphModule, node: Node) -> bool:
    found = _region(node)
    if found is None:
        return False
    holder, given = found
    region = getattr(module, str(holder.target))
    env = dict(zip((inner for inner in region.graph.nodes if inner.op == "placeholder"), given, strict=True))
    with module.graph.inserting_before(node):
        for inner in region.graph.nodes:
            if inner.op == "get_attr":
                setattr(module, name := f"{holder.target}_{inner.target}", getattr(region, str(inner.target)))
                env[inner] = module.graph.get_attr(name)
            elif inner.op == "call_function":
                env[inner] = module.graph.node_copy(inner, env.__getitem__)
    results = next(inner for inner in region.graph.nodes if inner.op == "output").args[0]
    for user in list(node.users):
        user.replace_all_uses_with(env[results[user.args[1]]])
        module.graph.erase_node(user)
    module.graph.erase_node(node)
    return True


def _region(node: Node) -> tuple[Node, tuple[Any, ...]] | None:
    """The node that holds a region's operations, and what is given to them; None where the node is no such region."""
    name = str(node.target)
    if node.op != "call_function" or any(user.target is not operator.getitem for user in node.users):
        return None
    if name.endswith("wrap_with_set_grad_enabled"):
        _, holder, *given = node.args
    elif name.endswith("wrap_with_autocast") and node.args[2] is False:
        _, _, _, _, holder, *given = node.args
    else:
        return None
    return (holder, tuple(given)) if isinstance(holder, Node) else None
