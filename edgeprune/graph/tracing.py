"""`trace`: from a model to its channel graph."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
from torch import nn

from edgeprune.graph.atoms import KEPT, Event, Ids
from edgeprune.graph.capture import Capture, capture, module_path
from edgeprune.graph.channel_graph import ChannelGraph, ChannelGroup, FrozenAxis, Member, Role, model_signature
from edgeprune.graph.forms import ShapeTable, SizeForm
from edgeprune.graph.modules import module_facts
from edgeprune.graph.naming import Made, group_names, makers
from edgeprune.graph.norm_groups import in_norm_groups
from edgeprune.graph.propagation import Producer, Propagation
from edgeprune.graph.units import Units, find_units

_ALONE = "no other channel goes to the same layers, and a group must keep one"


def trace(model: nn.Module, example_inputs: Any) -> ChannelGraph:
    """Capture a model and find which channels hang together.

    The model is captured in eval form on a copy of its module tree and stays untouched: parameters, buffers, hooks and
    mode. The program shares its weights with the model. Where the model as a whole cannot be captured but parts of it can,
    the graph is that of the parts (`ChannelGraph.parts`), and whatever goes into or comes out of them keeps its size.

    Args:
        model: Any module that ``torch.export`` takes.
        example_inputs: A tensor, a tuple of positional arguments or a dict of keyword arguments; the first axis of its
            tensors is the deployment batch.

    Raises:
        InputError: If the example inputs do not fit.
        TraceError: If the model cannot be captured, nor parts with a channel to cut; the message names the user's line.
    """
    captured = capture(model, example_inputs)
    graph = _graph(model, captured)
    if captured.failure is not None and not graph.groups:
        raise captured.failure
    return graph


def _graph(model: nn.Module, captured: Capture) -> ChannelGraph:
    walk = Propagation(captured)
    walk.run()
    units = find_units(walk)
    solid = [classes for classes in units.groups if len(classes) > 1]
    offsets = np.concatenate([[0], np.cumsum([len(classes) for classes in solid], dtype=np.int64)])
    code_of = np.full(len(units.classes.event_of_class) + 1, KEPT, dtype=np.int64)
    for classes, offset in zip(solid, offsets, strict=False):
        code_of[classes] = np.arange(offset, offset + len(classes))
    unit_of = _codes(units, code_of)
    unit_of |= in_norm_groups(captured, unit_of)
    made = makers(walk, units, solid)
    names = group_names(walk, units, solid, made)
    members = _members(walk, unit_of, offsets)
    groups = [
        ChannelGroup(name, len(classes), _unit(walk, makes, own), tuple(own), tuple(dict.fromkeys(makes.nodes)))
        for name, classes, makes, own in zip(names, solid, made, members, strict=True)
    ]
    return ChannelGraph(
        model=model,
        groups=tuple(groups),
        frozen=tuple(_frozen(walk, units, code_of)),
        program=captured.program,
        example_inputs=captured.inputs,
        input_names=captured.input_names,
        signature=model_signature(model),
        modules=module_facts(model),
        batch=captured.batch,
        dynamic_batch=captured.dynamic_batch,
        note=captured.note,
        unit_of=unit_of,
        offset_of={name: int(offset) for name, offset in zip(names, offsets, strict=False)},
        table=_table(unit_of, {g.name: g.size for g in groups}, offsets, _aliases(model, walk)),
        parts=captured.parts,
        failure="" if captured.failure is None else captured.failure.message.removesuffix("."),
    )


def _unit(walk: Propagation, made: Made, members: list[Member]) -> str:
    balanced = any(member.parameter in walk.balanced for member in members if member.role != "vector")
    return made.kind or ("conv-group channel" if balanced else "channel")


def _codes(units: Units, code_of: Ids) -> dict[str, tuple[Ids, ...]]:
    """Class per position to code per position; equal arrays are shared."""
    shared: dict[bytes, Ids] = {}
    coded = {}
    for name, axes in units.axes.items():
        arrays = []
        for classes in axes:
            key = classes.tobytes()
            if key not in shared:
                shared[key] = code_of[classes]
            arrays.append(shared[key])
        coded[name] = tuple(arrays)
    return coded


def _members(walk: Propagation, unit_of: dict[str, tuple[Ids, ...]], offsets: Ids) -> list[list[Member]]:
    members: list[list[Member]] = [[] for _ in offsets[:-1]]
    # Axes that are cut alike share their codes, and so their indices.
    known: dict[int, list[tuple[int, tuple[tuple[int, ...], ...]]]] = {}
    for name in walk.parameter_shapes:
        for axis, codes in enumerate(unit_of[name]):
            if id(codes) not in known:
                known[id(codes)] = list(_indices(codes, offsets))
            role = cast(Role, walk.roles.get((name, axis), "vector"))
            for index, indices in known[id(codes)]:
                members[index].append(Member(name, axis, indices, role))
    return members


def _indices(codes: Ids, offsets: Ids) -> Iterator[tuple[int, tuple[tuple[int, ...], ...]]]:
    """Every group on an axis, and per unit of it the positions that go with it."""
    positions = np.broadcast_to(np.arange(codes.shape[1]), codes.shape)[codes >= 0]
    codes = codes[codes >= 0]
    if not len(codes):
        return
    order = np.lexsort((positions, codes))
    codes, positions = codes[order], positions[order]
    owners = np.searchsorted(offsets, codes, side="right") - 1
    present, starts = np.unique(owners, return_index=True)
    for index, own in zip(present.tolist(), np.split(positions, starts[1:]), strict=True):
        size = int(offsets[index + 1] - offsets[index])
        yield index, tuple(map(tuple, own.reshape(size, -1).tolist()))


def _aliases(model: nn.Module, walk: Propagation) -> dict[str, str]:
    """Every name of a tied parameter or buffer to the name that the program uses."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: walk.canonical[id(tensor)] for name, tensor in named if id(tensor) in walk.canonical}


