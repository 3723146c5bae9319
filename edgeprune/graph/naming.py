"""Names that a person recognizes: which layers make the channels of a group, and what one unit of it is."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from edgeprune.graph.atoms import Ids
from edgeprune.graph.propagation import Propagation
from edgeprune.graph.units import Units

PLURAL = {"head": "heads", "head dimension": "head dimensions"}


@dataclass
class Made:
    """Who makes the channels of one group.

    Attributes:
        layers: Module path of each layer to the first and one past the last of its channels in the group.
        weights: Names of the weights that make them, as a person writes them: a layer's own weight is the layer.
        nodes: Program nodes of these layers.
        kind: ``"head"``, ``"head dimension"``, or ``""``.
    """

    layers: dict[str, tuple[int, int]] = field(default_factory=dict)
    weights: list[str] = field(default_factory=list)
    nodes: list[str] = field(default_factory=list)
    kind: str = ""


def makers(walk: Propagation, units: Units, groups: list[Ids]) -> list[Made]:
    """Per group of classes who makes its channels."""
    owner = np.full(len(units.classes.event_of_class) + 1, -1, dtype=np.int64)
    for index, classes in enumerate(groups):
        owner[classes] = index
    made = [Made() for _ in groups]
    for producer in walk.producers:
        owners = owner[units.classes.units_of(producer.ids)]
        for index in np.unique(owners[owners >= 0]).tolist():
            where = np.flatnonzero((owners == index).any(axis=0))
            made[index].layers.setdefault(producer.name, (int(where[0]), int(where[-1]) + 1))
            made[index].weights.append(producer.parameter.removesuffix(".weight"))
            made[index].nodes.append(producer.node)
    for ids, kind in reversed(walk.kinds):
        for index in np.unique(owner[units.classes.units_of(ids)]).tolist():
            if index >= 0:
                made[index].kind = kind
    return made


def group_names(walk: Propagation, units: Units, groups: list[Ids], made: list[Made]) -> list[str]:
    """Module path of the first layer that makes the channels, and how many more do.

    Heads and head dimensions say so. Where one layer makes several groups that would have one name, the range of its
    channels is added, or, where all of them have the same, the name of its weight tells them apart.
    """
    first = [next(iter(group.layers), "") or _holder(walk, units, own) for group, own in zip(made, groups, strict=True)]
    ranges: dict[tuple[str, str], set[tuple[int, int]]] = {}
    alike = Counter((name, group.kind) for name, group in zip(first, made, strict=True))
    for layer, group in zip(first, made, strict=True):
        ranges.setdefault((layer, group.kind), set()).add(next(iter(group.layers.values()), (0, 0)))
    names: list[str] = []
    for layer, group in zip(first, made, strict=True):
        name = layer
        if alike[layer, group.kind] > 1 and group.layers:
            start, stop = next(iter(group.layers.values()))
            same = len(ranges[layer, group.kind]) == 1
            name = (group.weights[0] or name) if same else f"{name}[{start}:{stop}]"
        if group.kind:
            name += f" {PLURAL[group.kind]}"
        more = len(group.layers) - 1
        if more > 0:
            name += f" (+{more} layer{'s' if more > 1 else ''})"
        base, copy = name, 2
        while name in names:
            name, copy = f"{base} #{copy}", copy + 1
        names.append(name)
    return names


def _holder(walk: Propagation, units: Units, classes: Ids) -> str:
    """Name of a group that no layer makes by itself: the first parameter that it cuts, or the program node it lies in."""
    for names in (walk.parameter_shapes, units.axes):
        for name in names:
            if any(np.isin(axis, classes).any() for axis in units.axes[name]):
                return name.removesuffix(".weight")
    return "channels"
