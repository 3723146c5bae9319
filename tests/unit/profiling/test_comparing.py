"""Comparison by interleaved ratio, on this machine."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeprune.boards.board import Board
from edgeprune.errors import ConfigError
from edgeprune.profiling.comparing import interleaved
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
        assert len(ratio.rounds) == len(found.measurements[name].rounds_ms) == 10
    assert told[-1] == (30, 30)
    assert found.processes == (0, 0, 1, 1, 1, 2, 2, 3, 3, 3)
    assert found.ratios["same"].high - found.ratios["same"].low >= 0.9 * 2 * 1.96 * 0.0027 / 2
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


def test_reference_must_be_among_the_engines(board: Board) -> None:
    with pytest.raises(ConfigError, match=r"the reference must be one of the engines \['a'\], found 'b'"):
        compare(board, {"a": b""}, "b")


def test_there_must_be_a_round(board: Board) -> None:
    with pytest.raises(ConfigError, match="at least one round and one process, found 0 and 4"):
        compare(board, {"a": b""}, "a", rounds=0)


def test_more_rounds_are_shared_by_more_processes(board: Board, conv_engine: Callable[..., bytes]) -> None:
    settings: dict[str, float] = {"samples": 1, "sample_ms": 0.2, "warmup_ms": 0.2}
    found = compare(board, {"a": conv_engine(8)}, "a", rounds=30, **settings)  # type: ignore[arg-type]
    assert len(set(found.processes)) == 6
    assert len(found.processes) == 30