def _table(
    unit_of: dict[str, tuple[Ids, ...]], sizes: dict[str, int], offsets: Ids, aliases: dict[str, str]
) -> ShapeTable:
    names = list(sizes)
    number: dict[SizeForm, int] = {}
    known: dict[int, int] = {}

    def form_of(codes: Ids) -> int:
        if id(codes) not in known:
            owners = np.sort(np.where(codes >= 0, np.searchsorted(offsets, codes, side="right") - 1, -1), axis=0)
            terms = []
            constant = 0
            for owner, count in _counted(owners):
                groups = tuple(sorted(names[index] for index in owner if index >= 0))
                if not groups:
                    constant = count
                else:
                    terms.append((groups, count // math.prod(sizes[group] for group in groups)))
            known[id(codes)] = number.setdefault(SizeForm(constant, tuple(sorted(terms))), len(number))
        return known[id(codes)]

    axes = {name: tuple(form_of(codes) for codes in arrays) for name, arrays in unit_of.items()}
    for name, target in aliases.items():
        if name not in axes and target in axes:
            axes[name] = axes[target]
    return ShapeTable(sizes, tuple(number), axes)


def _counted(columns: Ids) -> list[tuple[list[int], int]]:
    """The distinct columns and how often each occurs."""
    distinct, counts = np.unique(columns, axis=1, return_counts=True)
    return list(zip(distinct.T.tolist(), counts.tolist(), strict=True))


def _frozen(walk: Propagation, units: Units, code_of: Ids) -> list[FrozenAxis]:
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
        layers = list(dict.fromkeys(producer.name for producer in producers))
        name = layers[0] + (f" (+{len(layers) - 1} layer{'s' if len(layers) > 2 else ''})" if len(layers) > 1 else "")
        why = Event("it has a single channel" if size == 1 else _ALONE, "") if event < 0 else events[event]
        nodes = tuple(dict.fromkeys(producer.node for producer in producers))
        found.append(FrozenAxis(name, size, why.reason, why.op, why.source, nodes))
    return found


def _staying(units: Units, code_of: Ids, ids: Ids) -> dict[int, Ids]:
    """Atoms of a producer that stay, by the event that is responsible (-1: none, they hang together)."""
    by_event: dict[int, Ids] = {}
    if (ids < 0).any():
        by_event[-1] = ids[ids < 0]
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
