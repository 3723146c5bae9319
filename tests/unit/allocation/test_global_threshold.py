import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune.allocation.global_threshold import GlobalThreshold
from edgeprune.errors import ConfigError
from edgeprune.spec import smallest_width
from edgeprune.testing.allocation import instance


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), share=st.floats(0.1, 0.9))
def test_one_threshold_separates_what_stays_from_what_goes(seed, share):
    problem = instance(seed)
    budget_ms = problem.floor_ms + share * (problem.cost.ms({}) - problem.floor_ms)
    widths = GlobalThreshold().allocate(problem.groups, problem.damage, problem.cost, budget_ms).widths
    assert problem.cost.ms(widths) <= budget_ms
    removed, kept = [0.0], [np.inf]
    for name, width in widths.items():
        scores = -np.diff(problem.damage[name])
        removed += scores[width:].tolist()
        # The narrowest width that is allowed stays whatever its scores are.
        if width > smallest_width(problem.dense[name]):
            kept.append(scores[width - 1])
    assert max(removed) <= min(kept) + 1e-12


def test_the_smallest_threshold_that_fits_is_taken():
    problem = instance(6)
    budget_ms = 0.5 * problem.cost.ms({})
    few = GlobalThreshold(max_thresholds=4).allocate(problem.groups, problem.damage, problem.cost, budget_ms)
    many = GlobalThreshold().allocate(problem.groups, problem.damage, problem.cost, budget_ms)
    assert many.certificate.damage <= few.certificate.damage
    assert many.certificate.evaluations > few.certificate.evaluations


def test_units_that_cost_nothing_go_first():
    problem = instance(1, groups=2, largest=24)
    size = problem.dense["layer1"]
    problem.damage["layer1"] = np.concatenate([np.arange(size // 2, 0, -1.0), np.zeros(size + 1 - size // 2)])
    budget_ms = problem.cost.ms({"layer1": size // 2})
    widths = GlobalThreshold().allocate(problem.groups, problem.damage, problem.cost, budget_ms).widths
    assert widths["layer1"] <= size // 2
    assert widths["layer0"] == problem.dense["layer0"]


def test_max_thresholds_must_be_at_least_two():
    with pytest.raises(ConfigError, match="max_thresholds must be at least 2, found 1"):
        GlobalThreshold(max_thresholds=1)
