"""Models that cannot be traced as a whole: the parts that can be, run one after the other, without what lies between them.

A detector's backbone and heads are plain networks. What connects them (anchors, non-maximum suppression, lists of images) may
depend on the values of tensors, which a traced program cannot. So the parts are traced, and the rest stays as it is: whatever
goes into a part or comes out of it keeps its size.

This module knows nothing of tracing, because a plan applies without it.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils import _pytree as pytree

from edgeprune.errors import PlanError
from edgeprune.nesting import read_nesting

Leaf = tuple[str, Any]
"""``("input", i)``, ``("part", (i, j))`` for output tensor ``j`` of part ``i``, or ``("value", x)``."""


@dataclass(frozen=True)
class Part:
    """One call of one submodule.

    Attributes:
        path: Of the submodule.
        arguments: How ``(args, kwargs)`` are nested, as ``torch.utils._pytree.treespec_dumps`` writes it.
        leaves: Where each of their leaves comes from.
    """

    path: str
    arguments: str
    leaves: tuple[Leaf, ...]

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        leaves = [[kind, list(value) if kind == "part" else value] for kind, value in self.leaves]
        return {"path": self.path, "arguments": self.arguments, "leaves": leaves}

    @classmethod
    def from_json(cls, values: Any, index: int, inputs: int) -> Part:
        """From JSON values.

        Args:
            values: What `to_json` gave.
            index: How many parts run before it.
            inputs: How many inputs all parts have together.

        Raises:
            PlanError: If they are not those of a part.
        """
        try:
            leaves = tuple((kind, tuple(value) if kind == "part" else value) for kind, value in values["leaves"])
            part = cls(str(values["path"]), str(values["arguments"]), leaves)
            sound = part.path and all(_is_leaf(kind, value, index, inputs) for kind, value in leaves)
        except (TypeError, ValueError, KeyError) as error:
            raise PlanError(f"a part of a plan must have a path, arguments and leaves, found {values!r}.") from error
        if not sound or read_nesting(part.arguments).num_leaves != len(leaves):
            raise PlanError(f"a part of a plan must say where each argument comes from, found {values!r}.")
        return part


def _is_leaf(kind: str, value: Any, index: int, inputs: int) -> bool:
    if kind == "part":
        return len(value) == 2 and all(_is_index(item) for item in value) and value[0] < index
    if kind == "input":
        return _is_index(value) and value < inputs
    return kind == "value" and (value is None or isinstance(value, bool | int | float | str))


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


class _PartsForward(nn.Module):
    """Runs the parts; mixed in front of the model's own class."""

    parts: ClassVar[tuple[Part, ...]] = ()

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """All tensors that come out of the parts, part by part.

        Args:
            inputs: What the parts take and no other part gives.
        """
        outputs: list[list[torch.Tensor]] = []
        for part in self.parts:
            leaves = [
                inputs[value] if kind == "input" else outputs[value[0]][value[1]] if kind == "part" else value
                for kind, value in part.leaves
            ]
            args, kwargs = pytree.tree_unflatten(leaves, read_nesting(part.arguments))
            outputs.append(tensors_of(self.get_submodule(part.path)(*args, **kwargs)))
        return tuple(tensor for found in outputs for tensor in found)


def core_of(model: nn.Module, parts: Sequence[Part]) -> nn.Module:
    """A model with a forward of its parts alone; submodules, parameters and their names are the model's own, shared.

    Without parts it is the model itself.

    Raises:
        PlanError: If the model has no submodule of that path.
    """
    if not parts:
        return model
    known = {name for name, _ in model.named_modules(remove_duplicate=False)}
    missing = [part.path for part in parts if part.path not in known]
    if missing:
        raise PlanError(f"a model must have the parts that its plan names, found no submodule {missing[0]!r}.")
    core = copy.copy(model)
    # What is bound to the whole (hooks, a forward put on the instance) has no say in its parts.
    core.__dict__.pop("forward", None)
    for name in [name for name in core.__dict__ if name.startswith(("_forward_hooks", "_forward_pre_hooks"))]:
        core.__dict__[name] = OrderedDict()
    core.__class__ = type(f"{type(model).__name__}Parts", (_PartsForward, type(model)), {"parts": tuple(parts)})
    return core


def tensors_of(tree: Any) -> list[torch.Tensor]:
    """The tensors in nested values, in order."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def parts_from_json(values: Sequence[Mapping[str, Any]], inputs: int) -> tuple[Part, ...]:
    """Parts in the order in which they run, and how many inputs they have together.

    Raises:
        PlanError: If one is damaged.
    """
    return tuple(Part.from_json(item, index, inputs) for index, item in enumerate(values))
