import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune.allocation.exact import Exact
from edgeprune.allocation.terms import Limit
from edgeprune.errors import BudgetInfeasibleError, ConfigError
from edgeprune.graph.channel_graph import ChannelGroup
from edgeprune.surgery.constraints import WidthRule
from edgeprune.testing.additive import LayeredParameters, attention, chain, densenet, residual
from edgeprune.testing.allocation import instance

KINDS = {"chain": chain, "densenet": densenet, "attention": attention}


def proven(problem, budget_ms, limits=(), **options):
    found = Exact(gap=0.0, max_evaluations=0, **options).allocate(
        problem.groups, problem.damage, problem.cost, budget_ms, limits=limits
    )
    assert problem.cost.ms(found.widths) <= budget_ms
    assert found.certificate.predicted_ms == problem.cost.ms(found.widths)
    assert found.certificate.damage == pytest.approx(problem.total_damage(found.widths))
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(8))
def test_it_finds_what_trying_every_combination_finds_and_proves_it(kind, seed):
    problem = KINDS[kind](seed)
    budget_ms = problem.between_ms((0.15, 0.3, 0.5, 0.8)[seed % 4])
    best = problem.best_damage(budget_ms)
    certificate = proven(problem, budget_ms).certificate
    assert certificate.damage == pytest.approx(best, rel=1e-6)
    assert certificate.bound <= best * (1 + 1e-6)
    assert certificate.gap == pytest.approx(0, abs=1e-6)
    assert certificate.table_error == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_several_budgets_hold_at_once_and_the_least_damage_is_found(kind, seed):
    problem = KINDS[kind](seed)
    counted = LayeredParameters(problem.cost)
    budget_ms = problem.between_ms(0.6)
    least = counted.value({name: steps[-1] for name, steps in problem.cost.steps.items()})
    most = least + (0.3, 0.45)[seed % 2] * (counted.value({}) - least)
    best = problem.best_damage(budget_ms, most)
    found = proven(problem, budget_ms, [Limit("parameters", counted, most)])
    assert counted.value(found.widths) <= most
    assert found.certificate.damage == pytest.approx(best, rel=1e-6)
    assert found.certificate.bound <= best * (1 + 1e-6)
    # The second budget is what binds: with the first alone there is less damage.
    assert best >= problem.best_damage(budget_ms)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), share=st.floats(0.05, 0.95))
def test_a_cost_that_states_nothing_is_taken_apart(seed, share):
    problem = instance(seed, groups=4, largest=16)
    budget_ms = problem.floor_ms + share * (problem.cost.ms({}) - problem.floor_ms)
    found = Exact(gap=0.0, max_evaluations=0).allocate(problem.groups, problem.damage, problem.cost, budget_ms)
    assert found.certificate.damage == pytest.approx(problem.best_damage(budget_ms), rel=1e-6, abs=1e-9)
    assert found.certificate.table_error == 0


class ThreeAtOnceCost:
    """A latency that is no sum over pairs: the product of three widths."""

    def ms(self, widths):
        return float(np.prod([widths.get(name, 12) for name in "abc"])) / 1000 + 0.1

    def many_ms(self, many):
        return np.array([self.ms(widths) for widths in many])

    def candidates(self, group):
        return tuple(range(12, 1, -2))


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_where_tables_cannot_say_it_few_widths_are_all_tried_and_the_note_says_how_far_off_tables_are(share):
    rng = np.random.default_rng(3)
    groups = tuple(ChannelGroup(name=name, size=12, unit="channel", members=(), nodes=()) for name in "abc")
    damage = {name: np.concatenate([[0.0], np.cumsum(np.sort(rng.random(12)))])[::-1] for name in "abc"}
    cost = ThreeAtOnceCost()
    budget_ms = share * cost.ms({})
    found = Exact().allocate(groups, damage, cost, budget_ms)
    assert cost.ms(found.widths) <= budget_ms
    assert "differ from the cost model by" in found.certificate.note or "no bound" in found.certificate.note
    assert found.certificate.table_error > 0
    every = [dict(zip("abc", widths, strict=True)) for widths in itertools.product(*map(cost.candidates, "abc"))]
    best = min(
        sum(damage[name][width] for name, width in widths.items()) for widths in every if cost.ms(widths) <= budget_ms
    )
    assert found.certificate.damage == pytest.approx(best)


@pytest.mark.parametrize("seed", range(4))
def test_few_buckets_loosen_the_bound_and_never_break_it(seed):
    problem = densenet(seed, options=4)
    budget_ms = problem.between_ms(0.4)
    best = problem.best_damage(budget_ms)
    certificate = proven(problem, budget_ms, most_buckets=2).certificate
    assert certificate.bound <= best * (1 + 1e-6)
    assert best * (1 - 1e-9) <= certificate.damage


def test_a_large_instance_is_within_the_gap_in_seconds():
    problem = residual(0)
    assert len(problem.groups) == 36
    begun = time.process_time()
    found = Exact(gap=0.01).allocate(problem.groups, problem.damage, problem.cost, problem.between_ms(0.4))
    assert time.process_time() - begun < 15
    assert found.certificate.gap <= 0.01
    assert found.certificate.bound > 0
    assert problem.cost.ms(found.widths) <= problem.between_ms(0.4)


