"""Thermal equilibrium: the rule that ends the heating, and a short heating of this machine."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

import edgeprune.boards.onboard
from edgeprune.boards.board import Board
from edgeprune.latency.table import LatencyTable
from edgeprune.latency.table_rows import network_key, network_row
from edgeprune.profiling.sustaining import statement, sustained, with_sustained
from edgeprune.spec import Kernel, Measurement

ONBOARD = Path(edgeprune.boards.onboard.__file__).parent
MODULES = ("failures", "engines", "tree", "gpus", "sensors", "kept", "pace", "bench", "sustain")


@pytest.fixture
def rule() -> Iterator[ModuleType]:
    """The module of the board, as it imports others there: by bare name."""
    before = {name: sys.modules.get(name) for name in MODULES}
    for name in MODULES:
        spec = importlib.util.spec_from_file_location(name, ONBOARD / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    yield sys.modules["sustain"]
    for name, module in before.items():
        if module is None:
            del sys.modules[name]
        else:
            sys.modules[name] = module


def heating(seconds: int, constant_s: float) -> tuple[list[float], list[float | None]]:
    """A board that warms from 40 to 70 degrees and slows by a fifth, with some jitter."""
    jitter = [0.003 * math.sin(1.7 * second) for second in range(seconds)]
    warm = [1 - math.exp(-second / constant_s) for second in range(seconds)]
    return [10 * (1 + 0.2 * w + j) for w, j in zip(warm, jitter, strict=True)], [40 + 30 * w for w in warm]


def first_settled(rule: ModuleType, windows: list[float], temperatures: list[float | None]) -> int | None:
    return next((n for n in range(1, len(windows)) if rule.settled_at(windows[:n], temperatures[:n])), None)


def test_heating_ends_where_latency_and_temperature_stand_still(rule: ModuleType) -> None:
    windows, temperatures = heating(400, constant_s=40.0)
    ended = first_settled(rule, windows, temperatures)
    assert ended is not None
    assert temperatures[ended] > 68, "it is as hot as it becomes, within two degrees"
    # Without a sensor the latency decides, and it is near its end too.
    blind = first_settled(rule, windows, [None] * 400)
    assert blind is not None
    assert windows[blind] > 0.97 * windows[-1]
    assert blind <= ended
    # A board whose latency does not tell of its heat is still waited for.
    by_heat = first_settled(rule, [10.0] * 400, temperatures)
    assert by_heat is not None
    assert by_heat > 40


def test_too_few_windows_say_nothing(rule: ModuleType) -> None:
    half = rule.COMPARED
    assert rule.moved([1.0] * (2 * half - 1)) is None
    assert not rule.settled_at([1.0] * (2 * half - 1), [50.0] * (2 * half - 1))
    assert rule.settled_at([1.0] * 2 * half, [50.0] * 2 * half)
    assert rule.moved([1.0] * half + [1.1] * half) == pytest.approx(0.1)
    assert not rule.settled_at([1.0] * half + [1.1] * half, [50.0] * 2 * half)


def test_rest_ends_when_nothing_cools_any_more(rule: ModuleType) -> None:
    assert not rule.cooled([60.0, 55.0, 50.0])
    assert not rule.cooled([60.0 - second for second in range(12)])
    assert rule.cooled([60.0 - 0.05 * second for second in range(12)])
    assert not rule.cooled([None] * 12)


@pytest.mark.parametrize(
    ("result", "said"),
    [
        (
            {"seconds": 84.0, "settled": True, "moved": 0.004, "celsius": {"cool": 41.0, "hot": 69.0}},
            "after 84 s of heating the dense network takes 1.180 times as long as at first, at 69 degrees Celsius "
            "instead of 41; the board is in equilibrium",
        ),
        (
            {"seconds": 600.0, "settled": False, "moved": 0.018, "celsius": {"cool": None, "hot": None}},
            "after 600 s of heating the dense network takes 1.180 times as long as at first, no temperature can be "
            "read; the board is not in equilibrium: its latency still moves by 1.8%",
        ),
        (
            {"seconds": 5.0, "settled": False, "moved": None, "celsius": {"cool": 41.0, "hot": 50.0}},
            "after 5 s of heating the dense network takes 1.180 times as long as at first, at 50 degrees Celsius "
            "instead of 41; the board is not in equilibrium: too short to tell",
        ),
    ],
)
def test_statement_says_what_was_reached(result: dict[str, object], said: str) -> None:
    assert statement(result, 1.18) == said


def test_networks_are_timed_cool_and_hot(board: Board, conv_engine: Callable[..., bytes]) -> None:
    told: list[str] = []
    with board.hold("test"):
        found = sustained(
            board,
            {"dense": conv_engine(16), "half": conv_engine(8)},
            "dense",
            runtime="onnxruntime",
            threads=1,
            limit_s=1.5,
            rest_s=0.3,
            window_s=0.02,
            progress=lambda done, total, left_s, message: told.append(message),
        )
    assert set(found["networks"]) == {"dense", "half"}
    for network in found["networks"].values():
        assert network["ratio"] == pytest.approx(network["sustained_ms"] / network["burst_ms"])
        assert 0.2 < network["ratio"] < 5
    assert found["networks"]["half"]["burst_ms"] < found["networks"]["dense"]["burst_ms"]
    assert len(found["curve"]) >= 30
    assert found["settled"] or found["seconds"] >= 1.5
    assert found["conditions"]["after"]["context"]["cpu_s"] > found["conditions"]["before"]["context"]["cpu_s"]
    assert "heating to equilibrium" in told
    assert "s of heating" in found["statement"]


def test_table_keeps_what_earlier_runs_sustained() -> None:
    kernel = Kernel("Conv", "conv", ((1, 8, 8, 8),), (1, 8, 8, 8))
    timed = Measurement(1.0, 1.0, 1.0, 0.0, (1.0,), 3)
    header = {"identity": {"architecture": "x86_64"}, "runtime": "onnxruntime", "threads": 1, "precision": "fp32"}
    networks = {"dense": [kernel], "large/dense": [kernel, kernel]}
    table = LatencyTable.from_rows(header, [network_row(name, each, timed, {}) for name, each in networks.items()])
    keys = {row["key"]: network_key(row["kernels"]) for row in table.rows}
    for name, ratio in (("dense", 1.1), ("large/dense", 1.2), ("dense", 1.3)):
        table = with_sustained(table, {"settled": True, "networks": {name: {"ratio": ratio}}})
    expected = {keys["dense"]: {"ratio": 1.3}, keys["large/dense"]: {"ratio": 1.2}}
    assert table.header["sustained"]["networks"] == expected
    assert len(table) == 2
