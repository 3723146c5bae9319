"""From groups and rules to independent decisions: groups that are tied share one width, frozen ones have no choice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgeprune.allocation._base import Cost, Damage, Rules
from edgeprune.errors import ConstraintError, ModelError
from edgeprune.spec import smallest_width

if TYPE_CHECKING:
    from edgeprune.graph.channel_graph import ChannelGroup


@dataclass(frozen=True)
class Choice:
    """One width to decide.

    Attributes:
        groups: Names of the groups that get this width; one, or several tied ones.
        size: Units of each of them.
        allowed: Every width above 0 that the rules allow, descending; the first is `size`. One entry when frozen: 0 where the
            branch that they lie in is gone for good.
        removable: Whether width 0 is allowed too: with it goes a whole residual branch, other groups of it whatever they have.
    """

    groups: tuple[str, ...]
    size: int
    allowed: tuple[int, ...]
    removable: bool = False

    @property
    def frozen(self) -> bool:
        """Whether there is nothing to decide."""
        return len(self.allowed) == 1 and not self.removable

    @property
    def widest(self) -> int:
        """The largest width that is allowed."""
        return self.allowed[0]

    def at_most(self, width: float) -> int:
        """The largest allowed width that is not above `width`; the smallest allowed one where all are above."""
        for allowed in self.allowed:
            if allowed <= width:
                return allowed
        return self.allowed[-1]

    def nearest(self, width: float) -> int:
        """The allowed width closest to `width`; of two equally close ones the larger."""
        return min(self.allowed, key=lambda allowed: (abs(allowed - width), -allowed))

    def candidates(self, cost: Cost) -> tuple[int, ...]:
        """Widths worth considering, descending: the cost's stair edges, moved down to allowed widths, and the smallest
        allowed width, so that what is called infeasible is; and 0 where it is allowed."""
        if self.frozen:
            return self.allowed
        edges = {self.at_most(width) for group in self.groups for width in cost.candidates(group)}
        ends = {self.size, self.allowed[-1]} | ({0} if self.removable else set())
        return tuple(sorted(edges | ends, reverse=True))

    def damage(self, curves: Damage) -> dict[int, float]:
        """Damage by width, summed over the tied groups, for the allowed widths.

        Raises:
            ModelError: A curve is missing or has the wrong length.
        """
        if self.frozen:
            return {self.widest: 0.0}
        for name in self.groups:
            if name not in curves:
                raise ModelError(f"every group that can be pruned must have a damage curve, found none for {name!r}.")
            if len(curves[name]) != self.size + 1:
                raise ModelError(
                    f"the damage curve of {name!r} must have {self.size + 1} values, found {len(curves[name])}."
                )
        widths = (*self.allowed, 0) if self.removable else self.allowed
        return {width: float(sum(curves[name][width] for name in self.groups)) for width in widths}


def choices(groups: Sequence[ChannelGroup], rules: Rules | None = None) -> tuple[Choice, ...]:
    """The independent decisions, in the order of the groups.

    A width is allowed when it is the full size, or at least `min_width` (`edgeprune.spec.smallest_width` without a rule) and
    a multiple of `multiple_of`; 0 where its rule says that it is removable and it is tied to none, and nothing but 0 where it
    says that it is absent. Tied groups allow what all of them allow; one frozen group freezes those tied to it.

    Raises:
        ConstraintError: A group is tied to one that does not exist or has another size.
    """
    rules = rules or {}
    sizes = {group.name: group.size for group in groups}
    root = _roots(sizes, rules)
    members: dict[str, list[str]] = {}
    for name in sizes:
        members.setdefault(root[name], []).append(name)
    found = []
    for names in members.values():
        size = sizes[names[0]]
        for name in names:
            if sizes[name] != size:
                raise ConstraintError(
                    f"tied groups must have equal sizes, found {names[0]!r} with {size} and {name!r} with {sizes[name]}."
                )
        allowed = set(range(1, size + 1))
        for name in names:
            allowed &= _allowed(name, size, rules)
        rule = rules.get(names[0])
        removable = len(names) == 1 and rule is not None and rule.removable and not rule.frozen and not rule.absent
        absent = any(name in rules and rules[name].absent for name in names)
        widths = (0,) if absent else tuple(sorted(allowed | {size}, reverse=True))
        found.append(Choice(groups=tuple(names), size=size, allowed=widths, removable=removable))
    return tuple(found)


def expand(decisions: Sequence[Choice], widths: Sequence[int]) -> dict[str, int]:
    """One width per decision, as one width per group."""
    return {name: width for choice, width in zip(decisions, widths, strict=True) for name in choice.groups}


def _allowed(name: str, size: int, rules: Rules) -> set[int]:
    rule = rules.get(name)
    least = smallest_width(size) if rule is None or rule.min_width is None else 1
    return {width for width in (range(1, size + 1) if rule is None else rule.widths(size)) if width >= least}


def _roots(sizes: Mapping[str, int], rules: Rules) -> dict[str, str]:
    parent = {name: name for name in sizes}

    def find(name: str) -> str:
        while parent[name] != name:
            name = parent[name]
        return name

    for name in sizes:
        rule = rules.get(name)
        if rule is None or rule.tied_to is None:
            continue
        if rule.tied_to not in sizes:
            raise ConstraintError(f"group {name!r} must be tied to a group of the model, found {rule.tied_to!r}.")
        parent[find(name)] = find(rule.tied_to)
    return {name: find(name) for name in sizes}
