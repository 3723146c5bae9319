"""How often it is said wrongly that a mean is above a bound, simulated; and how soon it is said rightly."""

import numpy as np
import pytest

from edgeprune.loop.multitask.early_stopping import MeanAbove
from edgeprune.loop.multitask.look import Look
from edgeprune.loop.multitask.stops import Stops

ALPHA = 0.01
COUNT = 160


def populations(rng):
    """Differences whose least value is known, of many shapes; none is normal, some have long tails."""
    return (
        rng.exponential(1.0, COUNT) - 0.3,
        rng.standard_t(3, COUNT).clip(-2.0),
        (rng.random(COUNT) < 0.05) * 20.0,
        rng.uniform(-1, 1, COUNT),
        np.where(rng.random(COUNT) < 0.5, -1.0, 1.0),
    )


def stops_at(values, bound, lowest, step=16):
    test = MeanAbove(len(values), bound, lowest, ALPHA)
    for start in range(0, len(values), step):
        if test.add(values[start : start + step].tolist()):
            return start + step
    return None


def test_at_the_bound_it_stops_wrongly_in_one_percent_of_cases_at_most():
    """The worst case: the mean is exactly the bound. 2 500 orders of 5 shapes; looked at after every sample."""
    rng = np.random.default_rng(0)
    wrong = runs = 0
    for values in populations(rng):
        for _ in range(500):
            # Where the bound is the mean itself, the last sums may exceed it by rounding.
            order = rng.permutation(values)
            wrong += stops_at(order, float(values.mean()) + 1e-9, float(values.min()) - 0.1, step=1) is not None
            runs += 1
    assert wrong / runs <= ALPHA


@pytest.mark.parametrize("place", range(5))
def test_far_above_the_bound_it_stops_soon_and_below_it_goes_on(place):
    rng = np.random.default_rng(1)
    values = populations(rng)[place]
    lowest, spread = float(values.min()) - 0.1, float(values.std())
    soon = [stops_at(rng.permutation(values), float(values.mean()) - 1.0 * spread, lowest) for _ in range(50)]
    if float(values.mean()) - spread > lowest:
        assert np.mean([at or COUNT for at in soon]) < 0.7 * COUNT
    else:
        assert soon == [16] * 50
    assert all(
        stops_at(rng.permutation(values), float(values.mean()) + 0.5 * spread, lowest) is None for _ in range(50)
    )


def test_what_is_certain_is_said_at_once_and_what_cannot_be_is_never_said():
    assert MeanAbove(10, -1.0, 0.0, ALPHA).certain
    enough = MeanAbove(10, 1.0, 0.0, ALPHA)
    assert not enough.add([1.0] * 10)
    # The first four are more than all ten may be together; no later one can make up for it.
    assert MeanAbove(10, 1.0, 0.0, ALPHA).add([2.9] * 4)
    assert not MeanAbove(0, 1.0, 0.0, ALPHA).add([])


def stopped(state, found, bound, order, units):
    """Whether a look in an order of its batches is stopped before the last one."""
    count = len(order)
    look = Look({}, {"main": [None] * count}, {"main": [0] * count}, {"main": [None] * count})
    stops = Stops(state, look, {"main": bound}, ALPHA, units)
    assert stops.names == {"main"}
    for place in order[:-1]:
        for part in ("sums", "counts", "samples"):
            getattr(look, part)["main"][place] = getattr(found, part)["main"][place]
        stops.add("main", place)
        if stops.certain:
            return True
    return False


def whole(values, batches):
    """A look at all samples, by the batch that each is in."""
    parts = [values[batches == one].tolist() for one in range(batches.max() + 1)]
    look = Look({}, {"main": [sum(part) for part in parts]}, {"main": [len(part) for part in parts]}, {"main": parts})
    look.places = list(range(len(parts)))
    return look


def test_samples_that_go_up_and_down_with_their_batch_are_bet_on_as_one():
    """What a batch has in common deviates twice as much as its samples do, as batch norms may make it; the mean is the bound."""
    rng = np.random.default_rng(2)
    batches = np.repeat(np.arange(24), 8)[:-5]  # the last one is smaller
    wrong = {"samples": 0, "batches": 0}
    for _ in range(1000):
        before = rng.exponential(1.0, len(batches)) + 4.0
        after = np.maximum(0.0, before + rng.standard_normal(24)[batches] + 0.5 * rng.standard_normal(len(batches)))
        order = rng.permutation(24).tolist()
        for units in wrong:
            wrong[units] += stopped(whole(before, batches), whole(after, batches), after.mean() + 1e-9, order, units)
    assert wrong["batches"] <= 1000 * ALPHA
    assert wrong["samples"] > 1000 * ALPHA, "otherwise nothing is tested"


def test_batches_stop_a_look_where_there_are_enough_of_them():
    rng = np.random.default_rng(3)
    for count, room, expected in ((4, 1.0, False), (24, 0.1, True)):
        batches = np.repeat(np.arange(count), 8)
        before = rng.exponential(1.0, len(batches)) + 1.0
        after = before + rng.exponential(0.5, len(batches)) + 1.0
        order = rng.permutation(count).tolist()
        assert (
            stopped(whole(before, batches), whole(after, batches), before.mean() + room, order, "batches") == expected
        )
