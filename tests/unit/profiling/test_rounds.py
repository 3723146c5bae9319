"""Order of rounds, drift, repeats: decided from records alone, here recorded and made up ones."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeprune.profiling.measured import measured_run
from edgeprune.profiling.rounds import Ledger, Slot, drift, slots, stretches

LIMIT = 0.03
PLACES = [(number, stretch) for number in (0, 1) for stretch in range(3)]

names = st.sets(st.text(min_size=1, max_size=5), max_size=40)


@given(names=names, every=st.integers(1, 25), seed=st.integers(0, 10), number=st.integers(0, 5))
def test_round_holds_every_item_once_in_stretches_of_at_most_every(
    names: set[str], every: int, seed: int, number: int
) -> None:
    layout = stretches(names, every=every, seed=seed, round_number=number)
    order = [name for stretch in layout for name in stretch]
    assert sorted(order) == sorted(names)
    assert len(layout) >= 1
    assert all(len(stretch) <= every for stretch in layout)
    assert layout == stretches(sorted(names), every=every, seed=seed, round_number=number)


@given(names=names, every=st.integers(1, 25), passes=st.integers(1, 9), data=st.data())
def test_what_comes_often_comes_in_stretches_far_apart(
    names: set[str], every: int, passes: int, data: st.DataObject
) -> None:
    often = data.draw(st.sets(st.sampled_from(sorted(names)))) if names else set()
    layout = stretches(names, every=every, seed=1, round_number=2, often=often, passes=passes)
    assert layout == stretches(sorted(names), every=every, seed=1, round_number=2, often=sorted(often), passes=passes)
    assert {name for stretch in layout for name in stretch} == names
    for name in names:
        places = [place for place, stretch in enumerate(layout) if name in stretch]
        assert sum(stretch.count(name) for stretch in layout) == len(places), "never twice in one stretch"
        assert len(places) == (passes if name in often else 1)
        gaps = [after - before for before, after in pairwise([*places, places[0] + len(layout)])]
        assert name not in often or max(gaps) - min(gaps) <= 1
    assert all(len(stretch) <= every + len(often) for stretch in layout)


def test_each_round_and_each_seed_has_its_own_order() -> None:
    items = [f"item{number}" for number in range(30)]
    orders = {
        (seed, number): tuple(stretches(items, every=30, seed=seed, round_number=number)[0])
        for seed in (0, 1)
        for number in (0, 1, 2)
    }
    assert len(set(orders.values())) == 6
    # Fixed for good: an order that changed between releases or processes would tear journals apart.
    assert orders[0, 0][:4] == ("item20", "item13", "item3", "item10")


@given(sizes=st.lists(st.integers(0, 4), min_size=1, max_size=6))
def test_sentinel_stands_before_between_and_after_stretches(sizes: list[int]) -> None:
    todo = [(place * 3, [f"{place}-{item}" for item in range(size)]) for place, size in enumerate(sizes)]
    order = slots(todo, "s")
    assert [slot.name for slot in order if slot.stretch is not None] == [name for _, part in todo for name in part]
    sentinels = [slot for slot in order if slot.stretch is None]
    assert order[0] == sentinels[0]
    assert order[-1] == sentinels[-1]
    assert [slot.opens for slot in sentinels] == [*(stretch for stretch, _ in todo), None]
    assert [slot.closes for slot in sentinels] == [None, *(stretch for stretch, _ in todo)]
    for slot in order:
        if slot.stretch is not None:
            before = max(place for place, mark in enumerate(order) if mark.opens == slot.stretch)
            after = max(place for place, mark in enumerate(order) if mark.closes == slot.stretch)
            assert before < order.index(slot) < after


def test_drift_is_the_largest_distance_from_the_median() -> None:
    assert drift([2.0, 2.05], 2.0) == pytest.approx(0.025)
    assert drift([1.8, 2.05], 2.0) == pytest.approx(0.1)


class Recorder:
    """Writes the records of calls whose sentinel and items take given times."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = [{"kind": "call", "overhead_ms": 0.0024, "conditions": {"load": 0.1}}]

    def call(self, number: int, attempt: int, order: list[Slot], times_ms: list[float], share: float = 1.0) -> None:
        for slot, time_ms in zip(order, times_ms, strict=True):
            self.records.append(
                {
                    "kind": "sample",
                    "round": number,
                    "attempt": attempt,
                    "id": slot.name,
                    "stretch": slot.stretch,
                    "opens": slot.opens,
                    "closes": slot.closes,
                    "times_ms": [time_ms] * 3,
                    "cpu_share": [share] * 3,
                    "stable": True,
                    "seconds": 0.03,
                }
            )


