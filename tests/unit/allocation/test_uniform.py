import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune.allocation.uniform import Uniform, closest_uniform
from edgeprune.errors import ConfigError
from edgeprune.testing.allocation import instance


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), share=st.floats(0.1, 0.95))
def test_every_group_keeps_about_the_same_share(seed, share):
    problem = instance(seed)
    budget_ms = problem.floor_ms + share * (problem.cost.ms({}) - problem.floor_ms)
    widths = Uniform().allocate(problem.groups, problem.damage, problem.cost, budget_ms).widths
    lower = max((width - 0.5) / problem.dense[name] for name, width in widths.items() if width > 1)
    upper = min((width + 0.5) / problem.dense[name] for name, width in widths.items())
    assert lower <= upper + 1e-9


def test_the_largest_share_is_taken_even_where_latency_is_not_monotone():
    problem = instance(2, groups=1, largest=24)
    size = problem.groups[0].size

    class Bumpy:
        def ms(self, widths):
            width = widths.get("layer0", size)
            return 2.0 if width == size - 2 or width == size else 1.0

        def many_ms(self, many):
            return np.array([self.ms(widths) for widths in many])

        def candidates(self, group):
            return tuple(range(size, 0, -1))

    assert Uniform().allocate(problem.groups, problem.damage, Bumpy(), 1.5).widths == {"layer0": size - 1}


def test_widths_are_rounded_to_multiples():
    problem = instance(4)
    widths = (
        Uniform(multiple_of=4)
        .allocate(
            problem.groups,
            problem.damage,
            problem.cost,
            problem.floor_ms + 0.5 * (problem.cost.ms({}) - problem.floor_ms),
        )
        .widths
    )
    assert all(width % 4 == 0 or width == problem.dense[name] for name, width in widths.items())
    assert widths != problem.dense


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_the_closest_uniform_plan_may_lie_above_the_target(share):
    problem = instance(7)
    target_ms = share * problem.cost.ms({})
    found = closest_uniform(problem.groups, problem.damage, problem.cost, target_ms)
    below = Uniform().allocate(problem.groups, problem.damage, problem.cost, target_ms)
    distance = abs(found.certificate.predicted_ms - target_ms)
    assert distance <= abs(below.certificate.predicted_ms - target_ms)
    assert found.certificate.predicted_ms == problem.cost.ms(found.widths)


def test_multiple_of_must_be_positive():
    with pytest.raises(ConfigError, match="multiple_of must be at least 1, found 0"):
        Uniform(multiple_of=0)
