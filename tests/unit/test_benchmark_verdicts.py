"""What benchmarks of pruning say of their rows: what is missing, which pairs lie in the window, how far ours are ahead."""

from __future__ import annotations

import importlib
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a script of benchmarks/ as it would be run."""

    def imported(name: str) -> ModuleType:
        monkeypatch.syspath_prepend(str(BENCHMARKS))
        return importlib.import_module(name)

    return imported


@pytest.mark.parametrize(
    "script",
    ["allocation", "budget", "damage_curves", "distillation", "pruning_quality", "reconstruction", "soft_masking"],
)
def test_rows_that_are_there_are_printed_and_what_is_missing(
    benchmark: Any, script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if script not in ("allocation", "budget"):
        pytest.importorskip("PIL", reason="the images of CIFAR-10 are read by Pillow")
    monkeypatch.setattr(sys, "argv", [script, "--table"])
    benchmark(script).main()
    said = capsys.readouterr().out
    assert "missing: " in said
    assert script == "budget" or said.startswith("|")


def pair(*again: float, rounds: tuple[float, ...] = (1.02, 0.98), window: dict[str, Any] | None = None) -> Any:
    """A row of the budget benchmark; shares are of the budget, the interval of each round is half a percent to either side."""
    turns = [
        {"of_budget": one, "high_of_budget": one + 0.005, "damage": damage}
        for damage, one in enumerate(rounds, start=1)
    ]
    return {
        "budget_ms": 5.0,
        "rounds": turns,
        "again": [{"of_budget": one} for one in again],
        "notes": [],
        **({} if window is None else {"window": window}),
    }


def test_the_pairs_are_always_the_same_and_of_all_networks(benchmark: Any) -> None:
    budget = benchmark("budget")
    found = budget.pairs()
    assert found == budget.pairs()
    assert len(found) == 50
    kinds = Counter(next(kind for kind in budget.KINDS if one.model in kind) for one in found)
    assert set(kinds) == set(budget.KINDS)
    assert min(kinds.values()) >= 3
    assert {one.model for one in found} == set(budget.MODELS) == {name for kind in budget.KINDS for name in kind}
    assert all(0 <= one.place < 1 for one in found)


def test_a_pair_below_the_window_is_listed_only_where_nothing_better_is_proven_to_be_in_it(benchmark: Any) -> None:
    budget = benchmark("budget")
    proven = {"bound": 0.995, "taken": 1.0}
    assert budget.nothing_to_gain(pair(0.95, window=proven))
    assert not budget.nothing_to_gain(pair(0.98, window=proven)), "it lies in the window"
    assert not budget.nothing_to_gain(pair(0.95)), "nobody asked the solver"
    for bound in (None, 0.98):
        assert not budget.nothing_to_gain(pair(0.95, window={"bound": bound, "taken": 1.0}))


def test_what_is_taken_after_some_rounds_is_what_the_loop_would_take(benchmark: Any) -> None:
    budget = benchmark("budget")
    found = pair(0.98, rounds=(1.02, 0.90, 0.985))
    assert [budget.met_after(found, count) for count in range(4)] == [False, False, False, False]
    found["rounds"][2]["damage"] = 0.5
    assert [budget.met_after(found, count) for count in range(4)] == [False, False, False, True], "the least damage"
    at_once = pair(0.98, rounds=(0.98, 0.99))
    assert [budget.met_after(at_once, count) for count in range(4)] == [True] * 4


def test_figures_stand_beside_what_they_are_to_be(benchmark: Any) -> None:
    budget = benchmark("budget")
    listed = pair(0.9, window={"bound": 1.0, "taken": 1.0})
    rows = [pair(0.98, 0.99, 0.985), pair(0.96), pair(1.004), pair(1.02), listed]
    said = budget.judged(rows)
    assert said[0].startswith("in the window [-3.0%, +0.5%]: 2 of 4 that are not listed (50%; to be at least 95%)")
    assert said[1] == "listed, nothing to gain: 1 of 5 (20%; at most 10%)"
    assert said[2] == "above +1%: 1 (none)"
    assert said[3].endswith("after 0 (predicted only), 1, 2, 3 rounds: 0%, 0%, 100%, 100%")
    assert "0.50% in the mean, 0.50% at most" in said[4]


def test_the_best_of_ours_is_compared_with_the_best_of_the_others_and_of_the_peer(benchmark: Any) -> None:
    ahead = benchmark("pruning_rivals.ahead").ahead
    cells = {
        "edgeprune": {"batch_norm": 0.75, "reconstruction": 0.84, "epoch_seed0": 0.86, "epoch_seed1": 0.88},
        "edgeprune, widths only": {"batch_norm": 0.56},
        "blockdrop": {"batch_norm": 0.60, "reconstruction": 0.85, "epoch_seed0": 0.865},
        "netadapt": {"batch_norm": 0.89, "epoch_seed0": 0.88},
        "torch-pruning magnitude plain": {"batch_norm": 0.13},
        "torch-pruning taylor plain": {"reachable": False},
    }
    peers = ("torch-pruning magnitude plain", "torch-pruning taylor plain")
    assert ahead(cells, "resnet56, 2x", peers) == [
        "resnet56, 2x, before training: edgeprune has 84.0%; -1.0 points to blockdrop (85.0%); "
        "+71.0 points to torch-pruning magnitude plain (13.0%)",
        "resnet56, 2x, after one epoch: edgeprune has 87.0%; -1.0 points to netadapt (88.0%)",
    ]
    assert ahead({"edgeprune": cells["edgeprune"]}, "2x", peers) == []
