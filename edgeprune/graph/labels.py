"""Labels: which atom each position along each axis of a tensor belongs to.

An axis either carries atoms, one per position, or stays whole. A cut removes whole slices, so a tensor needs no more than
a vector per axis: what is left of it is the outer product of what is left of its axes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from edgeprune.graph.atoms import KEPT, Atoms, Ids


@dataclass(frozen=True)
class Label:
    """Atom ids of one tensor.

    Attributes:
        axes: Per axis the ids of its positions, `KEPT` where one stays; None where all of them stay.
        shape: Shape of the tensor at the deployment batch.
        event: Why positions stay, or -1 when nothing special is known.
    """

    axes: tuple[Ids | None, ...]
    shape: tuple[int, ...]
    event: int = -1

    @property
    def varied(self) -> tuple[int, ...]:
        """Axes that carry atoms."""
        return tuple(axis for axis, ids in enumerate(self.axes) if ids is not None)

    def axis(self, axis: int) -> Ids:
        """Ids along one axis."""
        ids = self.axes[axis]
        return np.full(self.shape[axis], KEPT, dtype=np.int64) if ids is None else ids

    def at(self, axis: int, ids: Ids | None, size: int | None = None) -> Label:
        """The same label with other ids, and perhaps another size, along one axis."""
        axes, shape = list(self.axes), list(self.shape)
        axes[axis], shape[axis] = free(ids), shape[axis] if size is None else size
        return Label(tuple(axes), tuple(shape), self.event)

    def without(self, *axes: int) -> Label:
        """The label without some of its axes."""
        left = [axis for axis in range(len(self.shape)) if axis not in axes]
        return self.permuted(left)

    def permuted(self, order: list[int]) -> Label:
        """The label with its axes in another order."""
        return Label(tuple(self.axes[axis] for axis in order), tuple(self.shape[axis] for axis in order), self.event)

    def inserted(self, axis: int, size: int = 1) -> Label:
        """The label with one more axis, which stays whole."""
        axes, shape = list(self.axes), list(self.shape)
        axes.insert(axis, None)
        shape.insert(axis, size)
        return Label(tuple(axes), tuple(shape), self.event)

    def of_shape(self, shape: tuple[int, ...]) -> Label:
        """The label of another tensor whose channel axes are the same and whose other axes have other sizes."""
        return replace(self, shape=shape)


def kept(shape: tuple[int, ...], event: int = -1) -> Label:
    """The label of a tensor that stays as it is."""
    return Label((None,) * len(shape), shape, event)


def vector(ids: Ids | None, shape: tuple[int, ...], axis: int, event: int = -1) -> Label:
    """A label with atoms along one axis only."""
    return kept(shape, event).at(axis, ids)


def free(ids: Ids | None) -> Ids | None:
    """None where all positions stay."""
    return None if ids is None or (ids < 0).all() else ids


def reshape(label: Label, shape: tuple[int, ...], atoms: Atoms) -> Label:
    """The label of ``tensor.reshape(shape)``: axes that are merged or split become products."""
    axes: list[Ids | None] = [None] * len(shape)
    for before, after in _matching(label.shape, shape):
        ids = atoms.merge([label.axes[axis] for axis in before], [label.shape[axis] for axis in before])
        for axis, part in zip(after, atoms.split(ids, [shape[axis] for axis in after]), strict=True):
            axes[axis] = free(part)
    return Label(tuple(axes), shape, label.event)


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
