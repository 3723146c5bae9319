"""What was left alone, and why."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from edgeprune.graph.atoms import Classes, Event, Ids
from edgeprune.graph.capture import module_path
from edgeprune.graph.channel_graph import FrozenAxis
from edgeprune.graph.naming import PLURAL
from edgeprune.graph.propagation import Producer, Propagation
from edgeprune.graph.units import Units

_TIED = "its weights are also read along an axis that keeps its size"
_ALONE = "no other channel goes to the same layers, and a group must keep one"


def left_alone(walk: Propagation, units: Units, code_of: Ids) -> list[FrozenAxis]:
    """Inputs, operations without a rule, and the layers whose channels stay; layers with one reason are one entry."""
    events = walk.atoms.events
    found: list[FrozenAxis] = []
    for name in walk.captured.input_names:
        label = walk.labels[name]
        shape = () if not hasattr(label, "shape") else label.shape  # type: ignore[union-attr]
        size = shape[1] if len(shape) > 1 else 1
        found.append(FrozenAxis(name, size, "an input of the model keeps its size", "input", "", (name,)))
    for call, event, size in walk.frozen_calls:
        name = module_path(call.node) or call.node.name
        why = events[event]
        found.append(FrozenAxis(name, size, why.reason, why.op, why.source, (call.node.name,)))
    merged: dict[tuple[bytes, int], tuple[list[Producer], int]] = {}
    for producer in walk.producers:
        staying = _staying(units, code_of, producer.ids)
        for event, classes in staying.items():
            producers, _ = merged.setdefault((classes.tobytes(), event), ([], len(classes)))
            producers.append(producer)
    for (_, event), (producers, size) in merged.items():
        layers = list(dict.fromkeys(producer.name or producer.node for producer in producers))
        name = layers[0] + (f" (+{len(layers) - 1} layer{'s' if len(layers) > 2 else ''})" if len(layers) > 1 else "")
        apart = "it has a single channel" if size == 1 else _ALONE if event == -1 else _TIED
        why = Event(apart, "") if event < 0 else events[event]
        nodes = tuple(dict.fromkeys(producer.node for producer in producers))
        found.append(FrozenAxis(name, size, why.reason, why.op, why.source, nodes))
    return [*found, *_factors(walk, units, code_of)]


def _factors(walk: Propagation, units: Units, code_of: Ids) -> Iterator[FrozenAxis]:
    """Heads that stay although their dimensions can go, and the like: one side of an axis that is a product.

    Their layers' latency is that of the group on the other side, so they name no nodes.
    """
    classes, told = units.classes, set[tuple[bytes, int]]()
    for product in walk.atoms.products:
        pinned = [_event_of(classes, part) for part in product.parts]
        if all(event < 0 for event in pinned) or not (code_of[classes.units_of(product.ids.ravel())] >= 0).any():
            continue
        layers = [
            producer.name or producer.node
            for producer in walk.producers
            if np.isin(producer.ids[producer.ids >= 0], product.ids).any()
        ]
        for part, event in zip(product.parts, pinned, strict=True):
            key = (np.unique(classes.of_atom[part[part >= 0]]).tobytes(), event)
            if event < 0 or not layers or key in told:
                continue
            told.add(key)
            kind = next((kind for ids, kind in walk.kinds if np.isin(part, ids).all()), None)
            if kind is None:
                # The three of a fused projection, conv groups, halves: nobody would remove one of those.
                continue
            name = f"{layers[0]} {PLURAL[kind]}" + (f" (+{len(layers) - 1})" if len(layers) > 1 else "")
            why = walk.atoms.events[event]
            yield FrozenAxis(name, len(part), why.reason, why.op, why.source, ())


def _event_of(classes: Classes, part: Ids) -> int:
    """The event that pinned all of some atoms, or -1 where one is free."""
    atoms = part[part >= 0]
    events = classes.event_of_class[classes.of_atom[atoms]]
    return int(events.min()) if len(atoms) > 1 and (events >= 0).all() else -1


def _staying(units: Units, code_of: Ids, ids: Ids) -> dict[int, Ids]:
    """Atoms of a producer that stay, by the event that is responsible (-1: none, they hang together; -2: tied)."""
    by_event: dict[int, Ids] = {}
    if (ids < 0).any():
        by_event[-2] = ids[ids < 0]
    atoms = ids[ids >= 0]
    if not len(atoms):
        return by_event
    staying = (code_of[units.classes.units_of(atoms)] < 0).all(axis=0)
    classes = units.classes.of_atom[atoms[staying]]
    events = units.classes.event_of_class[classes]
    for event in np.unique(events).tolist():
        own = classes[events == event]
        by_event[event] = np.concatenate([by_event[event], own]) if event in by_event else own
    return by_event
