"""Atoms: the smallest things that a cut can remove, which of them are the same, and which must stay.

An atom is one channel of one axis. Rules say that two atoms must go together (`unify`) or that an atom must stay
(`pin`); both only collect, and `solve` finds the classes of equal atoms in one vectorised pass.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

Ids = npt.NDArray[np.int64]

KEPT = -1
"""The label of a position that always stays."""


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
    """

    of_atom: Ids
    event_of_class: Ids

    def of(self, ids: Ids) -> Ids:
        """Classes of label ids: `KEPT` where the label is `KEPT` or its class is pinned."""
        if not len(self.of_atom):
            return np.full_like(ids, KEPT)
        classes = self.of_atom[np.maximum(ids, 0)]
        return np.where((ids < 0) | (self.event_of_class[classes] >= 0), KEPT, classes)


class Atoms:
    """Collects atoms, equalities and pins."""

    def __init__(self) -> None:
        self._count = 0
        self._pairs: list[Ids] = []
        self._pins: list[tuple[Ids, int]] = []
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

    def pin(self, ids: Ids, event: int) -> None:
        """These atoms stay, because of an event."""
        ids = np.unique(ids)
        ids = ids[ids >= 0]
        if len(ids):
            self._pins.append((ids, event))

    def unify(self, left: Ids, right: Ids, event: int) -> None:
        """Position by position (after broadcasting) the two must go together; a `KEPT` on one side pins the other."""
        left, right = np.broadcast_arrays(left, right)
        pairs = np.stack([left.ravel(), right.ravel()])
        pairs = pairs[:, pairs[0] != pairs[1]]
        kept = pairs.min(axis=0) < 0 if pairs.size else np.zeros(0, dtype=bool)
        if kept.any():
            self.pin(pairs[:, kept].max(axis=0), event)
        pairs = np.unique(pairs[:, ~kept], axis=1)
        if pairs.size:
            self._pairs.append(pairs)

    def unify_along(self, ids: Ids, axis: int, event: int) -> Ids:
        """All positions along one axis must go together; returns the labels with that axis at length 1."""
        first = np.take(ids, [0], axis=axis)
        self.unify(ids, first, event)
        return np.where((ids < 0).any(axis=axis, keepdims=True), KEPT, first)

    def solve(self) -> Classes:
        """Classes of all atoms as collected so far."""
        if self._count == 0:
            return Classes(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))
        pairs = np.concatenate(self._pairs, axis=1) if self._pairs else np.zeros((2, 0), dtype=np.int64)
        links = coo_matrix(
            (np.ones(pairs.shape[1], dtype=bool), (pairs[0], pairs[1])), shape=(self._count, self._count)
        )
        component = connected_components(links, directed=False)[1].astype(np.int64)
        _, first, of_atom = np.unique(component, return_index=True, return_inverse=True)
        rank = np.empty(len(first), dtype=np.int64)
        rank[np.argsort(first)] = np.arange(len(first))
        of_atom = rank[of_atom]
        event_of_class = np.full(len(first), np.iinfo(np.int64).max)
        for ids, event in self._pins:
            np.minimum.at(event_of_class, of_atom[ids], event)
        event_of_class[event_of_class == np.iinfo(np.int64).max] = -1
        return Classes(of_atom, event_of_class)


def first_event(candidates: Iterable[int]) -> int:
    """The earliest event among numbers of which -1 means none."""
    return min((event for event in candidates if event >= 0), default=-1)
