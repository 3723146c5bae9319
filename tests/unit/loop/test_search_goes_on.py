"""NetAdapt and soft masking that were interrupted, or killed, come to the same plan and weights, and repeat little."""

from __future__ import annotations

import pytest
import torch

from edgeprune.loop import netadapt as netadapts
from edgeprune.loop.interruption import Interruption
from edgeprune.loop.netadapt import NetAdapt
from edgeprune.loop.pruning import prune
from edgeprune.loop.soft_masking import SoftMasking
from edgeprune.recovery.fine_tuning import FineTuning
from edgeprune.spec import Constraints

EXAMPLE = torch.zeros(1, 1, 8, 8)


def run(another_process, seed, folder=None, progress=None, **search):
    planner = another_process(seed, 3, constraints=Constraints(multiple_of={"*": 8}))
    epochs = 4 if "soft_masking" in search else 1
    return prune(
        planner.model,
        EXAMPLE,
        "45%",
        planner=planner,
        fine_tuning=FineTuning(epochs=epochs, lr=3e-3),
        checkpoint=folder,
        progress=progress,
        **search,
    )


def stopping(step, stop_at):
    """Stops at one of the first calls of a step; the calls that were made are in `told`."""
    told = []

    def progress(name, done, total):
        if name == step:
            told.append(done)
            if len(told) == stop_at:
                raise KeyboardInterrupt

    return progress, told


def assert_same(one, other):
    assert one.plan.hash == other.plan.hash
    assert one.recovery == other.recovery
    state = other.module.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in one.module.state_dict().items())


def test_netadapt_goes_on_after_the_last_cut(another_process, tmp_path, monkeypatch):
    tuned = []
    original = netadapts.fine_tune

    def counted(*arguments, **options):
        tuned.append(1)
        return original(*arguments, **options)

    monkeypatch.setattr(netadapts, "fine_tune", counted)
    settings = NetAdapt(reduction=0.08, decay=0.9, tuning_steps=2, batches=2)
    usual = run(another_process, 1, netadapt=settings)
    in_all = len(tuned)
    assert in_all >= 5
    folder = tmp_path / "tuning"
    tuned.clear()
    # In the first step, and in a later one.
    for seed, stop_at in ((1, 2), (2, in_all - 3)):
        progress, _ = stopping("trying cuts", stop_at)
        with pytest.raises(KeyboardInterrupt):
            run(another_process, seed, folder, progress, netadapt=settings)
        assert Interruption(folder).read() is not None
    resumed = run(another_process, 3, folder, netadapt=settings)
    assert_same(resumed, usual)
    assert len(tuned) == in_all
    assert not (folder / "search").exists()


def test_soft_masking_goes_on_after_the_last_epoch(another_process, tmp_path):
    settings = SoftMasking(epochs=3, every=2)
    usual = run(another_process, 1, soft_masking=settings)
    assert usual.recovery[0].details["reallocations"][0]["step"] == 2
    folder = tmp_path / "tuning"
    for seed, stop_at in ((1, 2), (2, 5)):  # in the first epoch; in the second one of the run that goes on
        progress, _ = stopping("soft masking", stop_at)
        with pytest.raises(KeyboardInterrupt):
            run(another_process, seed, folder, progress, soft_masking=settings)
    progress, told = stopping("soft masking", -1)
    resumed = run(another_process, 3, folder, progress, soft_masking=settings)
    assert_same(resumed, usual)
    assert told[0] == 4, "the first epoch was not trained again"
