"""Atoms and label tensors against slow definitions."""

from __future__ import annotations

import functools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune.graph.atoms import KEPT, Atoms
from edgeprune.graph.labels import Label, reshape


@given(st.integers(1, 20), st.lists(st.tuples(st.integers(0, 19), st.integers(0, 19))), st.lists(st.integers(0, 19)))
def test_classes_equal_a_naive_union(count: int, pairs: list[tuple[int, int]], pinned: list[int]) -> None:
    atoms = Atoms()
    ids = atoms.fresh(count)
    naive = [{i} for i in range(count)]
    for a, b in ((a % count, b % count) for a, b in pairs):
        atoms.unify(ids[[a]], ids[[b]], 0)
        joined = naive[a] | naive[b]
        for i in joined:
            naive[i] = joined
    event = atoms.event("for the test", "test")
    atoms.pin(ids[[p % count for p in pinned]], event)
    classes = atoms.solve()
    for i in range(count):
        assert {j for j in range(count) if classes.of_atom[j] == classes.of_atom[i]} == naive[i]
        stays = any(p % count in naive[i] for p in pinned)
        assert (classes.of(ids)[i] == KEPT) == stays
    assert sorted(set(classes.of_atom.tolist())) == list(range(len(set(classes.of_atom.tolist()))))


def test_meeting_something_that_stays_pins() -> None:
    atoms = Atoms()
    ids = atoms.fresh(3)
    atoms.unify(ids, np.array([KEPT, 1, 2]), atoms.event("reason", "op", "file.py:3"))
    classes = atoms.solve()
    assert classes.of(ids).tolist() == [KEPT, 1, 2]
    assert atoms.events[int(classes.event_of_class[0])].source == "file.py:3"


def test_a_product_of_itself_stays() -> None:
    """The rows of a table are made the same as the first two positions of that table."""
    atoms = Atoms()
    ids = atoms.fresh(8)
    rows, columns = atoms.split(ids, (2, 4))
    assert rows is not None
    atoms.unify(ids[:2], rows, atoms.event("they are added", "add"))
    classes = atoms.solve()
    assert columns is not None
    # Position 0 is row 0 and also row 0 times column 0: it stays. Position 1 is then column 1, and is row 1.
    assert classes.of(rows).tolist() == [KEPT, classes.of(columns)[1]]
    assert classes.of(columns)[0] == KEPT
    assert (classes.of(columns)[1:] >= 0).all()
    assert classes.units_of(ids)[:, 5].tolist() == [classes.of(rows)[1]] + [KEPT] * (len(classes.units_of(ids)) - 1)


@st.composite
def _views(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[bool, ...], tuple[int, ...]]:
    factors = draw(st.lists(st.sampled_from([1, 2, 3]), min_size=1, max_size=5))

    def grouped() -> tuple[int, ...]:
        sizes, current = [], 1
        for factor in factors:
            current *= factor
            if draw(st.booleans()):
                sizes.append(current)
                current = 1
        return (*sizes, current)

    before, after = grouped(), grouped()
    varied = tuple(draw(st.booleans()) for _ in before)
    return before, varied, after


@settings(max_examples=200)
@given(_views(), st.integers(0, 2**31))
def test_what_is_left_of_a_view_is_the_view_of_what_is_left(
    case: tuple[tuple[int, ...], tuple[bool, ...], tuple[int, ...]], seed: int
) -> None:
    """Remove any units: the positions that stay before the view are those that stay after it, and both are rectangular."""
    before, varied, after = case
    atoms = Atoms()
    label = Label(
        tuple(atoms.fresh(size) if vary and size > 1 else None for size, vary in zip(before, varied, strict=True)),
        before,
    )
    found = reshape(label, after, atoms)
    assert found.shape == after
    classes = atoms.solve()
    random = np.random.default_rng(seed)
    gone = {int(index) for index in range(len(classes.event_of_class)) if random.random() < 0.3}

    def left(one: Label) -> list[np.ndarray]:
        return [
            np.array([not gone & set(column) for column in classes.units_of(one.axis(axis)).T.tolist()])
            for axis in range(len(one.shape))
        ]

    masks = [functools.reduce(np.multiply.outer, left(one)) for one in (label, found)]
    assert np.array_equal(masks[0].ravel(), masks[1].ravel())


def test_a_split_axis_is_a_product_of_its_parts_and_comes_back_when_merged() -> None:
    atoms = Atoms()
    channels = atoms.fresh(12)
    label = Label((None, channels), (5, 12))
    heads = reshape(label, (5, 3, 4), atoms)
    assert heads.varied == (1, 2)
    classes = atoms.solve()
    assert (classes.units_of(channels) >= 0).sum(axis=0).tolist() == [2] * 12
    assert np.array_equal(classes.of(reshape(heads, (5, 12), atoms).axis(1)), classes.of(channels))


def test_two_ways_to_split_one_axis_agree_on_what_both_allow() -> None:
    atoms = Atoms()
    channels = atoms.fresh(24)
    coarse, fine = atoms.split(channels, (2, 12)), atoms.split(channels, (4, 6))
    classes = atoms.solve()
    parts = [classes.of(part) for part in (*coarse, *fine) if part is not None]
    assert [len(np.unique(part)) for part in parts] == [2, 6, 2, 6]
    assert parts[2].tolist() == [parts[0][0]] * 2 + [parts[0][1]] * 2
    assert parts[1].tolist() == [*parts[3], *parts[3]]


def test_an_axis_with_one_varied_factor_is_no_product() -> None:
    atoms = Atoms()
    channels = atoms.fresh(3)
    flat = atoms.merge([channels, None], [3, 2])
    assert flat is not None
    assert flat.tolist() == np.repeat(channels, 2).tolist()
    assert atoms.split(flat, (3, 2))[1] is None
    assert not atoms.products


def test_a_position_that_stays_keeps_all_of_its_factors() -> None:
    atoms = Atoms()
    channels = atoms.fresh(6)
    rows, columns = atoms.split(channels, (2, 3))
    assert rows is not None
    assert columns is not None
    atoms.pin(channels[[4]], atoms.event("for the test", "test"))
    classes = atoms.solve()
    assert classes.of(rows)[1] == KEPT
    assert classes.of(columns)[1] == KEPT
    assert classes.of(rows)[0] != KEPT
    # Of the second row only the columns are left to remove, so its positions are the columns.
    assert classes.of(channels)[[3, 5]].tolist() == classes.of(columns)[[0, 2]].tolist()


def test_an_axis_that_stays_is_no_axis_with_atoms() -> None:
    assert Label((None,), (3,)).at(0, np.array([KEPT, KEPT, KEPT])).varied == ()
