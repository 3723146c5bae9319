"""Looks that cost less: what they find is the same, and what they took is counted."""

from dataclasses import replace

import pytest
import torch

from edgeprune.errors import ConfigError
from edgeprune.loop.multitask.calibration_data import CalibrationData
from edgeprune.loop.multitask.looking import Beside, Looking
from edgeprune.loop.multitask.pagcp import Pagcp
from edgeprune.tasks.task import Task

SAMPLES = 48


def looking(case, batches=3, task=None):
    data = CalibrationData(task or case.task(), torch.device("cpu"), batches, 2, 0)
    planner = case.planner()
    return planner, Looking(planner.model, planner.graph, data, batch_statistics=True)


def kept(planner, **widths):
    return {name: tuple(range(widths.get(name, size))) for name, size in planner.graph.widths().items()}


def macs(stem=16, trunk=24, seg=16, depth=24):
    """Counted by hand, as in the test of the search: of one sample."""
    return 144 * (9 * (3 * stem + stem * trunk + trunk * seg + trunk * depth) + 3 * seg + depth)


def test_what_lies_before_a_layer_is_computed_once(case):
    planner, look = looking(case)
    narrower = [kept(planner, seg_inner=width) for width in (12, 8, 4)]
    plain = [look.losses(one) for one in narrower]
    assert look.multiply_accumulates == SAMPLES * (macs(seg=12) + macs(seg=8) + macs(seg=4))
    before = look.multiply_accumulates
    beside = Beside(look.cut(kept(planner)))
    cached = [look.look(one, beside=beside).losses for one in narrower]
    assert cached == plain
    # Stem and trunk once, and the heads each time; which of the two comes first is the program's affair.
    trunk = 144 * 9 * (3 * 16 + 16 * 24)
    heads = sum(macs(seg=width) - trunk for width in (12, 8, 4))
    assert look.multiply_accumulates - before == SAMPLES * (trunk + heads)
    # One that differs earlier is looked at from there.
    stem = kept(planner, stem=8)
    assert look.look(stem, beside=beside).losses == look.losses(stem)


def test_a_look_is_stopped_where_a_bound_is_clearly_exceeded_and_nowhere_else(case):
    planner, look = looking(case)
    dense, cut = kept(planner), kept(planner, trunk=2)
    whole, worse = look.losses(dense), look.losses(cut)
    assert not look.look(cut, most=dict.fromkeys(whole, 0.0), alpha=0.01).stopped  # nothing to compare with yet
    look.refer(dense)
    before = look.multiply_accumulates
    found = look.look(cut, most={name: 1.05 * loss for name, loss in whole.items()}, alpha=0.01)
    assert found.stopped
    assert look.stops == 1
    assert look.multiply_accumulates - before < SAMPLES * macs(trunk=2)
    for bound in (1.2 * worse["seg"], worse["seg"]):
        assert look.look(cut, ["seg"], most={"seg": bound}, alpha=0.01).losses == {"seg": worse["seg"]}
    assert not look.look(cut, most={name: 1.05 * loss for name, loss in whole.items()}, alpha=0.0).stopped


def test_losses_that_are_no_means_over_samples_or_below_zero_stop_nothing(case):
    task = case.task()
    for loss in (
        lambda outputs, targets: (outputs["seg"].mean() - 1).square(),
        lambda outputs, targets: outputs["seg"].mean() - 10,
    ):
        odd = Task((replace(task.objective("seg"), loss=loss),))
        planner, look = looking(case, task=odd)
        look.refer(kept(planner))
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


def test_the_cheap_search_cuts_what_the_plain_walk_cuts_for_less(case):
    planner = case.planner(seg="30%", depth="100%")
    plain = Pagcp(batches=4, metric_batches=2, bisect=False, early_stop=0.0, cached=False)
    found = []
    for options in (plain, replace(plain, bisect=True, early_stop=0.01, cached=True)):
        result = options.search(planner, planner.propose(0.7 * planner.dense_ms))
        found.append(result.record.details)
    walk, cheap = ([(step["group"], step["width"]) for step in one["steps"]] for one in found)
    assert walk == cheap
    assert cheap
    assert found[1]["multiply_accumulates"] < found[0]["multiply_accumulates"]
    assert found[1]["looks"] <= found[0]["looks"]
    assert found[1]["stopped_looks"] > found[0]["stopped_looks"] == 0


def test_a_probability_is_asked_for():
    with pytest.raises(ConfigError, match=r"early_stop must be a probability in \[0, 1\)"):
        Pagcp(early_stop=1.0)
