"""Random networks, cut at random: the cut model equals the masked one, shapes are as predicted, plans survive files."""

from __future__ import annotations

import random
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgeprune.graph.tracing import trace
from edgeprune.surgery.cutting import apply
from edgeprune.surgery.kept_tiles import KeptTiles
from edgeprune.surgery.plan import PruningPlan, make_plan
from edgeprune.surgery.tiles import tile_grids

X = torch.randn(1, 3, 4, 4, dtype=torch.float64)


@pytest.mark.parametrize("examples", [100, pytest.param(2000, marks=pytest.mark.slow)])
def test_random_networks_cut_equals_masked(
    random_nets: ModuleType, compare: Any, tmp_path: Path, examples: int
) -> None:
    removing: list[bool] = []
    shortened: list[int] = []

    @settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(random_nets.networks(), st.integers(0, 1 << 16))
    def compared(steps: Any, seed: int) -> None:
        torch.manual_seed(seed)
        dice = random.Random(seed)
        graph = trace(random_nets.RandomNet(*steps).double(), X)
        kept = {g.name: sorted(dice.sample(range(g.size), dice.randint(1, g.size))) for g in graph.groups}
        for branch in graph.branches:
            if dice.random() < 0.5:
                kept |= {name: [] for name in branch.groups}
        plan = make_plan(graph, kept, allow_empty=True)
        assert compare(graph, plan) < 1e-9
        shapes = graph.shapes({name: width for name, width in plan.widths().items() if width})
        pruned = apply(graph.model, plan)
        shortened.append(len(plan.removed))
        for name, tensor in [*pruned.named_parameters(), *pruned.named_buffers()]:
            assert shapes[name] == tuple(tensor.shape), name
        plan.save(tmp_path / "plan.json")
        assert PruningPlan.load(tmp_path / "plan.json").hash == plan.hash
        removing.append(bool(plan.kept))

    compared()
    assert sum(removing) > 0.8 * len(removing)
    assert sum(shortened) > 0.05 * len(removing)


@pytest.mark.parametrize("examples", [25, pytest.param(500, marks=pytest.mark.slow)])
def test_random_networks_with_tiles_cut_equals_masked(
    random_nets: ModuleType, compare: Any, tmp_path: Path, examples: int
) -> None:
    tiled: list[int] = []
    folded: list[int] = []

    @settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(random_nets.networks(), st.integers(0, 1 << 16))
    def compared(steps: Any, seed: int) -> None:
        torch.manual_seed(seed)
        dice, tiles = random.Random(seed), {}
        graph = trace(random_nets.RandomNet(*steps).double(), X)
        kept = {g.name: sorted(dice.sample(range(g.size), dice.randint(1, g.size))) for g in graph.groups}
        for branch in graph.branches:
            if dice.random() < 0.2:
                kept |= {name: [] for name in branch.groups}
        size, density = (dice.randint(1, 6), dice.randint(1, 6)), dice.choice([0.3, 0.6, 0.9])
        for name, grid in tile_grids(graph.model, graph, size, classifiers=True).items():
            array = [[dice.random() < density for _ in range(grid.shape[1])] for _ in range(grid.shape[0])]
            tiles[name] = KeptTiles.of(grid, np.array(array))
        plan = make_plan(graph, kept if dice.random() < 0.5 else {}, kept_tiles=tiles, allow_empty=True)
        assert compare(graph, plan) < 1e-9
        plan.save(tmp_path / "plan.json")
        assert PruningPlan.load(tmp_path / "plan.json") == plan
        tiled.append(len(plan.kept_tiles))
        folded.append(len(plan.folds))

    compared()
    assert sum(map(bool, tiled)) > 0.6 * len(tiled), tiled
    assert any(folded), folded


def test_a_rotation_that_random_weights_may_not_show_is_kept(random_nets: ModuleType, compare: Any) -> None:
    """Its shift is an integer that forward reads and that equals a size that changes; a dead unit behind it hides the shift."""
    torch.manual_seed(0)
    dice = random.Random(0)
    steps = [("residual", 0), ("transposed", 0), ("rotate", 1), ("concat", 0), ("grouped", 7)]
    graph = trace(random_nets.RandomNet(steps, [], []).double(), X)
    kept = {g.name: sorted(dice.sample(range(g.size), dice.randint(1, g.size))) for g in graph.groups}
    assert compare(graph, make_plan(graph, kept)) < 1e-9
