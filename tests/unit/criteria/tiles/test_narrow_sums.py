"""What tiles are worth where channels are gone."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from edgeprune import Task
from edgeprune.criteria.tiles.curves import narrow_curve, tile_curves
from edgeprune.criteria.tiles.loss_scales import loss_scales
from edgeprune.criteria.tiles.sums import gradient_sums, narrow_sums, over_kept, over_tiles
from edgeprune.surgery.tiles import TileGrid

GRID = TileGrid("0.weight", (0, 3, 4, 8), (0, 4, 6))


@pytest.fixture(scope="module")
def task():
    draw = torch.Generator().manual_seed(0)
    data = [(torch.randn(16, 6, generator=draw), torch.randint(0, 3, (16,), generator=draw)) for _ in range(5)]
    return Task.single(train=data, validation=data, loss=F.cross_entropy, metric=lambda outputs, _: 0.0)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


def test_rows_and_columns_that_are_gone_count_nothing(model, task):
    values = np.random.default_rng(0).normal(size=(8, 6))
    rows, columns = np.array([1, 1, 0, 0, 1, 1, 0, 1], bool), np.array([1, 0, 1, 1, 0, 0], bool)
    masked = values * np.outer(rows, columns)
    np.testing.assert_allclose(over_kept(GRID, values, rows, columns), over_tiles(GRID, masked), atol=1e-12)
    every = np.ones(8, bool), np.ones(6, bool)
    whole, narrow = narrow_sums(model, {"0.weight": GRID}, task, {"0.weight": [every, (rows, columns)]})["0.weight"]
    plain = gradient_sums(model, {"0.weight": GRID}, task)["0.weight"]
    np.testing.assert_array_equal(whole.gates, plain.gates)
    assert narrow.norms[1, 0] == narrow.gates[:, 1, 0].sum() == 0, "row 3 is gone, and with it the second block row"
    weight = model[0].weight.detach().double().numpy()
    np.testing.assert_allclose(narrow.norms, over_tiles(GRID, (weight * np.outer(rows, columns)) ** 2), rtol=1e-9)


def test_empty_tiles_go_first_and_for_nothing(model, task):
    rows, columns = np.array([1, 1, 0, 0, 1, 1, 0, 1], bool), np.array([1, 0, 1, 1, 0, 0], bool)
    sums = narrow_sums(model, {"0.weight": GRID}, task, {"0.weight": [(rows, columns)]})["0.weight"][0]
    sizes = np.outer([2, 0, 3], [3, 0]).astype(float)
    curve = narrow_curve(sums, sizes)
    assert curve.weights[-1] == 15
    np.testing.assert_array_equal(curve.weights[-5:], 15, "four of six tiles are empty")
    np.testing.assert_allclose(curve.estimate[-5:], 0)
    assert not curve.kept(2)[1].any()
    assert not curve.kept(2)[:, 1].any()
    whole = narrow_curve(gradient_sums(model, {"0.weight": GRID}, task)["0.weight"], GRID.weights().astype(float))
    plain = tile_curves(gradient_sums(model, {"0.weight": GRID}, task))["0.weight"]
    np.testing.assert_array_equal(whole.order, plain.order)


def test_estimates_are_mapped_to_measured_losses(model, task):
    curves = tile_curves(gradient_sums(model, {"0.weight": GRID}, task))
    before = model[0].weight.detach().clone()
    scale = loss_scales(model, curves, task, kept=(0.5,), batches=5)["0.weight"]
    assert torch.equal(model[0].weight, before)
    curve = curves["0.weight"]
    count = curve.kept_at(0.5)

    def loss():
        with torch.no_grad():
            return float(np.mean([float(F.cross_entropy(model(x), y)) for x, y in task.objectives[0].train]))

    dense = loss()
    mask = torch.from_numpy(curve.kept(count).repeat([3, 1, 4], 0).repeat([4, 2], 1))
    with torch.no_grad():
        model[0].weight.mul_(mask)
    measured = loss() - dense
    with torch.no_grad():
        model[0].weight.copy_(before)
    assert measured > 0
    assert scale(curve.estimate)[count] == pytest.approx(measured, rel=2e-3)
    assert scale(curve.estimate)[-1] == 0
    assert (np.diff(scale(np.maximum.accumulate(curve.estimate[::-1]))) >= 0).all()
