"""Problems of a few layers with curves that are given, not estimated."""

import itertools

import numpy as np
import pytest

from edgeprune.allocation.tiles.problem import TileLayer, TileProblem
from edgeprune.criteria.tiles.curves import TileCurve, lower_hull
from edgeprune.surgery.tiles import TileGrid


class Problems:
    """Makes problems, and solves them by trying everything."""

    @staticmethod
    def curve(name, damage):
        """A layer of tiles of one weight each, with a damage by kept tiles."""
        damage = np.asarray(damage, dtype=np.float64)
        tiles = len(damage) - 1
        grid = TileGrid(name, (0, 1), tuple(range(tiles + 1)))
        return TileCurve(grid, np.arange(tiles), damage, lower_hull(np.arange(tiles + 1.0), damage[::-1])[::-1].copy())

    def random(self, seed, *, layers=3, tiles=20, stairs=False, beta=0.0):
        """Layers of other sizes, costs and powers; with stairs, a cost that falls only at every third tile."""
        draw = np.random.default_rng(seed)
        found = {}
        for index in range(layers):
            count = int(draw.integers(tiles // 2, tiles + 1))
            steps = np.sort(draw.exponential(draw.uniform(0.1, 3), count))
            damage = np.concatenate([[0.0], np.cumsum(steps)])[::-1]
            counted = np.arange(count + 1)
            cost = draw.uniform(0.5, 4) * (np.ceil(counted / 3) if stairs else counted) + draw.uniform(0, 2)
            if stairs:
                cost = cost + draw.uniform(0, 0.5, count + 1)
            power = draw.uniform(0.1, 5) * counted
            found[f"layer{index}.weight"] = TileLayer(self.curve(f"layer{index}.weight", damage), cost, power)
        return TileProblem(found, unit="ms", beta=beta, fixed=0.7)

    @staticmethod
    def best(problem, budget):
        """The least objective within the budget by trying every combination."""
        axes = [range(layer.least, layer.curve.tiles + 1) for layer in problem.layers.values()]
        return min(
            (
                problem.objective(np.array(counts))
                for counts in itertools.product(*axes)
                if problem.cost(np.array(counts)) <= budget
            ),
            default=np.inf,
        )


@pytest.fixture(scope="session")
def problems():
    return Problems()
