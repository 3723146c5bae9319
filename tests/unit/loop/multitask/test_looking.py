"""Looks that cost less: what they find is the same, and what they took is counted."""

from dataclasses import replace

import pytest
import torch

from edgeprune.errors import ConfigError
from edgeprune.loop.multitask.calibration_data import CalibrationData
from edgeprune.loop.multitask.looking import Looking
from edgeprune.loop.multitask.pagcp import Pagcp
from edgeprune.tasks.task import Task

SAMPLES = 48


def looking(case, batches=3, task=None, *, batch_statistics=True):
    data = CalibrationData(task or case.task(), torch.device("cpu"), batches, 2, 0)
    planner = case.planner()
    return planner, Looking(planner.model, planner.graph, data, batch_statistics=batch_statistics)


def kept(planner, **widths):
    return {name: tuple(range(widths.get(name, size))) for name, size in planner.graph.widths().items()}


def macs(stem=16, trunk=24, seg=16, depth=24):
    """Counted by hand, as in the test of the search: of one sample."""
    return 144 * (9 * (3 * stem + stem * trunk + trunk * seg + trunk * depth) + 3 * seg + depth)


HEAD = 144 * (9 * 24 + 3)
"""Of the head that segments, by channel."""


def test_only_what_differs_is_computed_beside_another_model(case):
    planner, look = looking(case)
    narrower = [kept(planner, seg_inner=width) for width in (12, 8, 4)]
    plain = [look.losses(one) for one in narrower]
    assert look.multiply_accumulates == SAMPLES * (macs(seg=12) + macs(seg=8) + macs(seg=4))
    metrics = [look.metrics_of(look.cut(one)) for one in narrower]
    look.multiply_accumulates = 0
    assert look.begin(kept(planner), [kept(planner, trunk=2), *narrower], stops=False).losses == look.losses(
        kept(planner)
    )
    assert look.multiply_accumulates == SAMPLES * macs()  # the second time there was nothing to compute
    look.multiply_accumulates = 0
    seen = [look.look(one) for one in narrower]
    assert [one.losses for one in seen] == plain
    assert look.multiply_accumulates == SAMPLES * HEAD * (12 + 8 + 4)
    # The second part: the whole model once, and the head each time.
    look.multiply_accumulates = 0
    assert [look.metrics(one.kept, one) for one in seen] == metrics
    assert look.multiply_accumulates == 32 * (macs() + HEAD * (12 + 8 + 4))
    # What it is beside moves on, and its values are known.
    look.take(seen[1])
    look.multiply_accumulates = 0
    both = kept(planner, seg_inner=8, trunk=20)
    found = look.look(both)
    assert look.multiply_accumulates == SAMPLES * (macs(trunk=20, seg=8) - 144 * 9 * 3 * 16)
    _, fresh = looking(case)
    assert found.losses == fresh.losses(both)
    assert look.state.losses == fresh.losses(kept(planner, seg_inner=8))


def test_without_room_for_values_everything_is_computed(case, monkeypatch):
    planner, look = looking(case)
    monkeypatch.setattr("edgeprune.loop.multitask.looking.MOST_BYTES", 300_000)  # one batch of three
    one = kept(planner, seg_inner=8)
    plain = look.losses(one)
    look.begin(kept(planner), [one], stops=False)
    look.multiply_accumulates = 0
    assert look.look(one).losses == plain
    least = SAMPLES * HEAD * 8
    assert least < look.multiply_accumulates <= 16 * HEAD * 8 + 32 * macs(seg=8)


def test_what_one_batch_says_is_the_difference_to_what_is_known(case):
    planner, look = looking(case)
    look.begin(kept(planner), [], stops=False)
    cut = kept(planner, trunk=12)
    first = look.look(cut, batches=1)
    (place,) = first.places
    state = look.state
    for name, loss in first.beside(state).items():
        here, there = first.sums[name][place] / 16, state.sums[name][place] / 16
        assert loss == pytest.approx(state.losses[name] + here - there)
    # The others are looked at when they are asked for, and no batch twice.
    before = look.multiply_accumulates
    assert look.look(cut, earlier=first).losses == pytest.approx(look.losses(cut))
    assert look.multiply_accumulates - before == (2 * 16 + SAMPLES) * macs(trunk=12)


