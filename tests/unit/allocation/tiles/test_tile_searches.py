"""Both searches against trying every combination, the budget, and what a price on power does."""

import dataclasses
import itertools

import numpy as np
import pytest

from edgeprune.allocation.tiles.exact import ExactTiles
from edgeprune.allocation.tiles.problem import TileLayer, TileProblem, least_kept
from edgeprune.allocation.tiles.slope import SlopeSearch
from edgeprune.errors import BudgetInfeasibleError, ConfigError, ModelError

SHARES = (0.15, 0.4, 0.7, 0.95)


def between(problem, share):
    return problem.smallest + share * (problem.dense - problem.smallest)


@pytest.mark.parametrize("stairs", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_exact_is_the_optimum_and_the_slope_never_beats_it(problems, seed, stairs):
    problem = problems.random(seed, tiles=14, stairs=stairs, beta=0.02 * seed)
    for share in SHARES:
        budget = between(problem, share)
        exact, slope = ExactTiles().search(problem, budget), SlopeSearch().search(problem, budget)
        best = problems.best(problem, budget)
        assert exact.objective == pytest.approx(best, rel=1e-3)
        assert exact.bound <= best * (1 + 1e-9)
        assert exact.gap <= 1e-3
        assert exact.cost <= budget
        assert slope.cost <= budget
        assert slope.objective >= exact.objective * (1 - 1e-9)
        for found in (exact, slope):
            counts = np.array([found.counts[name] for name in problem.layers])
            assert found.cost == pytest.approx(problem.cost(counts))
            assert found.objective == pytest.approx(found.damage + problem.beta * found.power)


def test_the_slope_is_within_two_percent_where_layers_have_many_tiles(problems):
    for seed in range(5):
        problem = problems.random(seed, layers=12, tiles=300)
        for share in SHARES:
            budget = between(problem, share)
            exact, slope = ExactTiles().search(problem, budget), SlopeSearch().search(problem, budget)
            assert exact.gap <= 1e-3
            assert exact.objective <= slope.objective * (1 + 1e-9) <= exact.objective * 1.02


def test_quadratic_curves_meet_the_budget_and_have_one_slope():
    """delta = a * s ** 2 and FLOPs = f * (1 - s), of which the optimum is known."""
    a, f = (1.0, 3.0, 0.5), (1.0, 2.0, 4.0)
    from edgeprune.criteria.tiles.curves import TileCurve
    from edgeprune.surgery.tiles import TileGrid

    tiles, layers = 100, {}
    pruned = 1 - np.arange(tiles + 1) / tiles
    for index, (scale, flops) in enumerate(zip(a, f, strict=True)):
        name = f"{index}.weight"
        grid = TileGrid(name, (0, 1), tuple(range(tiles + 1)))
        curve = TileCurve(grid, np.arange(tiles), scale * pruned**2, scale * pruned**2)
        layers[name] = TileLayer(curve, flops * (1 - pruned))
    problem = TileProblem(layers)
    budget = 0.5 * problem.dense
    step = max(f) / tiles
    coarse = np.linspace(0, 1, 21)
    grids = np.meshgrid(coarse, coarse, coarse, indexing="ij")
    fits = sum(flops * (1 - s) for flops, s in zip(f, grids, strict=True)) <= budget + 1e-9
    exhaustive = sum(scale * s**2 for scale, s in zip(a, grids, strict=True))[fits].min()
    for search in (SlopeSearch(), ExactTiles()):
        found = search.search(problem, budget)
        assert budget - step <= found.cost <= budget
        shares = np.array([1 - count / tiles for count in found.counts.values()])
        assert shares == pytest.approx([0.10, 0.07, 0.82], abs=0.02)
        # Slopes of whole tiles: a layer's share is known to one of a hundred only.
        for scale, flops, share in zip(a, f, shares, strict=True):
            low, high = (2 * scale * (share + off) / flops for off in (-0.01, 0.01))
            assert low <= 2 * 0.5 * 0.82 / 4 * 1.05
            assert high >= 2 * 0.5 * 0.82 / 4 * 0.95
        assert found.damage <= exhaustive + 0.01
    assert exhaustive == pytest.approx(0.3600, abs=0.01)


@pytest.mark.parametrize("search", [SlopeSearch(), ExactTiles()])
@pytest.mark.parametrize("stairs", [False, True])
def test_a_larger_budget_never_makes_it_worse(problems, search, stairs):
    problem = problems.random(7, layers=6, tiles=60, stairs=stairs)
    found = [search.search(problem, between(problem, share)).objective for share in np.linspace(0, 1, 15)]
    assert all(after <= before * (1 + 1e-4) for before, after in itertools.pairwise(found))
    assert search.search(problem, problem.dense).damage == 0


@pytest.mark.parametrize("search", [SlopeSearch(), ExactTiles()])
def test_a_price_on_power_cuts_other_layers_and_saves_energy_at_equal_latency(problems, search):
    for seed in range(3):
        problem = problems.random(seed, layers=4, tiles=60)
        budget = between(problem, 0.5)
        found = [search.search(dataclasses.replace(problem, beta=beta), budget) for beta in (0.0, 0.005, 0.02, 0.1)]
        powers = [one.power for one in found]
        assert all(after <= before * (1 + 1e-3) for before, after in itertools.pairwise(powers))
        assert powers[-1] < 0.99 * powers[0]
        assert all(one.cost <= budget for one in found)
        first, last = (np.array(list(one.counts.values())) for one in (found[0], found[-1]))
        # Not only fewer tiles: other ones.
        assert (last < first).any()
        dear = max(
            problem.layers, key=lambda name: problem.layers[name].power[1] / np.diff(problem.layers[name].cost)[0]
        )
        assert found[-1].counts[dear] < found[0].counts[dear]


def test_no_price_on_the_cost_is_needed_where_the_budget_is_loose(problems):
    problem = problems.random(1, beta=0.05)
    found = ExactTiles().search(problem, 10 * problem.dense)
    assert found.gap == 0
    assert found.objective == pytest.approx(
        sum(
            values[layer.least :].min()
            for values, layer in zip(problem.objectives, problem.layers.values(), strict=True)
        )
    )


def test_what_the_solver_finds_is_taken_where_one_price_leaves_much_of_the_budget(problems):
    """Two layers of one large step each: no price gives one of them alone, and a fill spends the rest on the wrong one."""
    layers = {
        "a.weight": TileLayer(problems.curve("a.weight", [10.0, 0.0]), np.array([0.0, 6.0]), least=0),
        "b.weight": TileLayer(problems.curve("b.weight", [9.0, 0.0]), np.array([0.0, 5.0]), least=0),
        "c.weight": TileLayer(problems.curve("c.weight", [9.0, 0.0]), np.array([0.0, 5.0]), least=0),
    }
    problem = TileProblem(layers)
    found = ExactTiles().search(problem, 10.0)
    assert found.counts == {"a.weight": 0, "b.weight": 1, "c.weight": 1}
    assert found.gap == 0


def test_a_budget_below_the_smallest_names_what_holds_it_up(problems):
    problem = problems.random(2)
    for search in (SlopeSearch(), SlopeSearch(compat=True), ExactTiles()):
        with pytest.raises(BudgetInfeasibleError) as caught:
            search.search(problem, 0.5 * problem.smallest)
        assert caught.value.best_ms == problem.smallest
        assert f"the smallest plan reaches {problem.smallest:.6g} ms" in str(caught.value)
        assert "held by what is not cut into tiles" in str(caught.value)
        assert "at least 1 of" in str(caught.value)
        least = float(caught.value.hint.split()[5])
        assert search.search(problem, least * 1.05).cost <= least * 1.10
    with pytest.raises(ConfigError, match="a budget must be a number of ms, found NaN"):
        ExactTiles().search(problem, float("nan"))


def test_bad_problems_are_refused(problems):
    curve = problems.curve("a.weight", [4.0, 1.0, 0.0])
    with pytest.raises(ModelError, match="must be allocated to at least one layer, found none"):
        TileProblem({})
    with pytest.raises(ConfigError, match=r"the cost of 'a.weight' must be 3 finite numbers of at least 0.* 1 others"):
        TileLayer(curve, np.array([0.0, np.nan, 2.0]))
    with pytest.raises(ConfigError, match=r"the power of 'a.weight' must be 3 finite numbers.* shape \(2,\)"):
        TileLayer(curve, np.arange(3.0), np.arange(2.0))
    with pytest.raises(ConfigError, match=r"keep at least 0..2 tiles, found least=3"):
        TileLayer(curve, np.arange(3.0), least=3)
    with pytest.raises(ConfigError, match="beta must be finite and at least 0, found -1"):
        TileProblem({"a.weight": TileLayer(curve, np.arange(3.0))}, beta=-1.0)
    with pytest.raises(ConfigError, match="gap must be a share"):
        ExactTiles(gap=1.0)


def test_a_layer_narrower_than_a_tile_is_kept_whole(problems):
    one = problems.curve("a.weight", [4.0, 0.0])
    assert least_kept(one) == 1
    assert least_kept(problems.curve("b.weight", np.arange(41.0)[::-1])) == 2
    problem = TileProblem({"a.weight": TileLayer(one, np.array([0.0, 5.0]))})
    assert ExactTiles().search(problem, 5.0).counts == {"a.weight": 1}
    with pytest.raises(BudgetInfeasibleError, match=r"'a.weight' with at least 1 of 1 tiles"):
        ExactTiles().search(problem, 4.9)


def test_the_digest_tells_allocations_apart(problems):
    problem = problems.random(5)
    one, same, other = (ExactTiles().search(problem, between(problem, share)) for share in (0.5, 0.5, 0.6))
    assert one.digest == same.digest != other.digest
