import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune.allocation.knapsack import Knapsack, charges, fill
from edgeprune.allocation.nodes import Nodes
from edgeprune.allocation.problem import Problem
from edgeprune.allocation.tables import from_terms
from edgeprune.errors import ConfigError
from edgeprune.testing.additive import attention, chain, densenet


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), groups=st.integers(1, 5), room=st.integers(0, 40))
def test_a_knapsack_with_whole_prices_is_filled_as_trying_every_combination_does(seed, groups, room):
    rng = np.random.default_rng(seed)
    damages = [rng.random(int(rng.integers(1, 5))) for _ in range(groups)]
    prices = [rng.integers(0, 10, len(curve)).astype(float) for curve in damages]
    least = sum(price.min() for price in prices)
    state = fill(damages, prices, least + room, steps=max(1, room))
    assert sum(price[option] for price, option in zip(prices, state, strict=True)) <= least + room + 1e-9
    best = min(
        sum(curve[option] for curve, option in zip(damages, options, strict=True))
        for options in itertools.product(*(range(len(curve)) for curve in damages))
        if sum(price[option] for price, option in zip(prices, options, strict=True)) <= least + room
    )
    assert sum(curve[option] for curve, option in zip(damages, state, strict=True)) == pytest.approx(best)


@pytest.mark.parametrize("kind", [chain, densenet, attention])
def test_every_layer_is_charged_once(kind):
    made = kind(4)
    problem = Problem(made.groups, made.damage, made.cost, None)
    nodes = Nodes(problem.candidates)
    (table,) = from_terms(problem, nodes, [made.cost.terms()])
    rng = np.random.default_rng(0)
    for _ in range(10):
        state = np.array([rng.integers(0, len(widths)) for widths in problem.candidates])
        prices, fixed_ms = charges(table, [len(widths) for widths in problem.candidates], state)
        total = fixed_ms + sum(price[option] for price, option in zip(prices, state, strict=True))
        widths = [widths[option] for widths, option in zip(problem.candidates, state, strict=True)]
        assert total == pytest.approx(made.cost.ms(problem.widths(tuple(widths))))


@pytest.mark.parametrize("seed", range(6))
def test_its_damage_is_never_below_the_least_and_mostly_near_it(seed):
    problem = chain(seed)
    budget_ms = problem.between_ms(0.4)
    found = Knapsack().allocate(problem.groups, problem.damage, problem.cost, budget_ms)
    assert problem.cost.ms(found.widths) <= budget_ms
    best = problem.best_damage(budget_ms)
    assert best * (1 - 1e-9) <= found.certificate.damage <= 1.5 * best
    assert found.certificate.bound is None


def test_settings_are_checked():
    with pytest.raises(ConfigError, match="passes and steps must be at least 1, found 0 and 2000"):
        Knapsack(passes=0)
