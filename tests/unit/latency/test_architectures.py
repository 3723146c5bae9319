"""Whole networks from descriptions of their architecture, alone and on top of other devices' predictors."""

from __future__ import annotations

import numpy as np
import pytest

from edgeprune.errors import ConfigError, TableFormatError
from edgeprune.latency.architectures import fit_architectures

OPERATIONS = ("none", "skip", "conv1x1", "conv3x3", "pool")
COSTS = {
    "board": np.array([0.0, 0.2, 2.0, 9.0, 1.5]),
    "phone": np.array([0.0, 0.1, 1.2, 6.5, 1.1]),
    "gpu": np.array([0.0, 0.05, 0.4, 0.6, 0.3]),
}


def cells(count: int, seed: int) -> list[dict[str, str]]:
    source = np.random.default_rng(seed)
    return [{f"edge{edge}": OPERATIONS[source.integers(5)] for edge in range(6)} for _ in range(count)]


def timed(device: str, rows: list[dict[str, str]], seed: int = 0) -> np.ndarray:
    """A constant, what each operation costs, and 1 % of noise."""
    sums = [5.0 + sum(COSTS[device][OPERATIONS.index(operation)] for operation in row.values()) for row in rows]
    return np.array(sums) * np.exp(np.random.default_rng(seed).normal(0, 0.01, len(rows)))


def share_within(predicted: np.ndarray, truth: np.ndarray) -> float:
    return float(np.mean(np.abs(predicted / truth - 1) <= 0.1))


def test_networks_of_one_space_are_predicted_from_their_description() -> None:
    rows, asked = cells(300, seed=1), cells(200, seed=2)
    predictor = fit_architectures(rows, timed("board", rows).tolist())
    frame = predictor.predict(asked)
    truth = timed("board", asked, seed=1)
    assert share_within(frame["ms"].to_numpy(), truth) > 0.85
    assert ((frame["low_ms"] <= truth) & (truth <= frame["high_ms"])).mean() > 0.8
    assert set(predictor.scores) == {"ridge", "interactions", "gradient_boosting", "extra_trees"}


def test_numbers_and_texts_may_be_mixed() -> None:
    source = np.random.default_rng(0)
    rows = [
        {"layers": float(source.integers(1, 7)), "width": float(source.choice([256, 512, 640])), "norm": norm}
        for norm in source.choice(["pre", "post"], 250).tolist()
    ]
    ms = np.array([0.01 * row["layers"] * row["width"] * (1.2 if row["norm"] == "pre" else 1.0) + 3 for row in rows])
    predictor = fit_architectures(rows[:200], ms[:200].tolist())
    assert share_within(predictor.ms(rows[200:]), ms[200:]) > 0.95


def test_twenty_networks_are_enough_on_top_of_another_device() -> None:
    known, few, asked = cells(39, seed=3), cells(20, seed=4), cells(300, seed=5)
    sources = [fit_architectures(known, timed(device, known).tolist()) for device in ("phone", "gpu")]
    times, truth = timed("board", few), timed("board", asked, seed=1)
    moved = fit_architectures(few, times.tolist(), transfer_from=sources)
    alone = fit_architectures(few, times.tolist())
    assert moved.chosen.startswith("transfer")
    assert share_within(moved.ms(asked), truth) > share_within(alone.ms(asked), truth) + 0.1


def test_sources_that_say_nothing_are_not_used() -> None:
    known, few = cells(39, seed=6), cells(20, seed=7)
    noise = fit_architectures(known, np.exp(np.random.default_rng(0).normal(0, 1, 39)).tolist())
    moved = fit_architectures(few, timed("board", few).tolist(), transfer_from=[noise])
    assert moved.scores[moved.chosen] <= moved.scores["ridge"]
    assert moved.scores["transfer_0"] > moved.scores["ridge"]


def test_fitting_is_deterministic_and_one_network_is_enough() -> None:
    rows = cells(30, seed=8)
    times = timed("gpu", rows).tolist()
    first, second = (fit_architectures(rows, times, seed=2) for _ in range(2))
    assert first.ms(rows).tolist() == second.ms(rows).tolist()
    lone = fit_architectures(rows[:1], times[:1])
    assert lone.ms(rows[:1])[0] == pytest.approx(times[0])
    frame = lone.predict(rows[1:3])
    assert (frame["high_ms"] > 1.2 * frame["ms"]).all()


def test_bad_descriptions_and_times_are_named() -> None:
    rows = cells(3, seed=9)
    with pytest.raises(TableFormatError, match="one time per network, found 2 times of 3 networks"):
        fit_architectures(rows, [1.0, 2.0])
    with pytest.raises(TableFormatError, match=r"positive and finite, found nan ms in row 2"):
        fit_architectures(rows, [1.0, float("nan"), 2.0])
    with pytest.raises(TableFormatError, match="one time per network"):
        fit_architectures([], [])
    with pytest.raises(ConfigError, match=r"must have the fields edge0, .* found edge0 in number 1"):
        fit_architectures([rows[0], {"edge0": "pool"}], [1.0, 2.0])
    with pytest.raises(ConfigError, match="must hold numbers or texts, not both"):
        fit_architectures([{"width": 3.0}, {"width": "wide"}], [1.0, 2.0])
    with pytest.raises(ConfigError, match="between 0 and 1"):
        fit_architectures(rows, [1.0, 2.0, 3.0], level=0.0)
    fitted = fit_architectures(rows, [1.0, 2.0, 3.0])
    with pytest.raises(ConfigError, match="must have the fields"):
        fitted.ms([{"edge7": "pool"}])
