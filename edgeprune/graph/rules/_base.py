"""What a rule is, and how it sees the operation that it is asked about."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from torch.fx import Node

from edgeprune.graph.capture import concrete, shape_of, source_of
from edgeprune.graph.labels import Label

if TYPE_CHECKING:
    from edgeprune.graph.propagation import Propagation


@dataclass(frozen=True)
class Rule:
    """How labels pass through an operation.

    Attributes:
        propagate: Labels of the outputs; a list where the operation returns several tensors.
        edit: Arguments that must change after a cut; None where an operation has no sizes in its arguments.
    """

    propagate: Callable[[Propagation, Call], Label | list[Label]]
    edit: Callable[[Call, Kept], Edited | None] | None = None


@dataclass(frozen=True)
class Edited:
    """An operation after a cut.

    Attributes:
        args: Argument name to new value, for those that change.
        op: Another operation, where the original cannot say it (``chunk`` into unequal parts).
        in_place: Axis of the first argument, and of the result, to the positions that stay, where these keep the places and
            distances that they had: zeros stand for the others while the operation runs.
    """

    args: dict[str, Any]
    op: str | None = None
    in_place: Mapping[int, npt.NDArray[np.bool_]] = field(default_factory=dict)


class Call:
    """One operation of the program with its arguments by name, sizes at the deployment batch."""

    def __init__(self, node: Node, batch: int) -> None:
        self.node = node
        self.batch = batch
        self.op = str(node.target)
        self.arguments = named_arguments(node)

    @property
    def source(self) -> str:
        """``file:line`` of the user's code."""
        return source_of(self.node)

    def __getitem__(self, name: str) -> Any:
        return self._value(self.arguments[name])

    def _value(self, value: Any) -> Any:
        if isinstance(value, Node):
            found = value.meta.get("val")
            return value if found is None or hasattr(found, "shape") else concrete(found, self.batch)
        if isinstance(value, list | tuple):
            return [self._value(item) for item in value]
        return concrete(value, self.batch)

    def node_of(self, name: str) -> Node | None:
        """The node that an argument is, or None."""
        value = self.arguments.get(name)
        return value if isinstance(value, Node) else None

    def tensor_nodes(self) -> Iterator[Node]:
        """All arguments that are tensors or lists of tensors, in order."""
        for value in self.arguments.values():
            for item in value if isinstance(value, list | tuple) else (value,):
                if isinstance(item, Node) and (hasattr(item.meta.get("val"), "shape") or _is_list(item)):
                    yield item

    def shape(self) -> tuple[int, ...]:
        """Shape of the output."""
        return shape_of(self.node.meta["val"], self.batch)

    def shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the outputs of an operation with several."""
        return [shape_of(value, self.batch) for value in self.node.meta["val"]]

    def axis(self, name: str, rank: int) -> int:
        """An axis argument, counted from the front."""
        return int(self[name]) % max(rank, 1)


@dataclass(frozen=True)
class Kept:
    """What is left of every axis under one plan.

    Attributes:
        masks: Per program node, per axis, True where a position stays.
    """

    masks: Callable[[str, int], npt.NDArray[np.bool_]]

    def mask(self, node: Node, axis: int) -> npt.NDArray[np.bool_]:
        """True where a position along an axis stays."""
        return self.masks(node.name, axis)

    def size(self, node: Node, axis: int) -> int:
        """Positions that stay along an axis."""
        return int(self.mask(node, axis).sum())

    def parts(self, node: Node, axis: int, count: int) -> int:
        """Of so many equal parts of an axis, those with a position that stays."""
        return int(self.mask(node, axis).reshape(count, -1).any(axis=1).sum())


def edit_groups(argument: str) -> Callable[[Call, Kept], Edited | None]:
    """The edit of an operation that works on groups of the channels along axis 1: as many as have a channel left."""

    def edit(call: Call, kept: Kept) -> Edited | None:
        source = next(call.tensor_nodes())
        left = kept.parts(source, 1, int(call[argument]))
        return None if left == int(call[argument]) else Edited({argument: left})

    return edit


def named_arguments(node: Node) -> dict[str, Any]:
    """All arguments of an ATen call by the names of its schema, defaults filled in."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return {f"arg{i}": value for i, value in enumerate(node.args)} | dict(node.kwargs)
    named: dict[str, Any] = {}
    for position, argument in enumerate(schema.arguments):
        if position < len(node.args) and not argument.kwarg_only:
            named[argument.name] = node.args[position]
        elif argument.name in node.kwargs:
            named[argument.name] = node.kwargs[argument.name]
        elif argument.has_default_value():
            named[argument.name] = argument.default_value
    return named


def _is_list(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, list | tuple) and any(hasattr(item, "shape") for item in value)