def test_in_blocks_the_bound_is_the_relaxations():
    problem = residual(1, blocks=(2, 2), options=8)
    budget_ms = problem.between_ms(0.4)
    whole = proven(problem, budget_ms)
    blocks = proven(problem, budget_ms, max_variables=1)
    assert "solved in blocks, bound of the linear relaxation" in blocks.certificate.note
    assert blocks.certificate.bound <= whole.certificate.damage <= blocks.certificate.damage * (1 + 1e-9)
    assert blocks.certificate.gap <= 0.05


def test_the_time_limit_ends_the_search_with_the_best_found():
    problem = densenet(0, layers=12, options=8)
    budget_ms = problem.between_ms(0.3)
    begun = time.monotonic()
    found = proven(problem, budget_ms, time_limit_s=0.3)
    assert time.monotonic() - begun < 20
    assert found.certificate.bound <= found.certificate.damage
    assert "The time limit of 0.3 s ended the search." in found.certificate.note


def test_a_front_has_a_plan_per_budget_and_less_damage_with_more_time():
    problem = residual(2, blocks=(2, 2), options=6)
    front = Exact(gap=0.0).front(problem.groups, problem.damage, problem.cost, 8)
    budgets_ms = [allocation.certificate.budget_ms for allocation in front]
    assert budgets_ms == sorted(budgets_ms)
    assert budgets_ms[0] == pytest.approx(problem.floor_ms)
    assert budgets_ms[-1] == pytest.approx(problem.cost.ms({}))
    damages = [allocation.certificate.damage for allocation in front]
    assert damages == sorted(damages, reverse=True)
    assert damages[-1] == 0
    for allocation in front[1:-1]:
        alone = proven(problem, allocation.certificate.budget_ms)
        assert allocation.certificate.damage == pytest.approx(alone.certificate.damage, rel=1e-6)
        assert allocation.certificate.bound <= allocation.certificate.damage


def test_budgets_of_a_front_may_come_in_any_order():
    problem = chain(1)
    budgets_ms = [problem.between_ms(share) for share in (0.7, 0.2, 0.5)]
    front = Exact().front(problem.groups, problem.damage, problem.cost, budgets_ms)
    assert [allocation.certificate.budget_ms for allocation in front] == budgets_ms
    with pytest.raises(BudgetInfeasibleError, match="latency must be <= "):
        Exact().front(problem.groups, problem.damage, problem.cost, [*budgets_ms, 0.5 * problem.floor_ms])


def test_a_limit_that_nothing_meets_is_named_with_the_smallest_that_can_be_reached():
    problem = chain(2)
    counted = LayeredParameters(problem.cost)
    least = counted.value({name: steps[-1] for name, steps in problem.cost.steps.items()})
    limit = Limit("parameters", counted, 0.5 * least, "weights")
    with pytest.raises(BudgetInfeasibleError) as caught:
        Exact().allocate(problem.groups, problem.damage, problem.cost, problem.between_ms(0.5), limits=[limit])
    assert str(caught.value).startswith(
        f"parameters must be <= {0.5 * least:.4g} weights, the smallest plan found has {least:.4g} weights."
    )
    assert caught.value.widths == {name: steps[-1] for name, steps in problem.cost.steps.items()}


class OppositeCost:
    """Something that grows where widths fall, so that it cannot be small together with the latency."""

    def __init__(self, cost):
        self.cost = cost

    def value(self, widths):
        return -self.cost.ms(widths)

    def terms(self):
        from edgeprune.allocation.terms import CostTerm

        return [CostTerm(term.forms, lambda *sizes, at=term.at: -at(*sizes)) for term in self.cost.terms()]


def test_budgets_that_exclude_each_other_are_said_to():
    problem = chain(3)
    limit = Limit("idleness", OppositeCost(problem.cost), -problem.between_ms(0.6))
    with pytest.raises(BudgetInfeasibleError, match=r"^all budgets must hold at once \(.*idleness"):
        Exact().allocate(problem.groups, problem.damage, problem.cost, problem.between_ms(0.5), limits=[limit])


def test_rules_and_ties_hold_in_sums_and_products():
    problem = densenet(5)
    names = [name for name in problem.dense if name.endswith(".growth")]
    size = min(problem.dense[name] for name in names)
    rules = {name: WidthRule(min_width=1, multiple_of=2) for name in names}
    rules[names[1]] = WidthRule(frozen=True)
    rules["stem"] = WidthRule(min_width=problem.dense["stem"] // 2)
    found = Exact().allocate(problem.groups, problem.damage, problem.cost, problem.between_ms(0.6), rules).widths
    assert size > 0
    assert found[names[1]] == problem.dense[names[1]]
    assert found["stem"] >= problem.dense["stem"] // 2
    assert all(found[name] % 2 == 0 or found[name] == problem.dense[name] for name in names)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_input_gives_equal_widths(kind):
    problem = KINDS[kind](9)
    found = [
        Exact().allocate(problem.groups, problem.damage, problem.cost, problem.between_ms(0.35)).widths for _ in "ab"
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gap": 1.0}, r"gap must be a share in \[0, 1\), found 1.0"),
        ({"time_limit_s": 0}, "time_limit_s must be greater than 0 s, found 0"),
        ({"corrections": -1}, "corrections must be at least 0, found -1"),
        ({"max_variables": 0}, "max_variables must be at least 1, found 0"),
        ({"most_buckets": 1}, "most_buckets must be at least 2, found 1"),
    ],
)
def test_settings_are_checked(options, message):
    with pytest.raises(ConfigError, match=message):
        Exact(**options)
