import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeprune.loop.multitask.metric_bounds import loss_bound


def test_a_line_is_followed():
    seen = [(1.0 + step / 10, 0.9 - step / 20) for step in range(1, 10)]
    assert loss_bound(seen, (1.0, 0.9), 0.83, higher_is_better=True) == pytest.approx(1.14)
    falling = [(loss, 1 - metric) for loss, metric in seen]
    assert loss_bound(falling, (1.0, 0.1), 0.17, higher_is_better=False) == pytest.approx(1.14)


def test_nothing_is_promised_behind_what_was_seen():
    assert loss_bound([(1.5, 0.88), (2.0, 0.87)], (1.0, 0.9), 0.5, higher_is_better=True) == 2.0
    assert loss_bound([], (1.0, 0.9), 0.5, higher_is_better=True) == 1.0


def test_what_disagrees_is_pooled():
    """At 1.2 the metric was worse than at 1.4: by isotonic regression both are 0.8."""
    seen = [(1.2, 0.7), (1.4, 0.9), (1.6, 0.5)]
    assert loss_bound(seen, (1.0, 0.95), 0.65, higher_is_better=True) == pytest.approx(1.5)


def test_no_room_at_all():
    assert loss_bound([(1.1, 0.2)], (1.0, 0.9), 0.9, higher_is_better=True) == pytest.approx(1.0, abs=1e-3)
    # The model as it is does not keep the limit any more.
    assert loss_bound([(1.1, 0.2)], (1.0, 0.9), 0.95, higher_is_better=True) == 1.0


@given(
    seen=st.lists(st.tuples(st.floats(0.1, 5), st.floats(0, 1)), max_size=12),
    dense=st.tuples(st.floats(0.1, 2), st.floats(0.2, 1)),
    drop=st.floats(0, 0.2),
    more=st.floats(0, 0.2),
)
def test_a_looser_limit_allows_no_less(seen, dense, drop, more):
    bounds = [loss_bound(seen, dense, dense[1] - amount, higher_is_better=True) for amount in (drop, drop + more)]
    assert dense[0] <= bounds[0] <= bounds[1] + 1e-12
    assert bounds[1] <= max([dense[0], *(loss for loss, _ in seen)])
    assert np.isfinite(bounds).all()
