"""Atoms: the smallest things that a cut can remove, which of them are the same, and which must stay.

An atom is one position of one axis. Rules say that two atoms must go together (`unify`), that an atom must stay (`pin`),
or that the atoms of one axis are the product of those of others (`split`, `merge`); all of it is only collected, and
`solve` finds the classes of equal atoms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from edgeprune.graph.products import KEPT, Definitions, Ids, Product

__all__ = ["KEPT", "Atoms", "Classes", "Event", "Ids", "Product"]

_NONE = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Event:
    """Why something stays as it is.

    Attributes:
        reason: One clause for a person, without a full stop.
        op: ATen operation, ``"input"`` or ``"output"``.
        source: ``file:line`` of the user's code, or ``""``.
    """

    reason: str
    op: str
    source: str = ""


@dataclass(frozen=True)
class Classes:
    """Solved atoms.

    Attributes:
        of_atom: Class of each atom, numbered from 0 in order of the first atom.
        event_of_class: Per class the index of the first event that pinned it, or -1 where the class is free.
        parts: Per class the classes that it is a product of, itself where it is none, shape [classes, factors], padded
            with `KEPT`; a class goes when one of its parts goes.
    """

    of_atom: Ids
    event_of_class: Ids
    parts: Ids

    def of(self, ids: Ids) -> Ids:
        """Classes of label ids: `KEPT` where the label is `KEPT` or its class is pinned."""
        if not len(self.of_atom):
            return np.full_like(ids, KEPT)
        classes = self.of_atom[np.maximum(ids, 0)]
        return np.where((ids < 0) | (self.event_of_class[classes] >= 0), KEPT, classes)

    @cached_property
    def factors(self) -> Ids:
        """Like `parts`, all the way down, without parts that are pinned: shape [classes + 1, factors], `KEPT` alone last."""
        count = len(self.event_of_class)
        pinned = np.append(self.event_of_class >= 0, False)
        parts = np.vstack([self.parts, np.full((1, self.parts.shape[1]), KEPT, dtype=np.int64)])
        is_product = np.append(~_alone(self.parts), False)
        table = _distinct(np.where(pinned[parts], KEPT, parts))
        # Each round opens one level of products of products; `solve` leaves none that consists of itself.
        while is_product[table].any():
            table = _distinct(np.where(pinned[opened := parts[table].reshape(count + 1, -1)], KEPT, opened))
        return table

    def units_of(self, ids: Ids) -> Ids:
        """Free classes that the positions of label ids consist of, shape [factors, size]."""
        found = self.factors[self.of(ids)]
        return np.ascontiguousarray(found[:, : max(1, int((found >= 0).any(axis=0).sum()))].T)


class Atoms:
    """Collects atoms, equalities, pins and products."""

    def __init__(self) -> None:
        self._count = 0
        self._pairs: list[Ids] = []
        self._pins: list[tuple[Ids, int]] = []
        self._split: dict[tuple[bytes, tuple[int, ...]], tuple[Ids | None, ...]] = {}
        self._merged: dict[tuple[tuple[bytes | None, ...], tuple[int, ...]], Ids] = {}
        self._across = -1
        self.products: list[Product] = []
        self.events: list[Event] = []

    def fresh(self, shape: int | tuple[int, ...]) -> Ids:
        """New atoms in an array of the given shape."""
        size = int(np.prod(shape))
        ids = np.arange(self._count, self._count + size, dtype=np.int64).reshape(shape)
        self._count += size
        return ids

    def event(self, reason: str, op: str, source: str = "") -> int:
        """Record why something stays; the returned number goes to `pin` and `unify`."""
        self.events.append(Event(reason, op, source))
        return len(self.events) - 1

    def pin(self, ids: Ids | None, event: int) -> None:
        """These atoms stay, because of an event."""
        if ids is None:
            return
        ids = np.unique(ids)
        ids = ids[ids >= 0]
        if len(ids):
            self._pins.append((ids, event))

    def unify(self, left: Ids, right: Ids, event: int) -> None:
        """Position by position the two must go together; a `KEPT` on one side pins the other."""
        if left is right:
            return
        pairs = np.stack([left.ravel(), right.ravel()])
        pairs = pairs[:, pairs[0] != pairs[1]]
        kept = pairs.min(axis=0) < 0 if pairs.size else np.zeros(0, dtype=bool)
        if kept.any():
            self.pin(pairs[:, kept].max(axis=0), event)
        pairs = pairs[:, ~kept]
        if pairs.size:
            self._pairs.append(pairs)

    def merge(self, axes: Sequence[Ids | None], sizes: Sequence[int]) -> Ids | None:
        """Atoms of one axis into which several are merged, the last one running fastest; None where all positions stay."""
        varied = [axis for axis, ids in enumerate(axes) if ids is not None]
        if not varied:
            return None
        if len(varied) == 1:
            return self._spread(axes[varied[0]], varied[0], sizes)
        key = _contents(axes), tuple(sizes)
        if key not in self._merged:
            ids = self.fresh(tuple(sizes[axis] for axis in varied))
            self.products.append(Product(ids, tuple(part for part in axes if part is not None)))
            view = [sizes[axis] if axis in varied else 1 for axis in range(len(sizes))]
            self._remember(np.broadcast_to(ids.reshape(view), tuple(sizes)).ravel(), tuple(axes), tuple(sizes))
        return self._merged[key]

    def _remember(self, flat: Ids, axes: tuple[Ids | None, ...], sizes: tuple[int, ...]) -> None:
        """What was merged from some axes is split into the same ones again, and the other way round."""
        self._split[flat.tobytes(), sizes] = axes
        self._merged[_contents(axes), sizes] = flat

    def _spread(self, ids: Ids | None, axis: int, sizes: Sequence[int]) -> Ids:
        assert ids is not None
        view = [1] * len(sizes)
        view[axis] = sizes[axis]
        return np.broadcast_to(ids.reshape(view), tuple(sizes)).ravel()

    def split(self, ids: Ids | None, sizes: Sequence[int]) -> tuple[Ids | None, ...]:
        """Atoms of the axes into which one is split; the same axis split in the same way has the same parts."""
        if ids is None:
            return (None,) * len(sizes)
        key = (ids.tobytes(), tuple(sizes))
        if key in self._split:
            return self._split[key]
        table = ids.reshape(tuple(sizes))
        varied = [axis for axis, size in enumerate(sizes) if size > 1 and (table != table.take([0], axis=axis)).any()]
        axes: list[Ids | None] = [None] * len(sizes)
        if not varied:
            # One atom everywhere: it is as long as the axis, so it lies along the longest.
            varied = [int(np.argmax(sizes))]
        if len(varied) == 1:
            axis = varied[0]
            axes[axis] = np.moveaxis(table, axis, 0).reshape(sizes[axis], -1)[:, 0].copy()
        else:
            for axis in varied:
                axes[axis] = self._fresh_along(table, axis)
            compact = table[tuple(slice(None) if axis in varied else 0 for axis in range(len(sizes)))]
            self.products.append(Product(compact.copy(), tuple(part for part in axes if part is not None)))
        self._remember(ids, tuple(axes), tuple(sizes))
        return tuple(axes)

    def _fresh_along(self, table: Ids, axis: int) -> Ids:
        """New atoms along one axis, the same one where slices are equal: heads that lie beside the batch, say."""
        slices = np.moveaxis(table, axis, 0).reshape(table.shape[axis], -1)
        _, first, same = np.unique(slices, axis=0, return_index=True, return_inverse=True)
        rank = np.empty(len(first), dtype=np.int64)
        rank[np.argsort(first)] = np.arange(len(first))
        found: Ids = self.fresh(len(first))[rank[same.ravel()]]
        return found

    def solve(self) -> Classes:
        """Classes of all atoms as collected so far."""
        while True:
            classes = self._components()
            known = len(self._pairs), len(self._pins)
            parts = self._defined(classes).parts()
            if (len(self._pairs), len(self._pins)) == known:
                circular = _circular(parts)
                if not len(circular):
                    return Classes(classes.of_atom, classes.event_of_class, parts)
                self.pin(_first_atoms(classes)[circular], self._across)

    def _defined(self, classes: Classes) -> Definitions:
        """Products in terms of classes; what they say of classes beyond that is collected."""
        if self.products and self._across < 0:
            self._across = self.event("it lies across two axes that would have to be cut together", "view")
        atom_of = _first_atoms(classes)

        def join(left: Ids, right: Ids) -> None:
            different = left != right
            self.unify(_atoms(atom_of, left[different]), _atoms(atom_of, right[different]), self._across)

        def pin(found: Ids) -> None:
            self.pin(_atoms(atom_of, found), self._across)

        definitions = Definitions(len(classes.event_of_class), join, pin)
        for product in self.products:
            definitions.add(*product.rows(classes.of))
        return definitions

    def _components(self) -> Classes:
        if self._count == 0:
            return Classes(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64), np.zeros((0, 1), dtype=np.int64))
        self._pairs = [np.concatenate(self._pairs, axis=1)] if self._pairs else []
        pairs = self._pairs[0] if self._pairs else np.zeros((2, 0), dtype=np.int64)
        links = coo_matrix(
            (np.ones(pairs.shape[1], dtype=bool), (pairs[0], pairs[1])), shape=(self._count, self._count)
        )
        component = connected_components(links, directed=False)[1].astype(np.int64)
        _, first, of_atom = np.unique(component, return_index=True, return_inverse=True)
        rank = np.empty(len(first), dtype=np.int64)
        rank[np.argsort(first)] = np.arange(len(first))
        of_atom = rank[of_atom]
        event_of_class = np.full(len(first), _NONE)
        for ids, event in self._pins:
            np.minimum.at(event_of_class, of_atom[ids], event)
        event_of_class[event_of_class == _NONE] = -1
        return Classes(of_atom, event_of_class, np.arange(len(first))[:, None])


def _contents(axes: Sequence[Ids | None]) -> tuple[bytes | None, ...]:
    return tuple(None if ids is None else ids.tobytes() for ids in axes)


def _alone(parts: Ids) -> npt.NDArray[np.bool_]:
    """Classes that are no product: their row holds themselves and nothing else."""
    result: npt.NDArray[np.bool_] = (parts[:, 0] == np.arange(len(parts))) & (parts[:, 1:] < 0).all(axis=1)
    return result


def _circular(parts: Ids) -> Ids:
    """Classes that are products of themselves, at once or by way of their parts: no such thing can go alone."""
    count = len(parts)
    of, factor = np.nonzero((parts >= 0) & ~_alone(parts)[:, None])
    to = parts[of, factor]
    graph = coo_matrix((np.ones(len(of), dtype=np.int8), (of, to)), shape=(count, count))
    _, cycle = connected_components(graph, directed=True, connection="strong")
    inside = np.bincount(cycle, minlength=1)[cycle] > 1 if count else np.zeros(0, dtype=bool)
    inside[of[of == to]] = True
    return np.flatnonzero(inside)


def _distinct(rows: Ids) -> Ids:
    """Each row without repetitions, in descending order, without columns that nothing uses."""
    rows = -np.sort(-rows, axis=1)
    rows[:, 1:][rows[:, 1:] == rows[:, :-1]] = KEPT
    rows = -np.sort(-rows, axis=1)
    return rows[:, : max(1, int((rows >= 0).any(axis=0).sum()))]


def _first_atoms(classes: Classes) -> Ids:
    """One atom of each class."""
    first = np.zeros(len(classes.event_of_class), dtype=np.int64)
    first[classes.of_atom[::-1]] = np.arange(len(classes.of_atom) - 1, -1, -1)
    return first


def _atoms(representative: Ids, classes: Ids) -> Ids:
    return np.where(classes < 0, KEPT, representative[np.maximum(classes, 0)]) if len(representative) else classes
