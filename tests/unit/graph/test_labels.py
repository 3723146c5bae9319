"""Atoms and label tensors against slow definitions."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune.graph.atoms import KEPT, Atoms
from edgeprune.graph.labels import Label, compact, reshape


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
@given(_views())
def test_a_reshaped_label_is_the_label_of_the_reshaped_tensor(
    case: tuple[tuple[int, ...], tuple[bool, ...], tuple[int, ...]],
) -> None:
    before, varied, after = case
    compacted = tuple(size if vary else 1 for size, vary in zip(before, varied, strict=True))
    ids = np.arange(int(np.prod(compacted))).reshape(compacted)
    found = reshape(Label(ids, before), after)
    assert found.shape == after
    full = np.broadcast_to(ids, before).reshape(after)
    assert np.array_equal(np.broadcast_to(found.ids, after), full)


def test_a_label_is_written_out_only_where_axes_are_mixed() -> None:
    label = Label(np.arange(64).reshape(1, 64, 1, 1), (8, 64, 56, 56))
    assert reshape(label, (8, 4, 16, 56 * 56)).ids.shape == (1, 4, 16, 1)
    assert reshape(label, (8, 64 * 56, 56)).ids.shape == (1, 64 * 56, 1)


def test_compact_drops_constant_axes() -> None:
    ids = np.array([[1, 2], [1, 2], [1, 2]])
    assert compact(ids, (3, 2)).ids.tolist() == [[1, 2]]