@pytest.fixture
def disturbed() -> Recorder:
    """Round 0 quiet; in round 1 something slows the machine down during the second of three stretches.

    Sentinel times as recorded on a two-core machine while other programs started there (dense network of 2.0 ms).
    """
    recorder = Recorder()
    order = slots([(0, ["a"]), (1, ["b"]), (2, ["c"])], "s")
    recorder.call(0, 0, order, [1.993, 0.1, 2.009, 0.2, 1.998, 0.3, 2.011])
    recorder.call(1, 0, order, [2.005, 0.1, 1.991, 0.35, 2.458, 0.3, 2.004])
    return recorder


def test_stretches_beside_a_drifted_sentinel_are_not_kept(disturbed: Recorder) -> None:
    ledger = Ledger(disturbed.records)
    kept = [(ledger.chosen(number, stretch, LIMIT) or pytest.fail("none"))[1] for number, stretch in PLACES]
    assert kept == [True, True, True, True, False, False]
    assert ledger.drifts(1, 1) == pytest.approx([2.458 / 2.0045 - 1], abs=0.002)


def test_every_sentinel_is_told_in_the_order_of_measuring(disturbed: Recorder) -> None:
    assert Ledger(disturbed.records).levels.sentinels_ms == (1.993, 2.009, 1.998, 2.011, 2.005, 1.991, 2.458, 2.004)


def test_first_round_that_was_disturbed_is_found_by_the_median_of_the_run() -> None:
    """Something slowed all of round 0 down: what was usual then is not when the run ends."""
    recorder = Recorder()
    order = slots([(0, ["a"]), (1, ["b"]), (2, ["c"])], "s")
    recorder.call(0, 0, order, [2.201, 0.11, 2.199, 0.22, 2.204, 0.33, 2.198])
    assert all((Ledger(recorder.records).chosen(0, stretch, LIMIT) or pytest.fail("none"))[1] for stretch in range(3))
    recorder.call(1, 0, order, [2.001, 0.1, 1.999, 0.2, 2.004, 0.3, 1.998])
    recorder.call(2, 0, order, [2.002, 0.1, 1.997, 0.2, 2.003, 0.3, 2.0])
    ledger = Ledger(recorder.records)
    kept = {
        place: (ledger.chosen(*place, LIMIT) or pytest.fail("none"))[1] for place in [*PLACES, (2, 0), (2, 1), (2, 2)]
    }
    assert [place for place, held in kept.items() if not held] == [(0, 0), (0, 1), (0, 2)]
    recorder.call(0, 1, order, [2.001, 0.1, 1.999, 0.2, 2.004, 0.3, 1.998])
    ledger = Ledger(recorder.records)
    place, held, _ = ledger.chosen(0, 1, LIMIT) or pytest.fail("none")
    assert (place, held) == ((0, 1, 1), True)
    assert ledger.samples(place)["b"]["times_ms"] == [0.2] * 3


def test_repeat_replaces_what_drifted_and_is_not_averaged_with_it(disturbed: Recorder) -> None:
    disturbed.call(1, 1, slots([(1, ["b"]), (2, ["c"])], "s"), [2.002, 0.201, 1.996, 0.302, 2.01])
    ledger = Ledger(disturbed.records)
    place, kept, _ = ledger.chosen(1, 1, LIMIT) or pytest.fail("nothing was chosen")
    assert (place, kept) == ((1, 1, 1), True)
    assert ledger.samples(place)["b"]["times_ms"] == [0.201] * 3
    assert ledger.chosen(1, 0, LIMIT) == ((1, 0, 0), True, pytest.approx(0.0067, abs=0.002))
    assert ledger.repeated == 2


def test_of_attempts_that_all_drifted_the_calmest_counts(disturbed: Recorder) -> None:
    for attempt, time_ms in ((1, 2.2), (2, 3.9)):
        disturbed.call(1, attempt, slots([(1, ["b"])], "s"), [time_ms, 0.21, time_ms])
    place, kept, found = Ledger(disturbed.records).chosen(1, 1, LIMIT) or pytest.fail("nothing was chosen")
    assert (place, kept) == ((1, 1, 1), False)
    assert found == pytest.approx(0.1, abs=0.01)


def test_round_that_drifted_does_not_count_where_another_one_held(disturbed: Recorder) -> None:
    layouts = [[("a",), ("b",), ("c",)]] * 2
    disturbed.records.append({"kind": "end", "conditions": {"load": 0.2}})
    run = measured_run(Ledger(disturbed.records), layouts, ["s", "a", "b", "c"], (), "s", drift_limit=LIMIT, threads=1)
    assert run.rounds["a"] == (0.1, 0.1)
    assert run.rounds["b"] == (0.2,), "the 0.35 of round 1 was measured beside a drifted sentinel"
    assert run.rounds["c"] == (0.3,)
    assert run.measurements["s"].median_ms == pytest.approx(2.0, abs=0.005)
    assert not run.flags
    assert run.drift < LIMIT


