import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeprune.errors import ConfigError
from edgeprune.loop.multitask.tolerances import Tolerances, factor_of, tolerances


@pytest.mark.parametrize(
    ("initial", "total", "count", "factor"),
    [(0.06, 6, 50, 0.97792), (0.06, 6, 60, 0.97379), (0.06, 6, 20, 1.04486)],
)
def test_the_factor_is_that_of_the_published_settings(initial, total, count, factor):
    """What 0.06, 6 and so many layers come to, computed apart from this code to five digits."""
    found = factor_of(initial, total, count)
    assert found == pytest.approx(factor, abs=1e-5)
    assert Tolerances(initial, found, count).product == pytest.approx(total, rel=1e-9)
    # The published rate holds wherever the tolerance has room for it.
    assert tolerances(total, count, initial).initial == initial


@given(
    total=st.one_of(st.floats(1 + 1e-6, 1.5), st.floats(1.5, 100)),
    count=st.integers(1, 200),
    rate=st.floats(1e-3, 0.5),
)
def test_the_product_of_the_sequence_is_the_global_tolerance(total, count, rate):
    found = tolerances(total, count, rate)
    assert found.count == count
    assert found.product == pytest.approx(total, rel=1e-6)
    assert found.initial > 0
    if count > 1:
        assert found.initial <= rate
    if 0 < found.initial < rate:
        assert found.factor <= 1 + 1e-9


def test_without_room_nothing_is_tolerated():
    for total in (1.0, 0.3):
        found = tolerances(total, 5, 0.06)
        assert found.product == 1.0
        assert found[0] == found[4] == 0.0


@pytest.mark.parametrize(("initial", "total", "count"), [(0.5, 1.5, 4), (0.5, 1.2, 4), (0.0, 2.0, 4), (0.1, 2.0, 1)])
def test_a_sequence_that_there_is_not(initial, total, count):
    with pytest.raises(ConfigError, match="a global tolerance must leave something to more than one layer"):
        factor_of(initial, total, count)
