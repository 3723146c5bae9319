"""One option per list: as good as trying everything, within the budget, with a bound that holds."""

import itertools

import numpy as np
import pytest

from edgeprune.allocation.tiles.options import efficient, front_of, least_damage, thinned


def lists(seed, *, count=4, options=6, whole=False):
    draw = np.random.default_rng(seed)
    sizes = draw.integers(2, options + 1, count)
    costs = [-draw.integers(0, 50, size) / 1.0 if whole else -draw.uniform(0, 5, size) for size in sizes]
    return costs, [draw.exponential(1.0, size) for size in sizes]


def every(costs, damages):
    for picks in itertools.product(*(range(len(one)) for one in costs)):
        yield (
            sum(float(one[at]) for one, at in zip(costs, picks, strict=True)),
            sum(float(one[at]) for one, at in zip(damages, picks, strict=True)),
        )


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_it_finds_what_trying_everything_finds(seed, whole):
    costs, damages = lists(seed, whole=whole)
    combinations = list(every(costs, damages))
    lowest, highest = min(cost for cost, _ in combinations), max(cost for cost, _ in combinations)
    # Sums of whole numbers also lie on the budget, not just below it.
    for share in (0.0, 0.1, 0.35, 0.7, 1.0):
        budget = lowest + share * (highest - lowest)
        budget = round(budget) if whole else budget
        found = least_damage(costs, damages, budget)
        best = min(damage for cost, damage in combinations if cost <= budget)
        assert found.cost <= budget + 1e-9 * abs(budget)
        assert found.damage <= best * (1 + 1e-4) + 1e-12
        assert found.bound <= best + 1e-12
    assert least_damage(costs, damages, lowest - 1e-3) is None


def test_a_front_has_all_that_is_not_beaten_and_a_thin_one_only_what_is_there():
    costs, damages = lists(11, count=3)
    combinations = np.array(list(every(costs, damages)))
    best = combinations[efficient(combinations[:, 0], combinations[:, 1])]
    front = front_of(costs, damages, 10_000)
    np.testing.assert_allclose(np.stack([front.cost, front.damage], 1), best)
    for cost, damage, picks in zip(front.cost, front.damage, front.options, strict=True):
        assert cost == pytest.approx(sum(one[at] for one, at in zip(costs, picks, strict=True)))
        assert damage == pytest.approx(sum(one[at] for one, at in zip(damages, picks, strict=True)))
    thin = front_of(costs, damages, 5)
    assert len(thin.cost) <= 5
    assert {(cost, damage) for cost, damage in zip(thin.cost.round(9), thin.damage.round(9), strict=True)} <= {
        (cost, damage) for cost, damage in combinations.round(9)
    }
    np.testing.assert_array_equal(thinned(np.arange(9.0), 3), [0, 4, 8])
