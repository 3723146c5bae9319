"""The published form of the search, for comparison."""

import numpy as np
import pytest

from edgeprune.allocation.tiles.costs import modelled_power, published_power
from edgeprune.allocation.tiles.exact import ExactTiles
from edgeprune.allocation.tiles.problem import TileLayer, TileProblem
from edgeprune.allocation.tiles.published import (
    Published,
    balanced_beta,
    five_point_slopes,
    smoothed,
)
from edgeprune.allocation.tiles.slope import SlopeSearch
from edgeprune.errors import ConfigError


def test_the_five_point_rule_is_exact_for_a_cubic_inside_and_a_difference_at_the_ends():
    at = np.linspace(0, 1, 101)
    for step in (4, 5, 10):
        slopes = five_point_slopes(at, at**3, step)
        inside = slice(step, 101 - step)
        if step % 2 == 0:
            np.testing.assert_allclose(slopes[inside], 3 * at[inside] ** 2, atol=1e-10)
        assert slopes[0] == pytest.approx(0.01**2)
        assert slopes[1] == pytest.approx((0.02**3 - 0.01**3) / 0.01)
        assert slopes[-1] == pytest.approx((1 - 0.99**3) / 0.01)
    np.testing.assert_allclose(five_point_slopes(at, 2 * at, 4), 2.0)


def test_the_moving_average_is_free_of_bias():
    np.testing.assert_allclose(smoothed(np.full(5, 3.0), 0.9), 3.0)
    found = smoothed(np.array([0.0, 1.0]), 0.5)
    np.testing.assert_allclose(found, [0.0, 0.5 / 0.75])
    assert smoothed(found, 0.0) is found


def test_the_published_search_comes_near_the_budget_and_is_no_better_than_exact(problems):
    for seed in range(3):
        problem = problems.random(seed, layers=5, tiles=200)
        budget = 0.6 * problem.dense
        found = SlopeSearch(compat=Published(tolerance=0.01)).search(problem, budget)
        assert abs(found.cost / problem.dense - 0.6) <= 0.02
        assert "published form" in found.note
        exact = ExactTiles().search(problem, found.cost)
        # Slopes per share of a layer, whatever it costs: not the least damage where layers are of several sizes.
        assert exact.damage < 0.99 * found.damage


def test_published_layers_keep_a_share(problems):
    problem = problems.random(3, layers=3, tiles=100)
    found = SlopeSearch(compat=Published(keep=0.4)).search(problem, 0.45 * problem.dense)
    for name, layer in problem.layers.items():
        assert found.counts[name] >= int(0.4 * layer.curve.tiles)


def test_the_published_power_protects_what_is_hungry_and_ours_cuts_it(problems):
    damage = np.linspace(1, 0, 101) ** 2
    tokens = {"hungry.weight": 400, "frugal.weight": 40}
    layers = {}
    for name, rows in tokens.items():
        curve = problems.curve(name, damage)
        layers[name] = (curve, np.arange(101.0), modelled_power(curve, rows), published_power(curve, rows))
    ours, theirs = (
        TileProblem({name: TileLayer(one[0], one[1], one[place]) for name, one in layers.items()}, beta=1e-3)
        for place in (2, 3)
    )
    mine = ExactTiles().search(ours, 100.0).counts
    published = SlopeSearch(compat=Published(tolerance=0.005)).search(theirs, 100.0).counts
    assert mine["hungry.weight"] < mine["frugal.weight"]
    assert published["hungry.weight"] > published["frugal.weight"]


def test_beta_is_balanced_between_the_steepest_slopes(problems):
    damage = np.linspace(1, 0, 101) ** 2
    layers = {
        name: TileLayer(problems.curve(name, scale * damage), np.arange(101.0), power * np.arange(101.0))
        for name, scale, power in (("a.weight", 1.0, 2.0), ("b.weight", 3.0, 4.0))
    }
    steepest = float(five_point_slopes(np.linspace(0, 1, 101), np.linspace(0, 1, 101) ** 2, 10).max())
    assert balanced_beta(TileProblem(layers)) == pytest.approx(steepest * (1 + 3) / (200 + 400))
    with pytest.raises(ConfigError, match=r"found no power of 'a.weight'"):
        balanced_beta(TileProblem({"a.weight": TileLayer(layers["a.weight"].curve, np.arange(101.0))}))
    with pytest.raises(ConfigError, match="the published search needs step >= 1"):
        Published(step=0)
