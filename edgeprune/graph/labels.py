"""Label tensors: which atom each position of a tensor belongs to.

A label has as many axes as its tensor. Along an axis its ids have the tensor's length, or length 1 where all positions
belong together, so a feature map of 64 channels is described by 64 numbers whatever its height and width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from edgeprune.graph.atoms import KEPT, Ids


@dataclass(frozen=True)
class Label:
    """Atom ids of one tensor.

    Attributes:
        ids: Shape is that of the tensor, or 1, per axis; `KEPT` where a position always stays.
        shape: Shape of the tensor at the deployment batch.
        event: Why the `KEPT` positions stay, or -1 when nothing special is known.
    """

    ids: Ids
    shape: tuple[int, ...]
    event: int = -1

    @property
    def varied(self) -> tuple[int, ...]:
        """Axes along which the label differs from position to position."""
        return tuple(axis for axis, length in enumerate(self.ids.shape) if length > 1)

    @property
    def has_atoms(self) -> bool:
        """Whether any position could be removed."""
        return bool((self.ids >= 0).any())

    def axis(self, axis: int) -> Ids:
        """Ids along one axis at full length, for a label that varies along no other axis."""
        ids = np.moveaxis(self.ids, axis, 0)
        return np.broadcast_to(ids.reshape(ids.shape[0], -1)[:, 0], (self.shape[axis],))

    def full_along(self, *axes: int) -> Ids:
        """Ids with the given axes at the tensor's length, the others as they are."""
        shape = [self.shape[a] if a in axes else length for a, length in enumerate(self.ids.shape)]
        return np.broadcast_to(self.ids, shape)


def kept(shape: tuple[int, ...], event: int = -1) -> Label:
    """The label of a tensor that stays as it is."""
    return Label(np.full((1,) * len(shape), KEPT, dtype=np.int64), shape, event)


def vector(ids: Ids, shape: tuple[int, ...], axis: int, event: int = -1) -> Label:
    """A label that varies along one axis only."""
    view = [1] * len(shape)
    view[axis] = len(ids)
    return compact(ids.reshape(view), shape, event)


def compact(ids: Ids, shape: tuple[int, ...], event: int = -1) -> Label:
    """A label with every axis along which it is constant at length 1."""
    for axis, length in enumerate(ids.shape):
        if length > 1:
            first = np.take(ids, [0], axis=axis)
            if (ids == first).all():
                ids = first
    return Label(np.ascontiguousarray(ids), shape, event)


def reshape(label: Label, shape: tuple[int, ...]) -> Label:
    """The label of ``tensor.reshape(shape)``: only axes that are really mixed are written out."""
    pieces: list[int] = []
    ids_shape: list[int] = []
    for before, after in _matching(label.shape, shape):
        if all(label.ids.shape[axis] == 1 for axis in before):
            pieces += [1] * len(before)
            ids_shape += [1] * len(after)
        else:
            pieces += [label.shape[axis] for axis in before]
            ids_shape += [shape[axis] for axis in after]
    return compact(np.broadcast_to(label.ids, pieces).reshape(ids_shape), shape, label.event)


def _matching(before: tuple[int, ...], after: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """Split two shapes of equal volume into the shortest runs of axes that have equal volume."""
    runs: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) or j < len(after):
        left, right = [], []
        volume_left = volume_right = 1
        if i < len(before):
            left, volume_left, i = [i], before[i], i + 1
        if j < len(after):
            right, volume_right, j = [j], after[j], j + 1
        while volume_left != volume_right:
            if volume_left < volume_right and i < len(before):
                left.append(i)
                volume_left, i = volume_left * before[i], i + 1
            elif j < len(after):
                right.append(j)
                volume_right, j = volume_right * after[j], j + 1
            else:
                raise ValueError(
                    f"shapes {before} and {after} differ in volume: {math.prod(before)}, {math.prod(after)}."
                )
        runs.append((left, right))
    return runs
