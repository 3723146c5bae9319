"""Hidden units that tiles leave without a maker or a reader are gone, and the others lie where no sorting is needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
from edgeprune.errors import PlanError
from edgeprune.graph.channel_graph import ChannelGraph
from edgeprune.graph.linear_layers import linear_chains
from edgeprune.graph.tracing import trace
from edgeprune.surgery.block_sparse import BlockSparseLinear
from edgeprune.surgery.cutting import apply
from edgeprune.surgery.kept_tiles import KeptTiles
from edgeprune.surgery.plan import PruningPlan, make_plan
from edgeprune.surgery.plan_format import content_sha256, from_json, to_json
from edgeprune.surgery.program_module import ProgramModule
from edgeprune.surgery.tiles import TileGrid, tile_grids

Compare = Callable[..., float]
FC1, FC2 = "blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.weight"


@pytest.fixture(scope="module", params=[True, False], ids=["bias", "no bias"])
def vit(request: pytest.FixtureRequest, vision_transformers: ModuleType) -> ChannelGraph:
    torch.manual_seed(0)
    model = vision_transformers.VisionTransformer(blocks=1, bias=request.param)
    return trace(model.double(), vision_transformers.IMAGES.double())


def plan_of(graph: ChannelGraph, kept: Mapping[str, Any], cut: Mapping[str, Any] | None = None) -> PruningPlan:
    """Hidden units in blocks of 8, embeddings in blocks of 12."""
    tiles = {}
    for name, array in kept.items():
        edges = (tuple(range(0, 41, 8)), (0, 12, 24))
        grid = TileGrid(name, *(edges if name == FC1 else edges[::-1]))
        tiles[name] = KeptTiles.of(grid, np.array(array, dtype=bool))
    return make_plan(graph, cut or {}, kept_tiles=tiles)


def mlp_of(graph: ChannelGraph, plan: PruningPlan) -> Any:
    return apply(graph.model, plan).get_submodule("blocks.0.mlp")


def test_pairs_of_layers_with_only_element_wise_operations_between(
    vit: ChannelGraph, attention_nets: ModuleType
) -> None:
    (chain,) = linear_chains(vit)
    assert (chain.producer, chain.consumer) == (FC1, FC2)
    assert [str(node.target) for node in chain.operations] == ["aten.gelu.default", "aten.dropout.default"]
    model, inputs = attention_nets.build("Fused")
    assert linear_chains(trace(model, inputs)) == (), "attention mixes what queries, keys and values are"


def test_units_that_nobody_makes_go_into_the_next_bias(vit: ChannelGraph, compare: Compare) -> None:
    plan = plan_of(vit, {FC1: [[1, 1], [0, 0], [1, 1], [0, 0], [1, 1]]})
    mlp = mlp_of(vit, plan)
    assert isinstance(mlp.fc1, nn.Linear)
    assert (mlp.fc1.out_features, mlp.fc2.in_features) == (24, 24)
    dead = [*range(8, 16), *range(24, 32)]
    dense = vit.model.get_submodule("blocks.0.mlp")
    moved = dense.fc2.weight[:, dead] @ nn.functional.gelu(dense.fc1.bias[dead])
    assert torch.allclose(mlp.fc2.bias, moved if dense.fc2.bias is None else dense.fc2.bias + moved)
    assert compare(vit, plan) < 1e-9


def test_units_that_nobody_reads_go(vit: ChannelGraph, compare: Compare) -> None:
    plan = plan_of(vit, {FC2: [[1, 0, 1, 1, 0], [1, 0, 1, 1, 0]]})
    mlp = mlp_of(vit, plan)
    assert isinstance(mlp.fc1, nn.Linear)
    assert isinstance(mlp.fc2, nn.Linear)
    assert (mlp.fc1.out_features, mlp.fc2.in_features) == (24, 24)
    assert compare(vit, plan) < 1e-9


def test_units_lie_in_the_order_of_what_they_read(vit: ChannelGraph, compare: Compare) -> None:
    plan = plan_of(vit, {FC1: [[1, 0], [0, 1], [1, 0], [1, 1], [0, 1]], FC2: [[1, 0, 1, 0, 0], [0, 1, 1, 1, 1]]})
    mlp = mlp_of(vit, plan)
    assert [product.rows for product in mlp.fc1.layout.products] == [((0, 16),), ((16, 32),), ((32, 40),)]
    # Of the first two blocks only one is read by both halves of the embedding; what follows is read by the second alone.
    assert mlp.fc2.layout.pieces == ((0, 8), (8, 16), (16, 40))
    assert compare(vit, plan) < 1e-9


def test_a_layer_of_which_nothing_is_left_keeps_its_units(vit: ChannelGraph, compare: Compare) -> None:
    plan = plan_of(vit, {FC1: np.zeros((5, 2))})
    mlp = mlp_of(vit, plan)
    assert isinstance(mlp.fc1, BlockSparseLinear)
    assert (mlp.fc1.out_features, len(mlp.fc1.weights), mlp.fc2.in_features) == (40, 0, 40)
    assert compare(vit, plan) < 1e-9


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 10_000), cut=st.booleans(), both=st.booleans())
def test_masked_equals_cut(vit: ChannelGraph, compare: Compare, seed: int, cut: bool, both: bool) -> None:
    dice = np.random.default_rng(seed)
    kept = {name: dice.random(shape) < 0.4 for name, shape in ((FC1, (5, 2)), (FC2, (2, 5)))}
    if not both:
        del kept[(FC1, FC2)[seed % 2]]
    units = {"blocks.0.mlp.fc1": sorted(dice.permutation(40)[:23])} if cut else {}
    plan = plan_of(vit, kept, units)
    assert compare(vit, plan) < 1e-9


def test_a_program_is_folded_too(vision_transformers: ModuleType, compare: Compare, tmp_path: Path) -> None:
    torch.manual_seed(0)
    graph = trace(vision_transformers.SpelledOut(blocks=1, bias=False).double(), vision_transformers.IMAGES.double())
    kept = {FC1: [[1, 0], [0, 0], [1, 1], [1, 0], [0, 1]], FC2: [[1, 1, 1, 0, 0], [0, 1, 1, 0, 1]]}
    plan = plan_of(graph, kept, {"patches (+2 layers)": range(1, 24)})
    cut = apply(graph.model, plan).eval()
    assert isinstance(cut, ProgramModule)
    assert cut.state_dict()["blocks.0.mlp.fc2.bias"].shape == (23,)
    assert compare(graph, plan) < 1e-9
    edgeprune.save(cut, tmp_path, plan)
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    assert torch.equal(edgeprune.load(tmp_path)(x), cut(x))


def test_a_chain_of_three_layers(compare: Compare) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4), nn.Flatten(), nn.Linear(4, 2)
    )
    graph = trace(model.double(), torch.randn(2, 4).double())
    kept = {"0.weight": [[1, 1], [0, 0], [1, 0]], "2.weight": [[1, 0, 1], [0, 0, 0], [0, 1, 0], [0, 1, 1]]}
    tiles = {
        name: KeptTiles.of(
            TileGrid(name, tuple(range(0, rows + 1, 2)), tuple(range(0, columns + 1, 2))), np.array(array, bool)
        )
        for (name, array), (rows, columns) in zip(kept.items(), ((6, 4), (8, 6)), strict=True)
    }
    plan = make_plan(graph, {}, kept_tiles=tiles)
    cut = apply(model, plan)
    assert [cut[at].out_features for at in (0, 2, 4)] == [4, 6, 4]
    assert compare(graph, plan) < 1e-9


def _shape(fold: dict[str, Any]) -> None:
    fold["shapes"] = [[40, 20], [24, 40]]


def _nobody(fold: dict[str, Any]) -> None:
    fold["producer"] = fold["consumer"] = "head.weight"


def _step(fold: dict[str, Any]) -> None:
    fold["operations"][0].pop("reads")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_shape, "a fold must have the shape of"),
        (_nobody, "one of them with kept tiles"),
        (_step, "operations of a fold must have 'op', 'reads' and 'args'"),
    ],
)
def test_folds_that_cannot_be(vit: ChannelGraph, damage: Callable[[dict[str, Any]], None], message: str) -> None:
    values = to_json(plan_of(vit, {FC1: [[1, 1], [0, 0], [1, 1], [0, 0], [1, 1]]}))
    damage(values["folds"][0])
    with pytest.raises(PlanError, match=message):
        from_json(values)


def test_a_fold_may_only_compute(vit: ChannelGraph) -> None:
    values = to_json(plan_of(vit, {FC1: [[1, 1], [0, 0], [1, 1], [0, 0], [1, 1]]}))
    values["folds"][0]["operations"][0]["op"] = "aten.from_file.default"
    values["content_sha256"] = content_sha256(values)
    with pytest.raises(PlanError, match="may only name operations that compute on tensors"):
        apply(vit.model, from_json(values))


def test_grids_of_a_model_go_together(vit: ChannelGraph, vision_transformers: ModuleType, compare: Compare) -> None:
    # Tiles of 8 hidden units on one side and of 16 on the other.
    grids = tile_grids(vit.model, vit, (8, 16))
    plan = make_plan(vit, {}, kept_tiles=vision_transformers.random_tiles(grids, 5))
    layout = mlp_of(vit, plan).fc1.layout
    assert all(len(product.rows) == 1 for product in layout.products)
    assert compare(vit, plan) < 1e-9