def test_item_of_which_no_round_held_is_kept_with_a_flag(disturbed: Recorder) -> None:
    layouts = [[("a",), ("b",), ("c",)]] * 2
    disturbed.records = [record for record in disturbed.records if (record.get("id"), record.get("round")) != ("b", 0)]
    run = measured_run(Ledger(disturbed.records), layouts, ["s", "a", "b", "c"], (), "s", drift_limit=LIMIT, threads=1)
    assert run.rounds["b"] == (0.35,)
    assert run.flags == {"b": ("drifted",)}
    assert run.drift == pytest.approx(0.23, abs=0.01)


def test_round_in_which_a_neighbor_slowed_all_samples_of_an_item_does_not_count() -> None:
    recorder = Recorder()
    layout = [("a", "b")]
    for number, slowed in ((0, ""), (1, "a")):
        recorder.call(number, 0, slots([(0, ["a", "b"])], "s"), [2.0, 0.13 if slowed else 0.1, 0.2, 2.0])
        for record in recorder.records[-4:]:
            record["pace_ns"] = [60.0 if record["id"] == slowed else 37.0] * 3
            record["lost_s"] = 0.02 if record["id"] == slowed else 0.0
    recorder.records.append({"kind": "end", "conditions": {}})
    run = measured_run(Ledger(recorder.records), [layout] * 2, ["s", "a", "b"], (), "s", drift_limit=LIMIT, threads=1)
    assert run.rounds == {"s": (2.0, 2.0), "a": (0.1,), "b": (0.2, 0.2)}
    assert run.lost_s == 0.02
    assert not run.flags


def test_sentinel_that_a_neighbor_slowed_tells_nothing() -> None:
    recorder = Recorder()
    recorder.call(0, 0, slots([(0, ["a"]), (1, ["b"])], "s"), [2.0, 0.1, 2.9, 0.2, 2.01])
    for record in recorder.records[1:]:
        record["pace_ns"] = [60.0 if record["times_ms"][0] == 2.9 else 37.0] * 3
    ledger = Ledger(recorder.records)
    assert ledger.drifts(0, 0) == pytest.approx([0.0], abs=0.01)
    assert ledger.drifts(0, 1) == pytest.approx([0.0], abs=0.01)
    assert ledger.levels.usual_ms == pytest.approx(2.005)
    assert drift([], 2.0) == 0.0


def test_interrupted_samples_do_not_count_as_drift() -> None:
    recorder = Recorder()
    recorder.call(0, 0, slots([(0, [])], "s"), [2.0, 2.0])
    # Recorded: two of three samples shared the core with another program and took twice as long.
    recorder.records[-1].update(times_ms=[4.063, 2.01, 4.247], cpu_share=[0.5078, 1.0011, 0.5301])
    assert Ledger(recorder.records).drifts(0, 0) == pytest.approx([0.0025], abs=1e-4)


def test_interrupted_samples_of_several_threads_are_told_by_the_most_that_the_sentinel_got() -> None:
    recorder = Recorder()
    recorder.call(0, 0, slots([(0, [])], "s"), [2.0, 2.0], share=3.9)
    recorder.records[-1].update(times_ms=[4.063, 2.01, 4.247], cpu_share=[1.95, 3.88, 2.1])
    assert Ledger(recorder.records, threads=4).drifts(0, 0) == pytest.approx([0.0025], abs=1e-4)
    assert Ledger(recorder.records, threads=1).drifts(0, 0)[0] > 0.2


@given(cut=st.integers(0, 20))
def test_ledger_of_a_beginning_wants_exactly_the_rest(cut: int) -> None:
    recorder = Recorder()
    layout = [("a", "b"), ("c",), ("d", "e")]
    order = slots(list(enumerate(layout)), "s")
    recorder.call(0, 0, order, [1.0] * len(order))
    records = recorder.records[: 1 + cut % (len(order) + 1)]
    ledger = Ledger(records)
    seen = [record["id"] for record in records[1:] if record["stretch"] is not None]
    wanted = [name for place, part in enumerate(layout) for name in ledger.left((0, 0, place), part)]
    assert sorted(seen + wanted) == ["a", "b", "c", "d", "e"]
    closed = {record["closes"] for record in records[1:]}
    for place, part in enumerate(layout):
        assert ledger.open((0, 0, place), part) == (place not in closed)
    assert ledger.spent_s == pytest.approx(0.03 * (len(records) - 1))


def test_unusable_engine_is_not_waited_for() -> None:
    ledger = Ledger([{"kind": "unusable", "id": "b", "message": "no"}])
    assert ledger.left((0, 0, 0), ("a", "b", "c")) == ["a", "c"]
    assert ledger.unusable == {"b": "no"}


def test_what_a_journal_held_was_spent_before_the_run_went_on() -> None:
    ledger = Ledger([{"kind": "unusable", "id": "a", "message": "no", "seconds": 30.0}])
    ledger.add({"kind": "unusable", "id": "b", "message": "no", "seconds": 12.0})
    assert (ledger.spent_s, ledger.earlier_s) == (42.0, 30.0)
