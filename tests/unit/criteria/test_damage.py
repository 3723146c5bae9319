import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edgeprune.criteria.damage import best_units, damage_curves
from edgeprune.errors import ModelError

scores = hnp.arrays(np.float64, st.integers(1, 30), elements=st.floats(0, 1e6))


@given(values=scores)
def test_damage_is_the_sum_of_the_scores_of_what_is_removed(values):
    curve = damage_curves({"group": values})["group"]
    assert curve[-1] == 0
    assert (np.diff(curve) <= 0).all()
    for width in range(len(values) + 1):
        removed = set(range(len(values))) - set(best_units(values, width))
        assert curve[width] == pytest.approx(sum(values[unit] for unit in removed), rel=1e-9, abs=1e-9)


@given(values=scores)
def test_no_other_choice_of_units_does_less_damage(values):
    for width in range(len(values) + 1):
        kept = best_units(values, width)
        assert len(kept) == width
        assert list(kept) == sorted(set(kept))
        left = [values[unit] for unit in range(len(values)) if unit not in kept]
        assert not left or not kept or max(left) <= min(values[unit] for unit in kept)


@given(values=scores)
def test_shares_run_from_1_to_0(values):
    curve = damage_curves({"group": values}, "share")["group"]
    assert curve[0] == pytest.approx(1.0 if values.sum() > 0 else 0.0)
    assert curve[-1] == 0


@given(values=scores)
def test_log_shares_follow_the_kept_share(values):
    curve = damage_curves({"group": values}, "log_share")["group"]
    assert np.isfinite(curve).all()
    assert curve[-1] == 0
    assert (np.diff(curve) <= 1e-12).all()
    for width in range(1, len(values)):
        kept = sum(values[unit] for unit in best_units(values, width))
        share = kept / values.sum() if values.sum() > 0 else 1.0
        if share > 1e-6:
            assert curve[width] == pytest.approx(-np.log(share), rel=1e-6, abs=1e-6)


def test_log_shares_make_the_last_units_dear():
    values = {"group": np.ones(16)}
    plain, logarithm = damage_curves(values, "share")["group"], damage_curves(values, "log_share")["group"]
    assert logarithm[15] == pytest.approx(plain[15], rel=0.05)
    assert logarithm[1] > 2.5 * plain[1]


def test_normalization_decides_how_groups_compare():
    values = {"small": np.array([1.0, 1.0]), "large": np.array([10.0, 10.0])}
    plain, shares = damage_curves(values), damage_curves(values, "share")
    assert plain["large"][1] == 10 * plain["small"][1]
    assert shares["large"][1] == shares["small"][1] == 0.5


def test_of_equal_units_the_first_are_kept():
    assert best_units(np.array([1.0, 2.0, 1.0, 1.0]), 3) == (0, 1, 2)


@pytest.mark.parametrize("bad", [[1.0, -1.0], [np.nan, 1.0], [np.inf, 1.0], [[1.0]]])
def test_scores_that_cannot_be_used_are_refused(bad):
    with pytest.raises(ModelError, match="finite, at least 0 and one per unit, found others in group 'g'"):
        damage_curves({"g": np.array(bad)})


@pytest.mark.parametrize("width", [-1, 3])
def test_a_width_outside_the_group_is_refused(width):
    with pytest.raises(ModelError, match=rf"width must lie in 0..2, found {width}"):
        best_units(np.ones(2), width)
