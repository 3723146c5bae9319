"""Axes that are split into several, or merged from several: which atoms are outer products of which.

Where a view turns an axis of 64 channels into 4 heads of 16, each channel stays only as long as both its head and its
head dimension stay: the channels are the *product* of 4 + 16 smaller things that can be removed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

Ids = npt.NDArray[np.int64]

KEPT = -1
"""The label of a position that always stays."""


@dataclass(frozen=True)
class Product:
    """A position of `ids` stays as long as all of its parts stay.

    Attributes:
        ids: Atoms in the shape of the axes that were merged or split.
        parts: Per axis the atoms of its positions.
    """

    ids: Ids
    parts: tuple[Ids, ...]

    def rows(self, of: Callable[[Ids], Ids]) -> tuple[Ids, Ids]:
        """Class of each position, shape [n], and the classes of its parts, shape [n, axes]."""
        columns = np.meshgrid(*[of(part) for part in self.parts], indexing="ij")
        return of(self.ids).ravel(), np.stack([column.ravel() for column in columns], axis=1)


class Definitions:
    """Which classes are products, and of what: settled once no two products contradict each other.

    Args:
        count: Number of classes.
        join: Called with two arrays of classes that must become one, position by position (`KEPT` on one side pins the
            other).
        pin: Called with classes that must stay although they could not be matched.
    """

    def __init__(self, count: int, join: Callable[[Ids, Ids], None], pin: Callable[[Ids], None]) -> None:
        self._join, self._pin = join, pin
        self._owner = np.full(count, -1, dtype=np.int64)
        self._row = np.zeros(count, dtype=np.int64)
        self._tables: list[Ids] = []

    def add(self, classes: Ids, parts: Ids) -> None:
        """Take in the rows of one product.

        A position goes when any of its parts goes, so: a position that stays pins its parts; one with a single part that
        can go is that part; the same class at two positions has the same parts; and of two products that hold the same
        classes each column of one is a column of the other.
        """
        free = parts >= 0
        staying = classes == KEPT
        self._join(parts[staying].ravel(), np.full(parts[staying].size, KEPT))
        alone = free.sum(axis=1) <= 1
        self._join(classes[alone & ~staying], parts[alone & ~staying].max(axis=1))
        rest = np.flatnonzero(~alone & ~staying)
        if not len(rest):
            return
        classes, parts = classes[rest], parts[rest]
        order = np.argsort(classes, kind="stable")
        classes, parts = classes[order], parts[order]
        same = classes[1:] == classes[:-1]
        for column in range(parts.shape[1]):
            self._join(parts[1:, column][same], parts[:-1, column][same])
        first = np.concatenate([[True], ~same])
        classes, parts = classes[first], parts[first]
        owners = self._owner[classes]
        for owner in np.unique(owners[owners >= 0]).tolist():
            own = owners == owner
            self._match(self._tables[owner][self._row[classes[own]]], parts[own])
        new = classes[owners < 0]
        self._owner[new] = len(self._tables)
        self._row[new] = np.flatnonzero(owners < 0)
        self._tables.append(parts)

    def _match(self, known: Ids, found: Ids) -> None:
        """Pair the columns of two tables over the same classes so that as much as possible can still go alone."""
        left = [column for column in range(known.shape[1]) if (known[:, column] >= 0).any()]
        right = [column for column in range(found.shape[1]) if (found[:, column] >= 0).any()]
        narrow, wide = (left, right) if len(left) <= len(right) else (right, left)
        pieces = {(i, j): _pieces(known[:, i], found[:, j]) for i in left for j in right}

        def gain(chosen: Sequence[int]) -> float:
            pairs = zip(narrow, chosen, strict=True)
            return sum(math.log(pieces[pair if narrow is left else pair[::-1]]) for pair in pairs)

        best = max(permutations(wide, len(narrow)), key=gain)
        for one, other in zip(narrow, best, strict=True):
            i, j = (one, other) if narrow is left else (other, one)
            self._join(known[:, i], found[:, j])
        table = found if narrow is left else known
        for column in set(wide) - set(best):
            self._pin(table[:, column])

    def parts(self) -> Ids:
        """Per class the classes that it is a product of, itself where it is none; shape [classes, factors], `KEPT` is none."""
        width = max([1, *(table.shape[1] for table in self._tables)])
        found = np.full((len(self._owner), width), KEPT, dtype=np.int64)
        found[:, 0] = np.arange(len(self._owner))
        for owner, table in enumerate(self._tables):
            own = np.flatnonzero(self._owner == owner)
            found[own] = KEPT
            found[own, : table.shape[1]] = table[self._row[own]]
        return found


def _pieces(left: Ids, right: Ids) -> int:
    """How many pieces are left when values that share a row go together; one where a side stays throughout."""
    both = (left >= 0) & (right >= 0)
    if not both.any():
        return 1
    a, b = np.unique(left[both], return_inverse=True)[1], np.unique(right[both], return_inverse=True)[1]
    size = int(a.max()) + int(b.max()) + 2
    links = coo_matrix((np.ones(len(a), dtype=bool), (a, b + int(a.max()) + 1)), shape=(size, size))
    return int(connected_components(links, directed=False)[0])
