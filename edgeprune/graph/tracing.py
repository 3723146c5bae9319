"""`trace`: from a model to its channel graph."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
from torch import nn

from edgeprune.graph.atoms import KEPT, Ids
from edgeprune.graph.capture import Capture, capture
from edgeprune.graph.channel_graph import ChannelGraph, ChannelGroup, Member, Role, model_signature
from edgeprune.graph.forms import ShapeTable, SizeForm
from edgeprune.graph.frozen import left_alone
from edgeprune.graph.modules import module_facts
from edgeprune.graph.naming import Made, group_names, makers
from edgeprune.graph.norm_groups import in_norm_groups
from edgeprune.graph.propagation import Propagation
from edgeprune.graph.units import Units, find_units

log = logging.getLogger("edgeprune.graph")


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
        InputError: If the model is no module, or the example inputs do not fit.
        TraceError: If the model cannot be captured, nor parts with a channel to cut; the message names the user's line.
    """
    captured = capture(model, example_inputs)
    graph = _graph(model, captured)
    if captured.failure is not None and not graph.groups:
        raise captured.failure
    if captured.note:
        log.warning("captured for batch %s alone: %s", captured.batch, captured.note)
    if captured.failure is not None:
        paths = ", ".join(part.path for part in captured.parts)
        log.warning("captured in parts (%s): %s", paths, captured.failure)
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
        frozen=tuple(left_alone(walk, units, code_of)),
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
    if len(columns) == 1:  # most, and quicker
        values, numbers = np.unique(columns[0], return_counts=True)
        return [([value], number) for value, number in zip(values.tolist(), numbers.tolist(), strict=True)]
    distinct, counts = np.unique(columns, axis=1, return_counts=True)
    return list(zip(distinct.T.tolist(), counts.tolist(), strict=True))
