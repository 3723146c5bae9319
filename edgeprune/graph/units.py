"""From atoms to units: the smallest sets of atoms that can be removed alone, sorted into groups."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgeprune.graph.atoms import KEPT, Classes, Ids
from edgeprune.graph.labels import Label
from edgeprune.graph.propagation import Propagation


@dataclass(frozen=True)
class Units:
    """Free classes sorted into groups.

    Attributes:
        classes: Solved atoms.
        groups: Per group its classes, one per unit, in channel order.
        axes: Per tensor (node or parameter), per axis the units of every position, shape [factors, size]: a position
            stays as long as all of its units stay. `KEPT` where there are none (or fewer than elsewhere on the axis).
    """

    classes: Classes
    groups: tuple[Ids, ...]
    axes: dict[str, tuple[Ids, ...]]


def find_units(walk: Propagation) -> Units:
    """Solve, keep what cannot go alone, and put classes that occur in the same axes into one group."""
    _settle(walk)
    while True:
        classes = walk.atoms.solve()
        axes = _axis_units(walk, classes)
        groups = _groups(axes.values(), len(classes.event_of_class))
        for found, reason in (
            (
                _uneven(axes.values(), groups),
                "what would be left of it depends on which units go, not only on how many",
            ),
            (_unread(walk, classes, groups), "no layer makes or reads it"),
            (_unmade(walk, classes, groups), "forward fills it in, no layer makes it"),
        ):
            if len(found):
                walk.atoms.pin(_atoms_of(classes, found), walk.atoms.event(reason, "view"))
                break
        else:
            return Units(classes, groups, axes)


def _settle(walk: Propagation) -> None:
    """Pin what cannot go alone: heads beside the batch that are none, coarse factors, axes of a single class."""
    while True:
        classes = walk.atoms.solve()
        marked = _marked(walk, classes)
        if _pin_beside_batch(walk, classes, marked) or _pin_coarse(walk, classes, marked) or _pin_whole(walk, classes):
            continue
        return


def _marked(walk: Propagation, classes: Classes) -> npt.NDArray[np.bool_]:
    """Per class whether it is a head or a head dimension, or what one consists of; False last, for `KEPT`."""
    found = np.zeros(len(classes.event_of_class) + 1, dtype=bool)
    if walk.kinds:
        ids = np.unique(np.concatenate([ids for ids, _ in walk.kinds]))
        found[classes.of(ids)] = True
        found[classes.units_of(ids)] = True
        found[KEPT] = False
    return found


def _pin_beside_batch(walk: Propagation, classes: Classes, marked: npt.NDArray[np.bool_]) -> bool:
    done = False
    for ids, event in walk.beside_batch:
        found = np.unique(classes.of(ids))
        parts = classes.factors[found]
        loose = found[(found >= 0) & ~marked[found] & ~(marked[parts] | (parts < 0)).all(axis=1)]
        if len(loose):
            walk.atoms.pin(_atoms_of(classes, loose), event)
            done = True
    return done


def _pin_coarse(walk: Propagation, classes: Classes, marked: npt.NDArray[np.bool_]) -> bool:
    """Of a product that no attention asks for, only the finest factor can go: halves and conv groups go in step."""
    done = False
    event = -1
    for product in walk.atoms.products:
        found = [np.unique(classes.of(part)) for part in product.parts]
        found = [part[part >= 0] for part in found]
        if sum(len(part) > 0 for part in found) < 2:
            continue
        if marked[classes.of(product.ids)].all() or all(marked[part].all() for part in found):
            continue
        event = event if event >= 0 else walk.atoms.event("it goes in step with finer parts of the same axis", "view")
        finest = max(range(len(found)), key=lambda axis: len(found[axis]))
        for axis, part in enumerate(found):
            if axis != finest and len(part):
                walk.atoms.pin(_atoms_of(classes, part), event)
                done = True
    return done


def _pin_whole(walk: Propagation, classes: Classes) -> bool:
    """What all positions of an axis share cannot go: nothing would be left."""
    whole: set[int] = set()
    seen: set[bytes] = set()
    for _, label in _tensors(walk):
        for axis in label.varied:
            ids = label.axis(axis)
            if (key := ids.tobytes()) in seen:
                continue
            seen.add(key)
            units = classes.units_of(ids)
            # A unit of every position occurs at the first one.
            whole.update(unit for unit in units[:, 0].tolist() if unit >= 0 and (units == unit).any(axis=0).all())
    if not whole:
        return False
    event = walk.atoms.event("all of its channels hang together, so none can be removed alone", "view")
    walk.atoms.pin(_atoms_of(classes, np.array(sorted(whole), dtype=np.int64)), event)
    return True


def _atoms_of(classes: Classes, found: Ids) -> Ids:
    return np.flatnonzero(np.isin(classes.of_atom, found))


def _tensors(walk: Propagation) -> Iterator[tuple[str, Label]]:
    for name, found in walk.labels.items():
        if isinstance(found, Label):
            yield name, found
        elif isinstance(found, list):
            yield from ((f"{name}[{index}]", label) for index, label in enumerate(found))


def _axis_units(walk: Propagation, classes: Classes) -> dict[str, tuple[Ids, ...]]:
    stays: dict[int, Ids] = {}
    known: dict[bytes, Ids] = {}

    def units_of(ids: Ids | None, size: int) -> Ids:
        if ids is None:
            if size not in stays:
                stays[size] = np.full((1, size), KEPT, dtype=np.int64)
            return stays[size]
        key = ids.tobytes()
        if key not in known:
            known[key] = classes.units_of(ids)
        return known[key]

    axes: dict[str, tuple[Ids, ...]] = {}
    for name, found in walk.labels.items():
        if isinstance(found, Label):
            axes[name] = tuple(units_of(ids, size) for ids, size in zip(found.axes, found.shape, strict=True))
    for name, shape in walk.parameter_shapes.items():
        axes[name] = tuple(units_of(walk.axes.get((name, axis)), size) for axis, size in enumerate(shape))
    for node, name in walk.parameters.items():
        axes[node] = axes[name]
    return axes


def _groups(tensors: Iterable[tuple[Ids, ...]], count: int) -> tuple[Ids, ...]:
    """Classes that occur equally often in the same axes, found by adding a random number per axis and occurrence."""
    random = np.random.default_rng(0)
    marks = np.zeros((2, count), dtype=np.uint64)
    seen: set[bytes] = set()
    for axes in tensors:
        for units in axes:
            free = units[units >= 0]
            content = units.tobytes()
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


def _unread(walk: Propagation, classes: Classes, groups: tuple[Ids, ...]) -> Ids:
    """Units that are no channels: positions of a table, say, that this input does not reach."""
    known = [ids for key, ids in walk.axes.items() if walk.roles[key] != "vector"]
    known += [producer.ids for producer in walk.producers]
    if not known or not groups:
        return np.zeros(0, dtype=np.int64)
    used = np.unique(classes.units_of(np.unique(np.concatenate(known))))
    return np.concatenate([np.zeros(0, dtype=np.int64), *(group for group in groups if not np.isin(group, used).any())])


def _unmade(walk: Propagation, classes: Classes, groups: tuple[Ids, ...]) -> Ids:
    """Units that no parameter makes, such as channels of zeros: a norm or a mean would no longer run over them.

    What scales zeros does not make them, so for those only layers count.
    """
    none = np.zeros(0, dtype=np.int64)

    def units_of(axes: Iterable[Ids]) -> Ids:
        return classes.units_of(np.unique(np.concatenate([none, *axes])))

    found = np.unique(np.concatenate([none, *groups]))
    layered = units_of(ids for key, ids in walk.axes.items() if walk.roles[key] == "output")
    filled = np.setdiff1d(units_of(walk.filled), layered)
    return np.union1d(np.setdiff1d(found, units_of(walk.own)), np.intersect1d(found, filled))


def _uneven(tensors: Iterable[tuple[Ids, ...]], groups: tuple[Ids, ...]) -> Ids:
    """Units of an axis of which not every combination of its factors occurs equally often."""
    count = max((int(group.max()) for group in groups if len(group)), default=-1) + 2
    group_of = np.full(count, -1, dtype=np.int64)
    for index, group in enumerate(groups):
        group_of[group] = index
    bad: set[int] = set()
    seen: set[bytes] = set()
    for axes in tensors:
        for units in axes:
            if len(units) == 1 or (key := units.tobytes()) in seen:
                continue
            seen.add(key)
            owners = np.sort(np.where(units >= 0, group_of[units], -1), axis=0)
            for owner in np.unique(owners, axis=1).T.tolist():
                inside = sorted({index for index in owner if index >= 0})
                if sum(index >= 0 for index in owner) < 2:
                    continue
                columns = units[:, (owners == np.array(owner)[:, None]).all(axis=0)]
                combinations = Counter(tuple(sorted(column.tolist())) for column in columns.T)
                full = len(inside) == sum(index >= 0 for index in owner) and len(combinations) == int(
                    np.prod([len(groups[index]) for index in inside])
                )
                if not full or len(set(combinations.values())) > 1:
                    largest = max(inside, key=lambda index: len(groups[index]))
                    spare = [index for index in inside if index != largest] or inside
                    bad.update(unit for index in spare for unit in groups[index].tolist())
    return np.array(sorted(bad), dtype=np.int64)
