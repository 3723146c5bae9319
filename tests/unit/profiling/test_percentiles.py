"""Percentiles of single inferences: real ones of this machine, and what they are of samples that are known."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from edgeprune.boards.board import Board
from edgeprune.latency.table import LatencyTable
from edgeprune.latency.table_rows import network_row
from edgeprune.profiling.percentiles import PERCENTILES, percentiles, with_percentiles
from edgeprune.profiling.statistics import Samples, at_percentile
from edgeprune.spec import Kernel, Measurement

KERNEL = Kernel("Relu", "elementwise", ((1, 8, 4, 4),), (1, 8, 4, 4))


def test_a_percentile_is_that_of_each_round_and_one_bad_round_does_not_decide_it() -> None:
    calm = Samples(tuple(np.linspace(1.0, 2.0, 101)), (1.0,) * 101)
    bad = Samples((50.0,) * 101, (0.1,) * 101)
    found = at_percentile([calm, calm, bad], 95)
    assert found.median_ms == pytest.approx(1.95)
    assert found.rounds_ms == pytest.approx((1.95, 1.95, 50.0))
    # What interrupts an inference is a part of its tail: nothing is left out for it.
    assert at_percentile([bad], 50).median_ms == 50.0


def test_single_inferences_of_engines_are_timed(board: Board, conv_engine: Callable[..., bytes]) -> None:
    told: list[tuple[int, int]] = []
    found = percentiles(
        board,
        {"small": conv_engine(8), "large": conv_engine(32)},
        runtime="onnxruntime",
        threads=1,
        rounds=3,
        runs=40,
        progress=lambda done, total, *_: told.append((done, total)),
    )
    assert told[-1] == (6, 6)
    for record in found.values():
        assert record["runs"] >= 3 * 40
        ratios = [record["ratio"][str(one)] for one in PERCENTILES]
        assert 1.0 <= ratios[0] <= ratios[1] <= ratios[2]
    assert found["small"]["median_ms"] < found["large"]["median_ms"]


def test_a_table_keeps_them_by_network() -> None:
    header = {"identity": {"device": "x"}, "runtime": "onnxruntime", "threads": 1, "precision": "fp32"}
    time = Measurement(2.0, 2.0, 2.0, 0.0, (2.0,), 1)
    table = LatencyTable.from_rows(
        header, [network_row("dense", [KERNEL], time), network_row("half", [KERNEL] * 2, time)]
    )
    first = with_percentiles(table, {"dense": {"ratio": {"95": 1.5}}})
    both = with_percentiles(first, {"half": {"ratio": {"95": 2.0}}})
    chosen = both.chosen(percentile=95)
    assert [network.measurement.median_ms for network in chosen.networks] == [3.0, 4.0]
