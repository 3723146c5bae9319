"""Residual branches: what can be taken out of a model as a whole, so that the other addend of its sum is what is left.

A branch has width 0 when all channel groups that lie inside it have. Nothing of it is computed then: no layer, no constant
that its last bias would still add. Source of the idea: A. Veit, M. Wilber, S. Belongie, "Residual Networks Behave Like
Ensembles of Relatively Shallow Networks", NeurIPS 2016, section 4.1 (a network without one of its blocks still works).
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from edgeprune.errors import PlanError
from edgeprune.graph.rules._base import named_arguments

if TYPE_CHECKING:
    from edgeprune.graph.channel_graph import ChannelGroup

_SUMS = ("aten.add.Tensor", "aten.add_.Tensor")
_RECTIFIERS = ("aten.relu.default", "aten.relu_.default")
_KEEP_SIGN = (
    "aten.clone.", "aten.max_pool", "aten.avg_pool", "aten.adaptive_avg_pool", "aten.adaptive_max_pool", "aten.slice.",
    "aten.flatten.", "aten.reshape.", "aten.view.", "aten.permute.", "aten.transpose.", "aten.dropout.",
)  # fmt: skip
"""Operations that make nothing negative of what is not."""


@dataclass(frozen=True)
class ResidualBranch:
    """An addend that weights make, beside one that none of its own make.

    Attributes:
        name: What its layers have in common in their paths, e.g. ``"layer1.0"``.
        groups: Channel groups that lie inside it, in program order.
        lead: The one of them with most axes: what allocation gives width 0 when it removes the branch.
        addition: Program node that adds it.
        kept: Node of the other addend, which is what is left of the sum.
        nodes: Program nodes that nothing but the sum needs.
        tensors: Parameters and buffers that nothing else reads.
    """

    name: str
    groups: tuple[str, ...]
    lead: str
    addition: str
    kept: str
    nodes: frozenset[str]
    tensors: tuple[str, ...]


def residual_branches(program: ExportedProgram, groups: Iterable[ChannelGroup]) -> tuple[ResidualBranch, ...]:
    """Every branch that can go as a whole and has a channel group inside, in program order.

    A sum counts where both addends have its shape, neither is scaled by it, and nothing else reads the branch: where a layer
    inside has a second reader, or writes in place to what lies outside, it stays.

    Args:
        program: Of the model.
        groups: Its channel groups.
    """
    signature = program.graph_signature
    targets = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    readers: dict[str, set[Node]] = {}
    for node in program.graph.nodes:
        for read in node.all_input_nodes:
            if read.name in targets:
                readers.setdefault(targets[read.name], set()).add(node)
    every = tuple(groups)
    found: list[ResidualBranch] = []
    for node in program.graph.nodes:
        for branch, kept in _addends(node):
            own, other = _cone(branch, node), _cone(kept, node)
            if _writes_outside(own) or _weights(other, targets) or not _weights(own, targets):
                continue
            tensors = tuple(name for name, nodes in readers.items() if nodes <= own)
            names = {one.name for one in own}
            inside = tuple(
                group
                for group in every
                if names.issuperset(group.nodes) and all(member.parameter in tensors for member in group.members)
            )
            if inside:
                counters = tuple(
                    name
                    for name in signature.inputs_to_buffers.values()
                    if name not in tensors and _beside(name) in {_beside(one) for one in tensors}
                )
                found.append(
                    ResidualBranch(
                        _name(tensors, found),
                        tuple(group.name for group in inside),
                        max(inside, key=lambda group: len(group.members)).name,
                        node.name,
                        kept.name,
                        frozenset(names),
                        (*tensors, *counters),
                    )
                )
    return tuple(found)


def emptied(branches: Iterable[ResidualBranch], widths: Mapping[str, int]) -> dict[str, int]:
    """Widths where with the lead of a branch all of its groups are 0; widths of groups that are not named stay unnamed."""
    found = dict(widths)
    for branch in branches:
        if found.get(branch.lead) == 0:
            found |= dict.fromkeys(branch.groups, 0)
    return found


def removed_branches(branches: Iterable[ResidualBranch], widths: Mapping[str, int]) -> tuple[ResidualBranch, ...]:
    """The branches of which nothing is left.

    Args:
        branches: Those of the model.
        widths: Units kept per group; groups that are not named are not removed.

    Raises:
        PlanError: A group has width 0 and its branch keeps others, or it lies in no branch.
    """
    empty = {name for name, width in widths.items() if width == 0}
    if not empty:
        return ()
    every = tuple(branches)
    removed = tuple(branch for branch in every if empty.issuperset(branch.groups))
    left = empty.difference(*(branch.groups for branch in removed))
    if left:
        name = min(left)
        own = next((branch for branch in every if name in branch.groups), None)
        raise PlanError(
            f"group {name!r} must keep at least one unit, found none (rule: emptied group).",
            hint=None if own is None else f"none of {', '.join(map(repr, own.groups))}, for the whole branch to go",
        )
    return removed


def idle(program: ExportedProgram, branch: ResidualBranch) -> frozenset[str]:
    """Rectifiers that do nothing once a branch is gone, because what they read is not negative any more.

    Of ``relu(x + branch(x))`` where `x` comes out of a ReLU itself, say, nothing is left but `x`.
    """
    nodes = {node.name: node for node in program.graph.nodes}
    kept = nodes[branch.kept]
    while str(kept.target).startswith(_KEEP_SIGN) or _pads_with_zeros(kept):
        kept = kept.all_input_nodes[0]
    if str(kept.target) not in _RECTIFIERS:
        return frozenset()
    return frozenset(user.name for user in nodes[branch.addition].users if str(user.target) in _RECTIFIERS)


def _pads_with_zeros(node: Node) -> bool:
    if not str(node.target).startswith(("aten.pad.", "aten.constant_pad_nd.")):
        return False
    named = named_arguments(node)
    return named.get("mode", "constant") == "constant" and (named.get("value") or 0) >= 0


def _addends(node: Node) -> Iterator[tuple[Node, Node]]:
    """(branch, what is left without it), for either addend of a plain sum of two tensors of one shape."""
    if str(node.target) not in _SUMS:
        return
    named = named_arguments(node)
    one, two = named["self"], named["other"]
    if not isinstance(one, Node) or not isinstance(two, Node) or one is two or named.get("alpha", 1) != 1:
        return
    metas = [item.meta.get("val") for item in (node, one, two)]
    if not all(isinstance(meta, torch.Tensor) for meta in metas):
        return
    # A free batch is a symbol, which has no hash and is the same in all three.
    if len({(str(tuple(meta.shape)), meta.dtype) for meta in metas}) != 1:  # type: ignore[union-attr]
        return
    yield one, two
    yield two, one


def _cone(end: Node, reader: Node) -> set[Node]:
    """What only `reader` needs, through `end`: operations all of whose readers are among them."""
    found: set[Node] = set()
    if set(end.users) != {reader}:
        return found
    waiting = [end]
    while waiting:
        node = waiting.pop()
        if node in found or node.op != "call_function":
            continue
        if node is not end and not found.issuperset(node.users):
            continue
        found.add(node)
        waiting.extend(node.all_input_nodes)
    return found


def _writes_outside(nodes: Collection[Node]) -> bool:
    """Whether an operation among them writes in place to a tensor that others made."""
    for node in nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is None or not schema.is_mutable:
            continue
        written = node.args[0] if node.args else None
        while isinstance(written, Node):
            if written not in nodes:
                return True
            # A view of a tensor is that tensor.
            inner = getattr(written.target, "_schema", None)
            views = inner is not None and any(argument.alias_info is not None for argument in inner.arguments[:1])
            written = written.args[0] if views and written.args else None
    return False


def _weights(nodes: Collection[Node], targets: Mapping[str, str]) -> bool:
    return any(read.name in targets for node in nodes for read in node.all_input_nodes)


def _beside(name: str) -> str:
    return name.rpartition(".")[0]


def _name(tensors: Iterable[str], others: Iterable[ResidualBranch]) -> str:
    paths = [_beside(name).split(".") for name in tensors]
    same = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
    common = ".".join(parts[0] for parts in same) or paths[0][0]
    taken = {branch.name for branch in others}
    name, count = common, 1
    while name in taken:
        count += 1
        name = f"{common} ({count})"
    return name
