"""The worst of several damages under a bound for each, against trying every combination."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from edgeprune.allocation.exact import Exact
from edgeprune.allocation.per_objective import ObjectiveDamage, PerObjective
from edgeprune.allocation.problem import Problem, moved
from edgeprune.allocation.refinement import refine
from edgeprune.allocation.terms import Limit
from edgeprune.errors import BudgetInfeasibleError, ConfigError
from edgeprune.testing.additive import LayeredParameters, densenet, residual
from edgeprune.testing.allocation import instance

EXACT = Exact(gap=0.0, max_evaluations=0)


def damages_of(problem, seed, count=3):
    """Random convex curves; each objective does without one group."""
    rng = np.random.default_rng(seed)
    found = []
    for place in range(count):
        curves = {
            group.name: np.concatenate([[0.0], np.cumsum(np.sort(rng.random(group.size)))])[::-1].copy()
            for group in problem.groups
        }
        curves[problem.groups[place % len(problem.groups)].name][:] = 0.0
        scale = sum(float(curve[0]) for curve in curves.values()) * rng.uniform(0.1, 1.0)
        found.append(ObjectiveDamage(f"task {place}", curves, scale, weight=float(rng.uniform(0.5, 2))))
    return found


def value(damages, widths, share):
    relative = [one.at(widths) / one.scale for one in damages]
    mean = sum(one.weight * part for one, part in zip(damages, relative, strict=True)) / sum(o.weight for o in damages)
    worst = max((part for one, part in zip(damages, relative, strict=True) if one.worst), default=0.0)
    return (1 - share) * worst + share * mean


def every(problem):
    steps = [problem.cost.candidates(group.name) for group in problem.groups]
    for widths in itertools.product(*steps):
        yield dict(zip((group.name for group in problem.groups), widths, strict=True))


def allocate(problem, damages, budget_ms, share=0.05, **options):
    return PerObjective(damages, share, EXACT).allocate(problem.groups, {}, problem.cost, budget_ms, **options)


@pytest.mark.parametrize("share", [0.0, 0.05, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_the_worst_is_least_and_proven(seed, share):
    problem = instance(seed, groups=4, largest=16)
    damages = damages_of(problem, seed)
    budget_ms = problem.floor_ms + (0.2, 0.4, 0.6, 0.8)[seed] * (problem.cost.ms({}) - problem.floor_ms)
    best = min(value(damages, one, share) for one in every(problem) if problem.cost.ms(one) <= budget_ms)
    found = allocate(problem, damages, budget_ms, share)
    assert problem.cost.ms(found.widths) <= budget_ms
    assert value(damages, found.widths, share) == pytest.approx(best, rel=1e-6)
    assert found.certificate.damage == pytest.approx(best, rel=1e-6)
    assert found.certificate.bound == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_bounds_hold_with_the_sum_too(seed):
    """The weighted sum would sacrifice an objective; its bound forbids that."""
    problem = instance(seed, groups=4, largest=16)
    damages = damages_of(problem, seed + 10)
    budget_ms = problem.floor_ms + 0.5 * (problem.cost.ms({}) - problem.floor_ms)
    free = allocate(problem, damages, budget_ms, 1.0).widths
    sacrificed = max(damages, key=lambda one: one.at(free) / one.scale)
    least = min(sacrificed.at(one) for one in every(problem) if problem.cost.ms(one) <= budget_ms)
    bound = (least + sacrificed.at(free)) / 2
    bounded = [replace(one, at_most=bound if one is sacrificed else math.inf) for one in damages]
    fitting = [
        one for one in every(problem) if problem.cost.ms(one) <= budget_ms and sacrificed.at(one) <= bound * (1 + 1e-9)
    ]
    found = allocate(problem, bounded, budget_ms, 1.0)
    assert sacrificed.at(found.widths) <= bound * (1 + 1e-9)
    assert found.certificate.damage == pytest.approx(min(value(damages, one, 1.0) for one in fitting), rel=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_bounds_out_of_reach_say_the_smallest_latency_and_what_binds(seed):
    problem = instance(seed, groups=4, largest=16)
    damages = [
        replace(one, at_most=share * one.scale)
        for one, share in zip(damages_of(problem, seed), (0.2, 0.3, 0.25), strict=True)
    ]

    def least(names):
        return min(
            problem.cost.ms(one)
            for one in every(problem)
            if all(part.at(one) <= part.at_most * (1 + 1e-9) for part in damages if part.name in names)
        )

    names = [one.name for one in damages]
    best_ms = least(names)
    without = {name: least([one for one in names if one != name]) for name in names}
    ready = PerObjective(damages, 0.05, EXACT).prepare(problem.groups, {}, problem.cost)
    with pytest.raises(BudgetInfeasibleError) as caught:
        ready.within(0.99 * best_ms)
    assert caught.value.best_ms == pytest.approx(best_ms, rel=1e-3)
    assert all(one.at(caught.value.widths) <= one.at_most * (1 + 1e-9) for one in damages)
    binding = ready.binding()
    if binding is None:
        assert min(without.values()) >= best_ms * (1 - 1e-3)
    else:
        assert without[binding] == pytest.approx(min(without.values()), rel=1e-3)
    assert ready.within(1.001 * best_ms).certificate.predicted_ms <= 1.001 * best_ms


def test_other_budgets_hold_at_the_same_time():
    problem = densenet(1, options=4)
    damages = damages_of(problem, 5)
    counted, budget_ms = LayeredParameters(problem.cost), problem.between_ms(0.7)
    most = 0.6 * counted.value({})
    found = allocate(problem, damages, budget_ms, limits=[Limit("parameters", counted, most)])
    assert counted.value(found.widths) <= most
    assert found.certificate.damage >= allocate(problem, damages, budget_ms).certificate.damage - 1e-9


def test_a_large_instance_is_within_the_gap():
    problem = residual(0)
    damages = damages_of(problem, 0)
    found = PerObjective(damages, 0.05, Exact(gap=0.01)).allocate(
        problem.groups, {}, problem.cost, problem.between_ms(0.4)
    )
    assert found.certificate.gap <= 0.01
    assert found.certificate.bound > 0


def test_settings_are_checked():
    problem = instance(0, groups=2)
    one = damages_of(problem, 0, 1)[0]
    for wrong in (replace(one, scale=0.0), replace(one, worst=False)):
        with pytest.raises(ConfigError, match="damage per objective needs finite scales above 0"):
            PerObjective([wrong])
    with pytest.raises(ConfigError, match=r"mean_share must be a share in \[0, 1\]"):
        PerObjective([one], 2.0)


@pytest.mark.parametrize(("groups", "seed"), [(4, 1), (4, 2), (4, 18), (6, 9)])
def test_refinement_ends_and_never_makes_the_worst_worse(groups, seed):
    """What one raise and one cut do to the worst does not add up: what is traded must be looked at as a whole."""
    problem = instance(seed, groups=groups, largest=24)
    worst = [{name: curve / one.scale for name, curve in one.curves.items()} for one in damages_of(problem, seed)]
    none = {name: np.zeros_like(curve) for name, curve in worst[0].items()}
    ready = Problem(problem.groups, none, problem.cost, None, worst=worst)
    budget_ms = problem.floor_ms + 0.5 * (problem.cost.ms({}) - problem.floor_ms)
    state = tuple(widths[-1] for widths in ready.candidates)
    found = refine(ready, state, budget_ms, 3_000)
    assert ready.ms(found) <= budget_ms
    assert ready.damage(found) < ready.damage(state)
    # No raise alone helps any more.
    raised = [
        moved(found, index, width)
        for index in ready.movable
        for width in ready.candidates[index]
        if width > found[index]
    ]
    assert all(ready.damage(up) >= ready.damage(found) for up in ready.fitting(raised, budget_ms))
