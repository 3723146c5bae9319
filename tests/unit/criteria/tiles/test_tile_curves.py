"""Curves of damage by kept tiles: the closed form, masks, and the convex hull."""

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from edgeprune.criteria.tiles.curves import TileCurve, damage, lower_hull, reranked, tile_curves
from edgeprune.criteria.tiles.scores import EPSILON, tile_scores
from edgeprune.criteria.tiles.sums import gradient_sums, over_weights, weight_sums
from edgeprune.errors import ConfigError, ModelError
from edgeprune.surgery.tiles import TileGrid
from edgeprune.tasks.task import Task


def edges(size, step):
    return (*range(0, size, step), size)


@pytest.mark.parametrize("tile", [(4, 4), (2, 8), (3, 5)])
@pytest.mark.parametrize("shape", [(16, 24), (17, 23)])
def test_masks_are_constant_per_tile_and_keep_the_floor_of_the_share(tile, shape):
    grid = TileGrid("w", edges(shape[0], tile[0]), edges(shape[1], tile[1]))
    weight = np.random.default_rng(0).normal(size=shape)
    net = torch.nn.Module()
    net.w = torch.nn.Parameter(torch.tensor(weight))
    scores = tile_scores(weight_sums(net, {"w": grid}), "l1")["w"]
    tiles = scores.size
    assert tiles == math.ceil(shape[0] / tile[0]) * math.ceil(shape[1] / tile[1])
    flat = np.zeros(tiles + 1)
    curve = TileCurve(grid, np.argsort(scores, axis=None, kind="stable"), flat, flat)
    for pruned in np.linspace(0, 1, 101):
        count = curve.kept_at(float(pruned))
        assert count == math.floor(round((1 - pruned) * tiles, 6))
        kept = curve.kept(count)
        assert kept.sum() == count
        mask = over_weights(grid, kept)
        assert mask.shape == shape
        assert mask.sum() == curve.weights[count]
        for row in range(0, shape[0], tile[0]):
            for column in range(0, shape[1], tile[1]):
                assert len(np.unique(mask[row : row + tile[0], column : column + tile[1]])) == 1
        if 0 < count < tiles:
            assert scores[kept].min() >= scores[~kept].max()


@pytest.mark.parametrize("curvature", ["batches", "mean"])
def test_second_order_damage_equals_the_whole_matrix_and_the_telescoping_sum(curvature):
    random = np.random.default_rng(2)
    rows, columns = 5, 10
    grid = TileGrid("w", edges(rows, 2), edges(columns, 3))
    weight = random.normal(size=(rows, columns))
    inputs = torch.tensor(random.normal(size=(7, 3, columns)))
    net = torch.nn.Linear(columns, rows, bias=False).double()
    with torch.no_grad():
        net.weight.copy_(torch.tensor(weight))
    batches = [(batch, torch.arange(3) + 1) for batch in inputs]
    task = Task.single(train=batches, validation=batches, loss=cross_entropy, metric=lambda *_: 0.0, name="none")
    sums = gradient_sums(net, {"weight": TileGrid("weight", grid.row_edges, grid.column_edges)}, task)["weight"]
    every = []
    for batch, targets in batches:
        net.zero_grad()
        cross_entropy(net(batch), targets).backward()
        every.append(net.weight.grad.numpy().ravel().copy())
    every = np.array(every)
    flat = every if curvature == "batches" else every.mean(0)[None]
    matrix = flat.T @ flat / len(flat) + EPSILON * np.eye(rows * columns)
    order = random.permutation(grid.shape[0] * grid.shape[1])
    found = damage(sums, order, curvature=curvature)
    first_only = damage(sums, order, curvature="none")
    change, telescoped = np.zeros(rows * columns), 0.0
    kept = np.ones(grid.shape, dtype=bool)
    assert found[-1] == 0.0
    for gone, tile in enumerate(order, start=1):
        kept.ravel()[tile] = False
        after = np.where(over_weights(grid, kept), 0.0, -weight).ravel()
        step = after - change
        telescoped += (2 * after - step) @ matrix @ step / 2
        change = after
        first = ((change * every.mean(0)) ** 2).mean()
        assert found[-1 - gone] == pytest.approx(first + change @ matrix @ change / 2, abs=1e-9, rel=1e-9)
        assert found[-1 - gone] - first_only[-1 - gone] == pytest.approx(telescoped, abs=1e-9, rel=1e-9)
        assert first_only[-1 - gone] == pytest.approx(first, rel=1e-9)


def test_curves_are_convex_in_the_weights_and_below_the_estimate(net, task, grids):
    for curve in tile_curves(gradient_sums(net, grids, task)).values():
        gone = curve.weights[::-1][0] - curve.weights[::-1]
        slopes = np.diff(curve.damage[::-1]) / np.diff(gone)
        assert (np.diff(slopes) >= -1e-12).all()
        assert (curve.damage <= curve.estimate).all()
        assert (np.diff(curve.damage) <= 0).all()
        assert curve.damage[-1] == 0.0
        touching = np.isclose(curve.damage, curve.estimate, rtol=1e-12, atol=0)
        assert touching[0]
        assert touching[-1]


def test_the_hull_is_the_largest_convex_function_below():
    random = np.random.default_rng(4)
    at, values = np.cumsum(random.uniform(0.1, 1, 12)), random.uniform(0, 1, 12)
    hull = lower_hull(at, values)
    # By trying all chords: at each point, the lowest of those that pass over it.
    for point in range(12):
        chords = [values[point]] + [
            np.interp(at[point], [at[left], at[right]], [values[left], values[right]])
            for left in range(point)
            for right in range(point + 1, 12)
        ]
        assert hull[point] == pytest.approx(min(chords), rel=1e-12)


def test_the_same_calibration_gives_the_same_tiles(net, task, grids):
    once, again = (tile_curves(gradient_sums(net, grids, task)) for _ in range(2))
    for name in grids:
        assert (once[name].order == again[name].order).all()
        assert (once[name].damage == again[name].damage).all()


def test_reranked_curves_keep_their_damage_and_other_tiles(net, task, grids):
    sums = gradient_sums(net, grids, task)
    curves, magnitudes = tile_curves(sums), tile_scores(sums, "l1")
    other = reranked(curves, magnitudes)
    for name, curve in other.items():
        assert (curve.damage == curves[name].damage).all()
        kept = curve.kept(2)
        assert magnitudes[name][kept].min() >= magnitudes[name][~kept].max()
    with pytest.raises(ModelError, match=r"every curve must have scores to be ranked by, found none for '0.weight'"):
        reranked(curves, {})


def test_bad_curves_are_refused(net, task, grids):
    with pytest.raises(ModelError, match="at least one layer that is cut into tiles, found none"):
        tile_curves({})
    curve = tile_curves(gradient_sums(net, grids, task))["0.weight"]
    with pytest.raises(ConfigError, match=r"must be 0..9, found 10"):
        curve.kept(10)
