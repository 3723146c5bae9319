"""What can be decided on its own: a residual branch with its channel groups and its tiled layers, or a layer outside of any."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgeprune.allocation.choices import choices

if TYPE_CHECKING:
    from edgeprune.allocation.choices import Choice
    from edgeprune.graph.branches import ResidualBranch
    from edgeprune.graph.channel_graph import ChannelGraph
    from edgeprune.surgery.constraints import WidthRule


@dataclass(frozen=True)
class Section:
    """A part of the model outside of which nobody sees what is left of it.

    Attributes:
        choices: Widths to decide: of heads, head dimensions, hidden units.
        layers: Weights that are cut into tiles.
        lead: Group whose width 0 takes the whole branch away, or None where the branch stays.
    """

    choices: tuple[Choice, ...]
    layers: tuple[str, ...]
    lead: str | None = None


def sections(
    graph: ChannelGraph, rules: Mapping[str, WidthRule], layers: Collection[str]
) -> tuple[tuple[Section, ...], tuple[str, ...]]:
    """The sections of a model, and the groups that lie in none of them: those stay whole.

    Channels that pass by branches (those of the residual stream) are part of the cost of every layer at once, so they are not
    decided here. Branches whose widths are tied are one section.

    Args:
        graph: The traced model.
        rules: What widths must respect.
        layers: Weights that are cut into tiles.
    """
    inner = _innermost(graph.branches)
    branch_of = {group: place for place, branch in enumerate(inner) for group in branch.groups}
    decisions = [choice for choice in choices(graph.groups, rules) if not choice.frozen]
    inside = [choice for choice in decisions if all(group in branch_of for group in choice.groups)]
    root = list(range(len(inner)))
    for choice in inside:
        places = {_root(root, branch_of[group]) for group in choice.groups}
        for place in places:
            root[place] = min(places)
    found, taken = [], set[str]()
    for place in range(len(inner)):
        members = [inner[one] for one in range(len(inner)) if _root(root, one) == place]
        if not members:
            continue
        own = tuple(choice for choice in inside if _root(root, branch_of[choice.groups[0]]) == place)
        tensors = {name for branch in members for name in branch.tensors}
        tiled = tuple(name for name in layers if name in tensors and name not in taken)
        taken |= set(tiled)
        removable = len(members) == 1 and any(members[0].lead in one.groups and one.removable for one in own)
        if own or tiled:
            found.append(Section(own, tiled, members[0].lead if removable else None))
    found += [Section((), (name,)) for name in layers if name not in taken]
    outside = tuple(group for choice in decisions if choice not in inside for group in choice.groups)
    return tuple(found), outside


def _innermost(branches: Collection[ResidualBranch]) -> list[ResidualBranch]:
    """Branches none of whose groups lie in another one that was taken, the smallest first taken, in program order."""
    taken: list[ResidualBranch] = []
    for branch in sorted(branches, key=lambda one: len(one.nodes)):
        if all(set(branch.groups).isdisjoint(other.groups) for other in taken):
            taken.append(branch)
    return [branch for branch in branches if branch in taken]


def _root(root: list[int], place: int) -> int:
    while root[place] != place:
        place = root[place]
    return place
