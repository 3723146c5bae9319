"""Models of which only some tiles are left compute what the dense model computes with the other tiles at zero."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import edgeprune
from edgeprune.errors import EmptyPlanError, PlanError, ReconstructionError
from edgeprune.graph.channel_graph import ChannelGraph
from edgeprune.graph.tracing import trace
from edgeprune.recovery.fine_tuning import FineTuning, fine_tune
from edgeprune.recovery.reconstruction import reconstruct
from edgeprune.surgery.block_sparse import BlockSparseLinear
from edgeprune.surgery.cutting import apply
from edgeprune.surgery.kept_tiles import KeptTiles
from edgeprune.surgery.plan import PruningPlan, make_plan
from edgeprune.surgery.program_module import ProgramModule
from edgeprune.surgery.tile_layout import layout_of
from edgeprune.surgery.tiles import TileGrid, tile_grids
from edgeprune.tasks.task import Task

Compare = Callable[..., float]


@pytest.fixture(scope="module")
def vit(vision_transformers: ModuleType) -> ChannelGraph:
    torch.manual_seed(0)
    return trace(vision_transformers.VisionTransformer().double(), vision_transformers.IMAGES.double())


@pytest.fixture(scope="module")
def spelled_out(vision_transformers: ModuleType) -> ChannelGraph:
    torch.manual_seed(0)
    return trace(vision_transformers.SpelledOut(blocks=1).double(), vision_transformers.IMAGES.double())


def narrowed(graph: ChannelGraph, seed: int) -> dict[str, list[int]]:
    """Some units of every group."""
    dice = np.random.default_rng(seed)
    return {
        group.name: sorted(dice.permutation(group.size)[: int(dice.integers(max(1, group.size // 2), group.size + 1))])
        for group in graph.groups
    }


# The layer alone


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_layer_equals_its_masked_weight(data: st.DataObject) -> None:
    rows, columns = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    edges = [
        (0, *sorted(data.draw(st.sets(st.integers(1, size - 1), max_size=4)) if size > 1 else ()), size)
        for size in (rows, columns)
    ]
    grid = TileGrid("w", *edges)
    flat = data.draw(
        st.lists(st.booleans(), min_size=grid.shape[0] * grid.shape[1], max_size=grid.shape[0] * grid.shape[1])
    )
    tiles = KeptTiles.of(grid, np.array(flat).reshape(grid.shape))
    left = [data.draw(st.lists(st.sampled_from(range(size)), min_size=1, unique=True)) for size in (rows, columns)]
    blocks = (np.searchsorted(axis, stays, side="right") - 1 for axis, stays in zip(edges, left, strict=True))
    layout = layout_of(tiles.array(), *blocks)

    weight, bias = torch.randn(rows, columns, dtype=torch.float64), torch.randn(len(left[0]), dtype=torch.float64)
    mask = torch.tensor(tiles.array().repeat(np.diff(edges[0]), 0).repeat(np.diff(edges[1]), 1))
    expected = (weight * mask)[left[0]][:, left[1]]
    layer = BlockSparseLinear.of(layout, weight[left[0]][:, left[1]], nn.Parameter(bias))
    x = torch.randn(2, 3, len(left[1]), dtype=torch.float64)
    assert torch.allclose(layer(x), x @ expected.T + bias, rtol=0, atol=1e-12)
    assert torch.equal(layer.weight, expected)
    assert sum(part.numel() for part in layer.weights) == int(mask[left[0]][:, left[1]].sum()) == layout.weights
    assert len({tuple(row) for row in expected.ne(0).tolist()} - {(False,) * len(left[1])}) == len(layout.products)


def test_block_rows_of_equal_support_are_one_product() -> None:
    kept = np.array([[1, 0, 1, 0], [1, 1, 1, 0], [1, 0, 1, 0], [0, 0, 0, 0]], dtype=bool)
    layout = layout_of(kept, np.arange(4).repeat(2), np.arange(4).repeat(3))
    assert layout.pieces == ((0, 3), (3, 6), (6, 9))
    assert [(product.pieces, product.rows) for product in layout.products] == [
        ((0, 2), ((0, 2), (4, 6))),
        ((0, 1, 2), ((2, 4),)),
    ]
    assert layout.empty_rows == ((6, 8),)
    assert layout.order == ((0, 0), (1, 0), (0, 1), (-1, 0))
    assert not layout.is_split, "nobody reads the last inputs"


def test_columns_that_no_row_uses_are_not_read() -> None:
    layout = layout_of(np.array([[True, False, True]]), np.zeros(2, int), np.array([0, 0, 1, 2]))
    layer = BlockSparseLinear.of(layout, torch.ones(2, 4), None)
    assert layer(torch.tensor([[1.0, 2.0, float("nan"), 3.0]])).tolist() == [[6.0, 6.0]]


def test_a_layer_without_tiles_gives_its_bias() -> None:
    layout = layout_of(np.zeros((2, 2), bool), np.arange(2).repeat(2), np.arange(2).repeat(3))
    layer = BlockSparseLinear.of(layout, torch.ones(4, 6), nn.Parameter(torch.arange(4.0)))
    assert layer(torch.randn(3, 6)).tolist() == [[0.0, 1.0, 2.0, 3.0]] * 3
    assert [name for name, _ in layer.named_parameters()] == ["bias"]


def test_a_layer_trains_and_only_what_is_kept_does() -> None:
    kept = np.array([[1, 0, 1], [0, 1, 1], [1, 0, 1]], dtype=bool)
    start, target = nn.Linear(6, 12), nn.Linear(6, 12)
    layout = layout_of(kept, np.arange(3).repeat(4), np.arange(3).repeat(2))
    layer = BlockSparseLinear.of(layout, start.weight, start.bias)
    mask = torch.tensor(kept.repeat(4, 0).repeat(2, 1))
    x = torch.randn(64, 6)
    with torch.no_grad():
        target.weight *= mask
        y = target(x)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        loss = (layer(x) - y).square().mean()
        loss.backward()
        optimizer.step()
    assert loss < 1e-4
    assert not layer.weight[~mask].any()


def test_a_layer_is_copied_and_restored() -> None:
    layout = layout_of(np.eye(3, dtype=bool), np.arange(3).repeat(2), np.arange(3).repeat(2))
    one = BlockSparseLinear.of(layout, torch.randn(6, 6), nn.Parameter(torch.randn(6)))
    other = BlockSparseLinear.of(layout, torch.randn(6, 6), nn.Parameter(torch.randn(6)))
    x = torch.randn(2, 6)
    assert not torch.equal(one(x), other(x))
    assert torch.equal(copy.deepcopy(one)(x), one(x))
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(x), other(x))
    assert "6, bias=True, 3 products, 33% of the weights" in repr(one)


# Whole models


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    rows=st.sampled_from([4, 8, 12]),
    columns=st.sampled_from([3, 8, 20]),
    cut=st.booleans(),
)
def test_masked_equals_cut_on_random_tiles(
    vit: ChannelGraph, vision_transformers: ModuleType, compare: Compare, seed: int, rows: int, columns: int, cut: bool
) -> None:
    grids = tile_grids(vit.model, vit, (rows, columns))
    density = 0.1 + 0.8 * (seed % 7) / 6
    tiles = vision_transformers.random_tiles(grids, seed, density)
    plan = make_plan(vit, narrowed(vit, seed) if cut else {}, kept_tiles=tiles)
    assert compare(vit, plan) < 1e-9


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_masked_equals_cut_where_the_cut_model_is_a_program(
    spelled_out: ChannelGraph, vision_transformers: ModuleType, compare: Compare, seed: int
) -> None:
    tiles = vision_transformers.random_tiles(tile_grids(spelled_out.model, spelled_out, (8, 8)), seed, 0.4)
    plan = make_plan(spelled_out, narrowed(spelled_out, seed) | {"patches (+2 layers)": range(1, 24)}, kept_tiles=tiles)
    cut = apply(spelled_out.model, plan)
    assert isinstance(cut, ProgramModule)
    assert any(".weights." in name for name in cut.state_dict())
    assert compare(spelled_out, plan) < 1e-9


@pytest.mark.parametrize(
    "name", ["Fused", "FusedHeadsFirst", "Separate", "GroupedExpand", "TorchBatchFirst", "TorchLayer"]
)
def test_attention_however_it_is_written(
    attention_nets: ModuleType, vision_transformers: ModuleType, name: str
) -> None:
    model, inputs = attention_nets.build(name)
    graph = trace(model, inputs)
    tiles = vision_transformers.random_tiles(tile_grids(model, graph, (6, 5), classifiers=True), 3)
    plan = make_plan(graph, narrowed(graph, 3), kept_tiles=tiles)
    assert edgeprune.check(model, plan, inputs, tolerance=1e-9) < 1e-9


def test_the_check_notices_a_tile_that_is_not_removed(vit: ChannelGraph, compare: Compare) -> None:
    grid = tile_grids(vit.model, vit, (8, 8))["blocks.1.mlp.fc1.weight"]
    kept = np.ones(grid.shape, bool)
    kept[1, 2] = False
    plan = make_plan(vit, {}, kept_tiles={grid.parameter: KeptTiles.of(grid, kept)})
    assert compare(vit, plan) < 1e-9
    assert compare(vit, plan, lambda model, plan: copy.deepcopy(model)) > 1e-3


def test_fully_kept_layers_stay_linear_layers(vit: ChannelGraph, vision_transformers: ModuleType) -> None:
    grids = tile_grids(vit.model, vit, (8, 8))
    tiles = {name: KeptTiles.of(grid, np.ones(grid.shape, bool)) for name, grid in grids.items()}
    with pytest.raises(EmptyPlanError):
        make_plan(vit, {}, kept_tiles=tiles)
    tiles["blocks.0.mlp.fc2.weight"] = vision_transformers.random_tiles(grids, 0)["blocks.0.mlp.fc2.weight"]
    plan = make_plan(vit, {}, kept_tiles=tiles)
    assert list(plan.kept_tiles) == ["blocks.0.mlp.fc2.weight"]
    cut = apply(vit.model, plan)
    swapped = {path for path, module in cut.named_modules() if isinstance(module, BlockSparseLinear)}
    assert swapped == {"blocks.0.mlp.fc2"}
    assert type(cut) is type(vit.model)


def test_tiles_that_a_cut_of_channels_removes_leave_a_linear_layer(vit: ChannelGraph) -> None:
    grid = tile_grids(vit.model, vit, (8, 24))["blocks.0.mlp.fc1.weight"]
    tiles = KeptTiles.of(grid, np.array([[False], [True], [True], [True], [True]]))
    plan = make_plan(vit, {"blocks.0.mlp.fc1": range(8, 40)}, kept_tiles={grid.parameter: tiles})
    assert plan.kept_tiles, "the plan says what was asked for"
    fc1 = apply(vit.model, plan).get_submodule("blocks.0.mlp.fc1")
    assert isinstance(fc1, nn.Linear)
    assert fc1.out_features == 32


# Plans


@pytest.fixture
def plan(vit: ChannelGraph, vision_transformers: ModuleType) -> PruningPlan:
    tiles = vision_transformers.random_tiles(tile_grids(vit.model, vit, (8, 12)), 1)
    return make_plan(vit, narrowed(vit, 1), kept_tiles=tiles)


def test_a_plan_with_tiles_is_saved_and_loaded(plan: PruningPlan, vit: ChannelGraph, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    loaded = PruningPlan.load(tmp_path / "plan.json")
    assert loaded == plan
    assert loaded.hash == plan.hash != make_plan(vit, narrowed(vit, 1)).hash


def test_a_cut_model_is_saved_and_loaded_with_and_without_its_class(
    plan: PruningPlan, vit: ChannelGraph, tmp_path: Path
) -> None:
    cut = apply(vit.model, plan).eval()
    with torch.no_grad():
        for parameter in cut.parameters():
            parameter.mul_(1.5)
    edgeprune.save(cut, tmp_path, plan)
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    own, program = edgeprune.load(tmp_path, vit.model).eval(), edgeprune.load(tmp_path).eval()
    assert type(own) is type(vit.model)
    assert isinstance(program, ProgramModule)
    assert torch.equal(own(x), cut(x))
    assert torch.allclose(program(x), cut(x), rtol=0, atol=1e-12)
    edgeprune.save(program, tmp_path / "alone")
    assert torch.equal(edgeprune.load(tmp_path / "alone")(x), program(x))


def test_a_model_that_was_not_cut_by_the_plan_is_not_saved_with_it(
    plan: PruningPlan, vit: ChannelGraph, tmp_path: Path
) -> None:
    other = apply(vit.model, make_plan(vit, narrowed(vit, 1)))
    with pytest.raises(PlanError, match=r"'blocks\.0\.attn\.qkv\.weights\.0' must have"):
        edgeprune.save(other, tmp_path, plan)


def test_a_tiled_model_is_tuned_and_what_was_removed_stays_away(vision_transformers: ModuleType) -> None:
    model, images = vision_transformers.VisionTransformer(blocks=1), vision_transformers.IMAGES
    graph = trace(model, images)
    tiles = vision_transformers.random_tiles(tile_grids(model, graph, (8, 8)), 2)
    plan = make_plan(graph, {}, kept_tiles=tiles)
    batches = [(torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3]))]
    task = Task.single(
        train=batches,
        validation=batches,
        loss=nn.functional.cross_entropy,
        metric=lambda y, t: float((y.argmax(1) == t).float().mean()),
    )
    cut = apply(model, plan)
    size = sum(parameter.numel() for parameter in cut.parameters())
    before = copy.deepcopy(cut.state_dict())
    fine_tune(cut, task, FineTuning(epochs=2))
    assert sum(parameter.numel() for parameter in cut.parameters()) == size < sum(p.numel() for p in model.parameters())
    assert any(not torch.equal(value, before[name]) for name, value in cut.state_dict().items() if ".weights." in name)
    with pytest.raises(ReconstructionError):
        reconstruct(cut, graph, plan, images, batches)


def _tiles(vit: ChannelGraph, name: str, grid: TileGrid) -> Any:
    return make_plan(vit, {}, kept_tiles={name: KeptTiles.of(grid, np.zeros(grid.shape, bool))})


def test_tiles_that_cannot_be(vit: ChannelGraph) -> None:
    with pytest.raises(PlanError, match=r"those of a parameter of the model, found 'blocks\.0\.mlp\.fc9\.weight'"):
        _tiles(vit, "blocks.0.mlp.fc9.weight", TileGrid("blocks.0.mlp.fc9.weight", (0, 40), (0, 24)))
    with pytest.raises(PlanError, match=r"must cover its shape \(40, 24\), found .* with \(40, 20\)"):
        _tiles(vit, "blocks.0.mlp.fc1.weight", TileGrid("blocks.0.mlp.fc1.weight", (0, 40), (0, 20)))
    with pytest.raises(PlanError, match=r"found 'patches\.weight': it is not the weight of an nn\.Linear"):
        _tiles(vit, "patches.weight", TileGrid("patches.weight", (0, 24), (0, 48)))
