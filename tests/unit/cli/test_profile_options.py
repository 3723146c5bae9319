"""Every option of ``edgeprune profile`` reaches `edgeprune.profile`, and what that can do can be asked for."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

import edgeprune
from edgeprune.cli.commands import root
from edgeprune.errors import LatencyError
from edgeprune.latency.table import LatencyTable

TABLE = Path(__file__).parents[2] / "data" / "onnxruntime_avx512_kernels.parquet"

NET = "from torch import nn\n\ndef build():\n    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())\n"
NOT_OPTIONS = {"model", "example_inputs", "board", "backend", "minutes", "graph", "kernel_graph"}
"""Arguments that are no option, or whose option the test gives anyway; a graph is what a program has."""
DEFAULTS = {
    "precision": "fp32",
    "table": None,
    "sustained": False,
    "threads": 1,
    "seed": 0,
    "lock_clocks": False,
    "power_mode": None,
    "energy": False,
    "meter": None,
    "host_meter": None,
    "rails": None,
    "percentiles": False,
    "tiles": (),
    "wait_s": 300.0,
}


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `edgeprune.profile` was called with; it measures nothing."""
    calls: dict[str, Any] = {}

    def take(*arguments: Any, **options: Any) -> None:
        calls.update(options, minutes=arguments[4], backend=arguments[3])
        raise LatencyError("nothing is measured here.")

    monkeypatch.setenv("EDGEPRUNE_ROOT", str(tmp_path / "board"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(edgeprune, "profile", take)
    (tmp_path / "net.py").write_text(NET)
    return calls


def ask(*words: str) -> None:
    with pytest.raises(LatencyError, match="nothing is measured"):
        root().main(["profile", "net.py:build", "--input", "input=1x3x8x8", *words], standalone_mode=False)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], {}),
        (["--lock-clocks"], {"lock_clocks": True}),
        (["--power-mode", "MAXN"], {"power_mode": "MAXN"}),
        (["--sustained"], {"sustained": True}),
        (["--percentiles"], {"percentiles": True}),
        (["--energy", "--rail", "VIN", "--rail", "CPU"], {"energy": True, "rails": ["VIN", "CPU"]}),
        (["--energy", "--meter", "echo 1"], {"energy": True, "meter": "echo 1"}),
        (["--energy", "--host-meter", "echo 1"], {"energy": True, "host_meter": "echo 1"}),
        (["--tiles", "16x8", "--tiles", "4x4"], {"tiles": ((16, 8), (4, 4))}),
        (["--threads", "2", "--seed", "7"], {"threads": 2, "seed": 7}),
        (["--precision", "int8", "--wait", "0.5"], {"precision": "int8", "wait_s": 30.0}),
    ],
)
def test_an_option_reaches_the_library(words: list[str], expected: dict[str, Any], asked: dict[str, Any]) -> None:
    ask("--minutes", "3", *words)
    assert (asked["minutes"], asked["backend"]) == (3.0, "onnxruntime")
    assert {name: asked[name] or DEFAULTS[name] for name in DEFAULTS} == {**DEFAULTS, **expected}
    assert asked["out"] == Path("table.parquet")
    assert asked["origins"] == [["net.py:build", "--input", "input=1x3x8x8"]]


def test_a_table_that_is_extended_is_replaced_unless_another_is_named(asked: dict[str, Any]) -> None:
    old = LatencyTable.load(TABLE)
    old.save("old.parquet")
    ask("--table", "old.parquet")
    assert (asked["table"], asked["out"]) == (old, Path("old.parquet"))
    ask("--table", "old.parquet", "--out", "new/table.parquet")
    assert (asked["table"], asked["out"]) == (old, Path("new/table.parquet"))


def test_nothing_of_the_library_is_out_of_reach(asked: dict[str, Any]) -> None:
    ask()
    from edgeprune.profiling.run import profile

    assert set(inspect.signature(profile).parameters) - NOT_OPTIONS == set(asked) - NOT_OPTIONS
