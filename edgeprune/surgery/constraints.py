"""From the user's patterns to a rule per group."""

from __future__ import annotations

import operator
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import lcm
from typing import TYPE_CHECKING

from edgeprune.errors import ConstraintError
from edgeprune.spec import Constraints

if TYPE_CHECKING:
    from torch import nn

    from edgeprune.graph.branches import ResidualBranch
    from edgeprune.graph.channel_graph import ChannelGraph, ChannelGroup


@dataclass(frozen=True)
class WidthRule:
    """Which widths a group may have.

    Attributes:
        min_width: Fewest units that may be kept; None where nobody asked for any number.
        multiple_of: Kept widths are a multiple of this, or the whole group.
        frozen: The group stays whole.
        tied_to: Another group whose width this one takes, or None.
        removable: The group may keep nothing, because the residual branch that it is in goes with it.
        absent: The group keeps nothing: the residual branch that it is in is gone for good.
    """

    min_width: int | None = None
    multiple_of: int = 1
    frozen: bool = False
    tied_to: str | None = None
    removable: bool = False
    absent: bool = False

    def width(self, wanted: int, size: int, *, also_multiple_of: int = 1) -> int:
        """The allowed width nearest to the wanted one; the larger of two that are equally near."""
        if self.frozen:
            return size
        return min(
            self.widths(size, also_multiple_of=also_multiple_of), key=lambda width: (abs(width - wanted), -width)
        )

    def widths(self, size: int, *, also_multiple_of: int = 1) -> list[int]:
        """All allowed widths of a group of that size, ascending."""
        if self.absent:
            return [0]
        if self.frozen:
            return [size]
        allowed = [
            width
            for width in range(max(self.min_width or 1, 1), size + 1)
            if width % self.multiple_of == 0 and width % also_multiple_of == 0
        ]
        return allowed if size in allowed else [*allowed, size]


def require_possible(constraints: Constraints, model: nn.Module) -> None:
    """Refuse patterns that can match no group of a model, before it is traced; `resolve` has the last word.

    Groups and frozen axes are named after modules and weights, with a suffix (``"attn heads"``, ``"fc[0:64]"``), or after
    operations and inputs where no layer makes them. A pattern that could still be one of these passes.

    Raises:
        ConstraintError: A pattern matches nothing that the model has; near names are listed.
    """
    from inspect import signature

    from edgeprune.graph.channel_graph import raise_unknown_pattern

    layers = [
        name for name, module in model.named_modules() if name and next(module.parameters(False), None) is not None
    ]
    known = {name for name, _ in model.named_modules(remove_duplicate=False) if name}
    known |= {name for name, _ in model.named_parameters(remove_duplicate=False)}
    known |= {name for name, _ in model.named_buffers(remove_duplicate=False)}
    known |= set(signature(model.forward).parameters)
    asked = {
        "keep": constraints.keep,
        "min_width": tuple(constraints.min_width),
        "multiple_of": tuple(constraints.multiple_of),
        "same_as": (*constraints.same_as, *constraints.same_as.values()),
    }
    for what, patterns in asked.items():
        for pattern in patterns:
            if not _may_match(pattern, known) and not _is_operation(pattern):
                raise_unknown_pattern(pattern, layers, what)


def _may_match(pattern: str, names: Collection[str]) -> bool:
    """Whether a pattern matches a name, or could one that goes on behind it."""
    literal = re.split(r"[*?\[]", pattern, maxsplit=1)[0]
    # What goes on behind a name has no dot; it begins with " " or "[", or within what "*" and "?" stand for.
    heads = {
        pattern,
        *(pattern[:place] for place, sign in enumerate(pattern) if sign in " [?"),
        *(pattern[: place + 1] for place, sign in enumerate(pattern) if sign == "*" and "." not in pattern[place:]),
    } - {""}
    if any(_matches(name, head) for name in names for head in heads):
        return True
    return literal == "" and (pattern.startswith("[") or "." not in pattern or " " in pattern)


def _is_operation(pattern: str) -> bool:
    """Whether a pattern could be a node of a traced program: ``"add_3"``."""
    import torch

    literal = re.split(r"[*?\[ ]", pattern, maxsplit=1)[0]
    name = re.sub(r"(_\d*)+$", "", literal)
    return bool(name) and "." not in name and (hasattr(torch.ops.aten, name) or hasattr(operator, name))


