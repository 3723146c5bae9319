"""Comparison by interleaved ratio, on this machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeprune.boards.board import Board
from edgeprune.errors import ConfigError
from edgeprune.profiling.comparing import Comparison, _Timing, disturbance, interleaved
from edgeprune.profiling.measuring import compare
from edgeprune.profiling.statistics import SINGLE_RUNS


@given(count=st.integers(1, 6), cycles=st.integers(1, 4))
def test_every_engine_is_first_as_often_as_any_other(count: int, cycles: int) -> None:
    names = [f"engine{number}" for number in range(count)]
    orders = interleaved(names, 2 * count * cycles)
    assert all(sorted(order) == names for order in orders)
    firsts = [order[0] for order in orders]
    assert {firsts.count(name) for name in names} == {2 * cycles}


def test_engine_compared_with_itself_has_ratio_one(board: Board, conv_engine: Callable[..., bytes]) -> None:
    engines = {"reference": conv_engine(48), "same": conv_engine(48), "half": conv_engine(24)}
    told: list[tuple[int, int]] = []
    found = compare(
        board,
        engines,
        "reference",
        rounds=10,
        sample_ms=3.0,
        progress=lambda done, total, *_: told.append((done, total)),
    )
    assert found.ratios["reference"].ratio == 1.0
    assert found.ratios["same"].ratio == pytest.approx(1.0, abs=0.1)
    assert 0.15 < found.ratios["half"].ratio < 0.75
    for name, ratio in found.ratios.items():
        assert ratio.low <= ratio.ratio <= ratio.high
        assert len(ratio.rounds) == len(found.measurements[name].rounds_ms) >= 5
    rounds = len(found.processes) + found.disturbed
    assert 10 <= rounds <= 30
    assert told[-1] == (30, 30)
    assert told.count((30, 30)) == 1
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert rounds > 10 or found.processes == (0, 0, 1, 1, 1, 2, 2, 3, 3, 3)
    several = len(set(found.processes))
    assert found.ratios["same"].high - found.ratios["same"].low >= 0.9 * 2 * 1.96 * 0.0027 / several**0.5
    assert found.level_ms == pytest.approx(found.measurements["reference"].median_ms, rel=0.3)
    assert found.conditions["after"]["context"]["cpu_s"] > 0


def test_percentiles_of_single_inferences_are_compared_when_asked_for(
    board: Board, conv_engine: Callable[..., bytes]
) -> None:
    engines = {"reference": conv_engine(48), "half": conv_engine(24)}
    found = compare(board, engines, "reference", rounds=4, processes=2, percentile=95)
    timed = found.measurements
    assert timed["half"].samples >= 4 * SINGLE_RUNS
    assert timed["half"].min_ms < timed["half"].median_ms, "a tail is longer than the shortest inference"
    rounds = zip(timed["half"].rounds_ms, timed["reference"].rounds_ms, strict=True)
    assert found.ratios["half"].rounds == pytest.approx([value / reference for value, reference in rounds])
    assert 0.1 < found.ratios["half"].ratio < 0.9


def test_without_patience_all_rounds_count(board: Board, conv_engine: Callable[..., bytes]) -> None:
    settings: dict[str, float] = {"samples": 1, "sample_ms": 0.2, "warmup_ms": 0.2}
    engines: dict[str, bytes | Path] = {"a": conv_engine(8), "b": conv_engine(8)}
    found = compare(board, engines, "a", rounds=8, patience=0.0, **settings)  # type: ignore[arg-type]
    assert len(found.ratios["b"].rounds) == len(found.processes) == 8
    assert found.disturbed == 0


def test_reference_must_be_among_the_engines(board: Board) -> None:
    with pytest.raises(ConfigError, match=r"the reference must be one of the engines \['a'\], found 'b'"):
        compare(board, {"a": b""}, "b")


def test_there_must_be_a_round(board: Board) -> None:
    with pytest.raises(ConfigError, match="at least one round and one process, found 0 and 4"):
        compare(board, {"a": b""}, "a", rounds=0)


def test_more_rounds_are_shared_by_more_processes(board: Board, conv_engine: Callable[..., bytes]) -> None:
    settings: dict[str, float] = {"samples": 1, "sample_ms": 0.2, "warmup_ms": 0.2}
    found = compare(board, {"a": conv_engine(8)}, "a", rounds=30, **settings)  # type: ignore[arg-type]
    assert len(found.processes) + found.disturbed >= 30
    assert len(found.processes) < 30 or len(set(found.processes)) >= 6


QUIET_MS, SLOWED_MS = 1.18, 1.65


class Recorded(Board):
    """A board whose calls are answered with made up times: those of a core with a neighbor that comes and goes."""

    def __init__(self, states: str) -> None:
        self.states, self.asked = iter(states), 0

    def call(self, operation: str, request: Any, *, on_event: Any = None, **_: Any) -> dict[str, Any]:
        for order in request["rounds"]:
            self.asked += 1
            slowed = next(self.states) == "x"
            for name in order:
                # Arithmetic is slowed down more than memory: the ratio of the two engines is another one.
                quick, slow = {"dense": (QUIET_MS, SLOWED_MS), "pruned": (0.5, 0.62)}[name]
                time_ms = slow if slowed else quick
                on_event({"event": "sample", "id": name, "times_ms": [time_ms] * 3, "cpu_share": [1.0] * 3})
        return {"conditions": {"before": {}, "after": {}}, "overhead_ms": 0.0}


def timed(states: str, rounds: int = 12, level_ms: float | None = None) -> tuple[_Timing, Recorded]:
    board = Recorded(states)
    timing = _Timing(board, ["dense", "pruned"], {"threads": 1}, rounds, level_ms, None)
    for _ in range(0, rounds, 3):
        timing.run([["dense", "pruned"]] * 3)
    assert board.asked == rounds
    timing.again()
    return timing, board


def counted_ms(timing: _Timing) -> set[float]:
    return {one.told["pruned"]["times_ms"][0] for one in timing.counted("pruned")}


def test_rounds_that_a_neighbor_slowed_down_are_timed_again_and_do_not_count() -> None:
    timing, board = timed("xxxxx..xx..." + "xx" + "." * 20)
    assert counted_ms(timing) == {0.5}
    assert timing.usual_ms() == QUIET_MS
    assert len(timing.counted("pruned")) == 12
    assert board.asked == 12 + 7 + 2


def test_quiet_rounds_are_timed_once() -> None:
    timing, board = timed("." * 12)
    assert board.asked == len(timing.counted("pruned")) == 12


def test_rounds_are_added_at_most_once_over() -> None:
    timing, board = timed("xxxx....xxxx" + "x.xx" * 3)
    assert board.asked == 24
    assert counted_ms(timing) == {0.5}, "fewer than were asked for"
    assert len(timing.counted("pruned")) == 7


def test_one_more_time_as_many_rounds_are_tried_where_hardly_any_says_something() -> None:
    timing, board = timed("x" * 12 + "x" * 10 + ".x.x" + "x" * 10, level_ms=QUIET_MS)
    assert board.asked == 36
    assert timing.usual_ms() == QUIET_MS
    assert counted_ms(timing) == {0.5, 0.62}, "two rounds are too few to say what the ratio is"
    assert timing.crowded()
    timing, board = timed("x" * 12 + "x" * 10 + ".x..x" + "x" * 10, level_ms=QUIET_MS)
    assert counted_ms(timing) == {0.5}
    assert not timing.crowded()


def test_state_that_is_hardly_ever_left_is_the_usual_one() -> None:
    timing, board = timed("xxxx.xxxxxxx" + "x" * 12)
    assert board.asked == 13, "the one quick round is as far from usual as a slow one would be"
    assert counted_ms(timing) == {0.62}
    assert len(timing.counted("pruned")) == 12


def test_comparison_that_lies_in_a_disturbance_is_seen_by_the_level_of_the_last_one() -> None:
    assert counted_ms(timed("x" * 12)[0]) == {0.62}, "nothing tells"
    timing, _ = timed("x" * 12 + "xx" + "." * 20, level_ms=QUIET_MS)
    assert counted_ms(timing) == {0.5}


def test_level_of_the_last_comparison_is_given_up_where_the_board_has_changed() -> None:
    timing, board = timed("x" * 36, level_ms=QUIET_MS)
    assert board.asked == 36
    assert timing.usual_ms() == SLOWED_MS
    assert len(timing.counted("pruned")) == 36
    assert not timing.crowded()


def comparison(counted: int, disturbed: int, crowded: bool = False) -> Comparison:
    return Comparison("dense", {}, {}, {}, 0.0, (0,) * counted, 1.0, disturbed, crowded)


def test_disturbed_rounds_are_told_of_all_comparisons_together_and_only_where_there_were_any() -> None:
    assert disturbance([]) == disturbance([comparison(20, 0), comparison(20, 0)]) == ""
    assert disturbance([comparison(20, 3), comparison(20, 1)]) == "leaving out 4 of 44 rounds as disturbed"
    crowded = [comparison(20, 3), comparison(60, 0, crowded=True)]
    assert disturbance(crowded) == "nearly all rounds were disturbed, so all count"
