"""Products of a layer with tiles are merged where a faster network is worth what that costs."""

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

import edgeprune
from edgeprune.lowering.tile_clusters import clustered_tiles
from edgeprune.surgery.kept_tiles import KeptTiles
from edgeprune.surgery.plan import make_plan
from edgeprune.surgery.tile_folds import tiled_layers
from edgeprune.surgery.tiles import tile_grids

NAME = "1.weight"


class Clock:
    """A microsecond per kernel, and one per thousand multiply-accumulates."""

    def network_ms(self, kernels):
        products = [one for one in kernels if one.op in ("MatMul", "Gemm")]
        work = sum(float(np.prod(one.output)) * one.inputs[0][-1] for one in products)
        return 1e-3 * len(kernels) + 1e-6 * work


@pytest.fixture(scope="module")
def lowered(tmp_path_factory):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Softmax(-1), nn.Linear(64, 64), nn.Softmax(-1), nn.Linear(64, 4)).eval()
    graph = edgeprune.trace(model, torch.zeros(1, 8, 64))
    return edgeprune.lower(graph, workdir=tmp_path_factory.mktemp("lowered"))


def plan_of(lowered, kept):
    grid = tile_grids(lowered.graph.model, lowered.graph, (16, 16))[NAME]
    return make_plan(lowered.graph, {}, kept_tiles={NAME: KeptTiles.of(grid, np.array(kept, dtype=bool))})


SIMILAR = [[1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
DAMAGES = np.array([[9.0, 2, 1, 1], [9, 1, 2, 1], [1, 1, 9, 9], [1, 1, 9, 9]])


def test_similar_rows_read_the_same_most_important_columns(lowered):
    plan = plan_of(lowered, SIMILAR)
    found = clustered_tiles(lowered, Clock(), plan, {NAME: DAMAGES}, price=500.0)
    assert found.merged == {NAME: (3, 2)}
    assert found.plan.kept_tiles[NAME].kept == ((0, 1), (0, 1), (2, 3), (2, 3))
    products = tiled_layers(found.plan)[NAME].layout.products
    assert len(products) == found.merged[NAME][1]
    assert found.latency_ms == Clock().network_ms(lowered.of_plan(found.plan))
    assert found.latency_ms < Clock().network_ms(lowered.of_plan(plan))
    before, after = (one.kept_tiles[NAME].array() for one in (plan, found.plan))
    assert found.damage == DAMAGES[before & ~after].sum() - DAMAGES[after & ~before].sum()


def test_it_is_not_worth_any_damage_but_tiles_may_come_back_for_nothing(lowered):
    plan = plan_of(lowered, SIMILAR)
    apart = np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    # Each row reads what it alone needs: every merging takes something important, or makes the product larger.
    dear = 1e9 * np.eye(4) + 1
    kept = clustered_tiles(lowered, Clock(), plan_of(lowered, apart), {NAME: dear}, price=1e-3)
    assert (kept.plan.kept_tiles[NAME].array() & apart.astype(bool)).sum() == 4
    assert kept.damage <= 0
    same = clustered_tiles(lowered, Clock(), plan, {}, price=1e6)
    assert same.plan is plan
    assert (same.damage, same.merged) == (0.0, {})


def test_what_is_merged_computes_what_is_masked(lowered, tmp_path):
    plan = clustered_tiles(lowered, Clock(), plan_of(lowered, SIMILAR), {NAME: DAMAGES}, price=500.0).plan
    model, example = lowered.graph.model, torch.randn(1, 8, 64)
    edgeprune.check(model, plan, example)
    lowered.backend.export(edgeprune.apply(model, plan), (example,), tmp_path / "merged.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "merged.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: example.numpy()})
    mask = plan.kept_tiles[NAME].array().repeat(16, 0).repeat(16, 1)
    masked = nn.Sequential(*model)
    weight = model[1].weight.detach().clone()
    with torch.no_grad():
        try:
            model[1].weight.mul_(torch.from_numpy(mask))
            expected = masked(example).numpy()
        finally:
            model[1].weight.copy_(weight)
    assert np.abs(found - expected).max() < 1e-4