def resolve(constraints: Constraints, graph: ChannelGraph) -> dict[str, WidthRule]:
    """The rule of every group.

    A pattern matches a group by its name or by the path of any layer that makes its channels. ``keep`` may also match
    what is frozen anyway.

    Raises:
        ConstraintError: If a pattern matches nothing (near names are listed) or asks for more than a group has.
    """
    rules = {group.name: WidthRule() for group in graph.groups}
    for pattern in constraints.keep:
        for group in _matching(pattern, graph, "keep", frozen_too=True):
            rules[group.name] = replace(rules[group.name], frozen=True)
    for pattern, least in constraints.min_width.items():
        for group in _matching(pattern, graph, "min_width"):
            if least > group.size:
                raise ConstraintError(
                    f"min_width of {group.name!r} must be at most its {group.size} units, found {least}."
                )
            rules[group.name] = replace(rules[group.name], min_width=max(least, rules[group.name].min_width or 1))
    for pattern, multiple in constraints.multiple_of.items():
        for group in _matching(pattern, graph, "multiple_of"):
            rules[group.name] = replace(rules[group.name], multiple_of=multiple)
    for pattern, target in constraints.same_as.items():
        leader = next(iter(_matching(target, graph, "same_as")))
        for group in _matching(pattern, graph, "same_as"):
            if group.name == leader.name:
                continue
            if group.size != leader.size:
                raise ConstraintError(
                    f"groups with the same width must have the same size, found {group.name!r} with {group.size} and "
                    f"{leader.name!r} with {leader.size}."
                )
            rules[group.name] = replace(rules[group.name], tied_to=leader.name)
    _untangle(rules)
    return rules


def with_removable(rules: dict[str, WidthRule], branches: Iterable[ResidualBranch]) -> dict[str, WidthRule]:
    """The rules when whole branches may go: those of which nothing is asked, by the width of their lead."""
    found = dict(rules)
    tied = {rule.tied_to for rule in rules.values()} - {None}
    for branch in branches:
        asked = (
            rules[name].frozen or rules[name].min_width is not None or rules[name].tied_to is not None or name in tied
            for name in branch.groups
        )
        if not any(asked):
            found[branch.lead] = replace(rules[branch.lead], removable=True)
    return found


def without(rules: Mapping[str, WidthRule], gone: Collection[str]) -> dict[str, WidthRule]:
    """The rules where the branches that some groups lie in are gone for good.

    Args:
        rules: By group.
        gone: All groups of these branches.
    """
    return {name: replace(rule, removable=False, absent=True) if name in gone else rule for name, rule in rules.items()}


def _untangle(rules: dict[str, WidthRule]) -> None:
    """Ties point at a group that is not tied itself; what a tied group asks for, its leader asks for too."""
    for name, rule in rules.items():
        seen = [name]
        while rule.tied_to is not None:
            if rule.tied_to in seen:
                raise ConstraintError(f"same_as must not go in a circle, found {' -> '.join([*seen, rule.tied_to])}.")
            seen.append(rule.tied_to)
            rule = rules[rule.tied_to]
        if len(seen) > 1:
            rules[name] = replace(rules[name], tied_to=seen[-1])
    for rule in list(rules.values()):
        if rule.tied_to is not None:
            leader = rules[rule.tied_to]
            joint = WidthRule(
                max((width for width in (leader.min_width, rule.min_width) if width is not None), default=None),
                lcm(leader.multiple_of, rule.multiple_of),
                leader.frozen or rule.frozen,
            )
            rules[rule.tied_to] = joint
    for name, rule in list(rules.items()):
        if rule.tied_to is not None:
            rules[name] = replace(rules[rule.tied_to], tied_to=rule.tied_to)


def _matching(pattern: str, graph: ChannelGraph, what: str, *, frozen_too: bool = False) -> list[ChannelGroup]:
    from edgeprune.graph.channel_graph import raise_unknown_pattern

    found = [group for group in graph.groups if any(_matches(name, pattern) for name in _names(group))]
    if not found and not (frozen_too and any(_matches(axis.name, pattern) for axis in graph.frozen)):
        names = list(dict.fromkeys(name for group in graph.groups for name in _names(group)))
        raise_unknown_pattern(pattern, names, what)
    return found


def _names(group: ChannelGroup) -> Iterator[str]:
    """The group's name and the paths of the layers that make its channels."""
    yield group.name
    for member in group.members:
        if member.role == "output":
            yield member.parameter.rpartition(".")[0] or member.parameter


def _matches(name: str, pattern: str) -> bool:
    return name == pattern or fnmatchcase(name, pattern)
