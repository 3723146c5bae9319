"""Sizes of tiles layer by layer: those that lose least at one price of the latency."""

import itertools

import numpy as np
import pytest

from edgeprune.allocation.tiles.exact import ExactTiles
from edgeprune.allocation.tiles.problem import TileLayer, TileProblem
from edgeprune.criteria.tiles.curves import TileCurve, lower_hull
from edgeprune.loop.tile_sizes import SIZES, chosen_sizes, mixed, sizes_in, sizes_note
from edgeprune.surgery.tiles import TileGrid

FINE, COARSE = (32, 64), (64, 128)


def layer(name, damage, cost):
    """By kept tiles; of one weight each."""
    tiles = len(damage) - 1
    grid = TileGrid(name, (0, 1), tuple(range(tiles + 1)))
    hull = lower_hull(np.arange(tiles + 1.0), np.asarray(damage, dtype=np.float64))
    return TileLayer(TileCurve(grid, np.arange(tiles), hull, hull), np.asarray(cost, dtype=np.float64))


def quadratic(name, tiles, damage, dense_ms, floor_ms):
    """Damage that grows with the square of what goes, and a cost that falls along a line to what small tiles cost anyway."""
    left = np.arange(tiles + 1) / tiles
    return layer(name, damage * (1 - left) ** 2, dense_ms * np.where(left < 1, floor_ms + (1 - floor_ms) * left, 1.0))


def random_problems(seed, layers=3):
    draw = np.random.default_rng(seed)
    found = {FINE: {}, COARSE: {}}
    for index in range(layers):
        name, dense_ms, damage = f"{index}.weight", draw.uniform(1, 4), draw.uniform(1, 10)
        # Small tiles lose less and take longer.
        found[FINE][name] = quadratic(name, 160, damage * draw.uniform(0.3, 0.9), dense_ms, draw.uniform(0.1, 0.4))
        found[COARSE][name] = quadratic(name, 40, damage, dense_ms, draw.uniform(0.0, 0.1))
    return {tile: TileProblem(of, unit="ms", fixed=0.5) for tile, of in found.items()}


@pytest.mark.parametrize("seed", range(4))
def test_the_mix_loses_hardly_more_than_the_best_of_all_mixes(seed):
    problems = random_problems(seed)
    names = list(problems[FINE].layers)
    assert mixed(problems, dict.fromkeys(names, COARSE)).dense == pytest.approx(problems[FINE].dense)
    for share in (0.5, 0.7, 0.9):
        budget = share * problems[FINE].dense
        sizes = chosen_sizes(problems, budget)
        found = ExactTiles().search(mixed(problems, sizes), budget).damage
        every = [dict(zip(names, tiles, strict=True)) for tiles in itertools.product(problems, repeat=len(names))]
        reachable = [problem for problem in (mixed(problems, one) for one in every) if problem.smallest <= budget]
        best = min(ExactTiles().search(problem, budget).damage for problem in reachable)
        assert found <= 1.05 * best


def test_a_layer_gets_small_tiles_only_where_they_are_worth_their_time():
    slow, fast = 0.95, 0.1
    problems = {
        FINE: TileProblem(
            {
                "a.weight": quadratic("a.weight", 40, 1.0, 2.0, fast),
                "b.weight": quadratic("b.weight", 40, 1.0, 2.0, slow),
            }
        ),
        COARSE: TileProblem(
            {
                "a.weight": quadratic("a.weight", 10, 2.0, 2.0, fast),
                "b.weight": quadratic("b.weight", 10, 2.0, 2.0, fast),
            }
        ),
    }
    assert chosen_sizes(problems, 2.4) == {"a.weight": FINE, "b.weight": COARSE}
    # A budget that no mix reaches: what is fastest.
    assert chosen_sizes(problems, 0.0)["b.weight"] == COARSE


def test_the_sizes_are_those_that_the_table_was_profiled_with():
    header = {"models": [{"signature": "one", "tiles": [[16, 32], [32, 32]]}, {"signature": "two", "tiles": [[8, 8]]}]}
    assert sizes_in(header, "two") == ((8, 8),)
    assert sizes_in(header, "three") == ((16, 32), (32, 32), (8, 8))
    assert sizes_in({"models": [{"signature": "one"}]}, "one") == SIZES
    assert sizes_in({}, "one") == SIZES
    note = sizes_note({"a.weight": FINE, "b.weight": COARSE, "c.weight": FINE}, [FINE, COARSE])
    assert note.endswith("among 32x64, 64x128: 32x64: a.weight, c.weight; 64x128: b.weight.")
