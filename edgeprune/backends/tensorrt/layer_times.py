"""From the layers that TensorRT has timed to the groups of operators that a kernel is.

A layer tells by its ``Metadata`` which nodes of the model it computes. A group that several layers share is their sum; layers
that only bring a tensor into another layout go with the layer that they are named after, since they are there for its sake.
Where one layer computes several groups none of them has a time of its own, and none is made up. In int8 the builder takes the
nodes that quantize into the layers beside them, across groups: they make no group, and only where they are a layer of their own
it counts for what reads its numbers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from edgeprune.backends.tensorrt.exports import occurrences

if TYPE_CHECKING:
    from edgeprune.backends.tensorrt.fusing import Group

_REFORMAT = re.compile(r"^Reformatting CopyNode for (?:Input|Output) Tensor \d+ to (.*)$", re.DOTALL)


@dataclass(frozen=True)
class BuiltLayer:
    """One layer of an engine: its name, and the names of the model's nodes that it computes."""

    name: str
    nodes: tuple[str, ...]


def group_times(
    built: Sequence[BuiltLayer], timed: Sequence[tuple[str, float]], groups: Sequence[Group]
) -> dict[int, float]:
    """Time of each group that has one of its own.

    Args:
        built: Layers of the engine as it was built, in order.
        timed: Name and time of each layer, milliseconds, in the order of a run. A layer without a time counts as none.
        groups: Names of nodes that belong together.

    Returns:
        Place of a group in `groups` to its time, milliseconds, above 0.
    """
    place = {node: number for number, group in enumerate(groups) for node in group}
    times = dict(zip(occurrences([name for name, _ in timed]), (ms for _, ms in timed), strict=True))
    touched: list[tuple[set[int], float]] = []
    named: dict[str, set[int]] = {}
    for layer, key in zip(built, occurrences([layer.name for layer in built]), strict=True):
        reached = {place[node] for node in layer.nodes if node in place}
        named.setdefault(layer.name, reached)
        touched.append((reached, times.get(key, 0.0)))
    for number, layer in enumerate(built):
        copied = _REFORMAT.match(layer.name)
        if copied is not None and not touched[number][0]:
            touched[number] = (named.get(copied[1], set()), touched[number][1])
    # Groups that one layer computes together have no time of their own, nor has what shares a layer with one of them.
    shared = set().union(*(reached for reached, _ in touched if len(reached) > 1))
    found: dict[int, float] = {}
    for reached, ms in touched:
        for group in reached - shared:
            found[group] = found.get(group, 0.0) + ms
    return {group: ms for group, ms in found.items() if ms > 0}


def unquantized(built: Sequence[BuiltLayer], served: Mapping[str, str]) -> tuple[BuiltLayer, ...]:
    """Layers without the nodes that quantize: a layer that begins or ends with some computes what the others of its nodes say.

    Args:
        built: Layers of an int8 engine.
        served: Name of each quantize and dequantize node to that of the node for whose sake it is there. A layer that only
            quantizes counts as one of that node.
    """
    found = []
    for layer in built:
        working = [node for node in layer.nodes if node not in served]
        found.append(replace(layer, nodes=tuple(working or dict.fromkeys(served[node] for node in layer.nodes))))
    return tuple(found)


def built_layers(record: Mapping[str, Any]) -> tuple[BuiltLayer, ...]:
    """Layers of the record of a build (``tensorrt.json``); none where its export could not be read."""
    return tuple(BuiltLayer(entry["layer"], tuple(entry["nodes"])) for entry in record["kernels"] or ())
