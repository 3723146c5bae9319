"""From labels to units: the smallest sets of atom classes whose removal leaves every tensor rectangular."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from edgeprune.graph.atoms import KEPT, Classes, Ids
from edgeprune.graph.labels import Label, compact
from edgeprune.graph.propagation import Propagation


@dataclass(frozen=True)
class Units:
    """Free classes sorted into groups.

    Attributes:
        classes: Solved atoms.
        groups: Per group its classes, one per unit, in channel order.
        axes: Per tensor (node or parameter), per axis the class of every position, `KEPT` where it stays.
    """

    classes: Classes
    groups: tuple[Ids, ...]
    axes: dict[str, tuple[Ids, ...]]


def find_units(walk: Propagation) -> Units:
    """Make every tensor rectangular, then put classes that occur in the same axes into one group."""
    classes = _rectangular(walk)
    axes = _axis_classes(walk, classes)
    return Units(classes, _groups(axes.values(), len(classes.event_of_class)), axes)


def _tensors(walk: Propagation) -> Iterator[tuple[str, Label]]:
    for name, found in walk.labels.items():
        if isinstance(found, Label):
            yield name, found
    for name, label in walk.plain.items():
        if label is not None:
            yield name, label


def _lists(walk: Propagation) -> Iterator[Label]:
    for found in walk.labels.values():
        if isinstance(found, list):
            yield from found


def _rectangular(walk: Propagation) -> Classes:
    """Only one axis of a tensor may lose positions at a time: of several, the one with the finest pieces."""
    classes = walk.atoms.solve()
    several = [label for _, label in _tensors(walk) if len(label.varied) > 1]
    several += [label for label in _lists(walk) if len(label.varied) > 1]
    for label in several:
        found = compact(classes.of(label.ids), label.shape)
        if len(found.varied) < 2 or not found.has_atoms:
            continue
        finest = max(found.varied, key=lambda axis: _pieces(found.ids, axis))
        event = walk.atoms.event("it lies across two axes that would have to be cut together", "view")
        ids = label.ids
        for axis in label.varied:
            if axis != finest:
                ids = walk.atoms.unify_along(ids, axis, event)
        classes = walk.atoms.solve()
    whole = [label.ids for _, label in _tensors(walk) if _is_whole(label, classes)]
    if whole:
        event = walk.atoms.event("all of its channels hang together, so none can be removed alone", "view")
        for ids in whole:
            walk.atoms.pin(ids, event)
        classes = walk.atoms.solve()
    return classes


def _is_whole(label: Label, classes: Classes) -> bool:
    found = classes.of(label.ids)
    return bool(found.size and (found == found.flat[0]).all() and found.flat[0] != KEPT)


def _pieces(ids: Ids, axis: int) -> int:
    """How many pieces could be removed one by one if only this axis may lose positions."""
    rows = np.moveaxis(ids, axis, 0).reshape(ids.shape[axis], -1)
    _, columns = np.unique(rows, return_inverse=True)
    columns = columns.reshape(rows.shape) + len(rows)
    size = len(rows) + rows.size + 1
    row_numbers = np.repeat(np.arange(len(rows)), rows.shape[1])
    links = coo_matrix((np.ones(rows.size, dtype=bool), (row_numbers, columns.ravel())), shape=(size, size))
    component = connected_components(links, directed=False)[1][: len(rows)]
    kept = np.unique(component[(rows == KEPT).any(axis=1)])
    return len(np.setdiff1d(component, kept))


def _axis_classes(walk: Propagation, classes: Classes) -> dict[str, tuple[Ids, ...]]:
    stays: dict[int, Ids] = {}

    def staying(size: int) -> Ids:
        return stays.setdefault(size, np.full(size, KEPT, dtype=np.int64))

    axes: dict[str, tuple[Ids, ...]] = {}
    for name, label in _tensors(walk):
        found = compact(classes.of(label.ids), label.shape)
        varied = found.varied
        axes[name] = tuple(
            found.axis(axis) if varied == (axis,) else staying(size) for axis, size in enumerate(label.shape)
        )
    for name, shape in walk.parameter_shapes.items():
        if name not in axes:
            axes[name] = tuple(
                classes.of(walk.axes[name, axis]) if (name, axis) in walk.axes else staying(size)
                for axis, size in enumerate(shape)
            )
    for node, name in walk.parameters.items():
        axes[node] = axes[name]
    return axes


def _groups(tensors: Iterable[tuple[Ids, ...]], count: int) -> tuple[Ids, ...]:
    """Classes that occur equally often in the same axes, found by adding a random number per axis and occurrence."""
    random = np.random.default_rng(0)
    marks = np.zeros((2, count), dtype=np.uint64)
    seen: set[bytes] = set()
    for axes in tensors:
        for classes in axes:
            free = classes[classes >= 0]
            content = classes.tobytes()
            if not len(free) or content in seen:
                continue
            seen.add(content)
            mark = random.integers(1, 1 << 62, size=2, dtype=np.uint64)
            marks += mark[:, None] * np.bincount(free, minlength=count).astype(np.uint64)
    present = np.flatnonzero(marks[0])
    groups: dict[tuple[int, int], list[int]] = {}
    for index in present.tolist():
        groups.setdefault((int(marks[0, index]), int(marks[1, index])), []).append(index)
    return tuple(np.array(members, dtype=np.int64) for members in groups.values())