def test_a_look_is_stopped_where_a_bound_is_clearly_exceeded_and_nowhere_else(case):
    for batch_statistics in (False, True):
        planner, look = looking(case, batch_statistics=batch_statistics)
        dense, cut = kept(planner), kept(planner, trunk=2)
        whole, worse = look.losses(dense), look.losses(cut)
        below = {name: 0.9 * loss for name, loss in worse.items()}
        close = {name: 1.05 * loss for name, loss in whole.items()}
        assert not look.look(cut, most=dict.fromkeys(whole, 0.0), alpha=0.01).stopped  # nothing to compare with yet
        look.begin(dense, [], stops=True)
        before = look.multiply_accumulates
        found = look.look(cut, most=close, alpha=0.01)
        if batch_statistics:
            # Three batches that normalize by themselves are three values: too few to say anything before the last.
            assert not look.look(cut, most=below, alpha=0.01).stopped
            assert look.look(cut, most=dict.fromkeys(whole, 1e-3), alpha=0.01).stopped  # but what is certain
        else:
            assert found.stopped
            assert look.stops == 1
            assert look.multiply_accumulates - before < SAMPLES * macs(trunk=2)
        for bound in (1.2 * worse["seg"], worse["seg"] + 1e-9):
            seen = look.look(cut, ["seg"], most={"seg": bound}, alpha=0.01)
            assert not seen.stopped
            assert seen.losses["seg"] == pytest.approx(worse["seg"])
        assert not look.look(cut, most=close, alpha=0.0).stopped


def test_losses_that_are_no_means_over_samples_or_below_zero_stop_nothing(case):
    task = case.task()
    for loss in (
        lambda outputs, targets: (outputs["seg"].mean() - 1).square(),
        lambda outputs, targets: outputs["seg"].mean() - 10,
    ):
        odd = Task((replace(task.objective("seg"), loss=loss),))
        planner, look = looking(case, task=odd, batch_statistics=False)
        look.begin(kept(planner), [], stops=True)
        assert not look.look(kept(planner, trunk=2), most={"seg": -100.0}, alpha=0.01).stopped


def test_samples_are_in_random_order_where_they_can_be_taken_apart(case):
    data = CalibrationData(case.task(), torch.device("cpu"), 3, 2, 0)
    assert data.shuffled == {"seg", "depth"}
    images = torch.cat(
        [inputs for inputs, _ in [*data.losses.objectives[0].train, *data.metrics.objectives[0].validation]]
    )
    read = torch.cat([inputs for inputs, _ in case.train[:5]])
    assert not torch.equal(images, read)
    rows = [tuple(image.flatten().tolist()[:5]) for image in images]
    assert sorted(rows) == sorted(tuple(image.flatten().tolist()[:5]) for image in read)
    labels = torch.cat([targets["seg"] for _, targets in data.losses.objectives[0].train])
    place = rows.index(tuple(read[0].flatten().tolist()[:5]))
    if place < len(labels):
        assert torch.equal(labels[place], case.train[0][1]["seg"][0])
    odd = [(inputs, {**targets, "name": "a"}) for inputs, targets in case.train]
    one = Task((replace(case.task().objective("seg"), train=odd),))
    assert CalibrationData(one, torch.device("cpu"), 3, 2, 0).shuffled == set()


@pytest.mark.parametrize("compat", [False, True])
def test_the_cheap_search_cuts_what_the_plain_walk_cuts_for_less(case, compat):
    limits = {"seg": None, "depth": None} if compat else {"seg": "30%", "depth": "100%"}
    planner = case.planner(**limits)
    first = replace(planner.propose(0.7 * planner.dense_ms), **({"aim_ms": float("inf")} if compat else {}))
    plain = Pagcp(
        compat=compat,
        tolerance=2.5,
        initial_rate=0.3 if compat else None,
        top=1.0,
        batches=4,
        metric_batches=2,
        bisect=False,
        early_stop=0.0,
        cached=False,
    )
    found = []
    for options in (plain, replace(plain, bisect=True, early_stop=0.01, cached=True)):
        found.append(options.search(planner, first).record.details)
    walk, cheap = ([(step["group"], step["width"]) for step in one["steps"]] for one in found)
    assert walk == cheap
    assert cheap
    assert found[1]["multiply_accumulates"] < 0.7 * found[0]["multiply_accumulates"]
    assert found[0]["stopped_looks"] == 0


def test_a_probability_is_asked_for():
    with pytest.raises(ConfigError, match=r"early_stop must be a probability in \[0, 1\)"):
        Pagcp(early_stop=1.0)
