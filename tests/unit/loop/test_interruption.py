"""What an interrupted tuning goes on from besides its last finished epoch: everything random, and what is left to tune."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from edgeprune.budget import Budget
from edgeprune.loop.closing import unmeasured
from edgeprune.loop.interruption import Interruption
from edgeprune.loop.pruning import prune
from edgeprune.loop.result import LatencyCheck, Result
from edgeprune.loop.settings import Settings
from edgeprune.loop.soft_masking import SoftMasking
from edgeprune.loop.stages import Stages
from edgeprune.recovery.fine_tuning import FineTuning
from edgeprune.surgery.cutting import apply

EXAMPLE = torch.zeros(1, 1, 8, 8)
STEPS = 4
"""In an epoch."""


def stopping(stop_at):
    def progress(step, done, total):
        if step == "fine-tuning" and done == stop_at:
            raise KeyboardInterrupt

    return progress


def same_weights(one, other):
    state = other.state_dict()
    return all(torch.equal(value, state[name]) for name, value in one.state_dict().items())


def test_an_interruption_before_the_first_finished_epoch_comes_to_the_same_bits(another_process, tmp_path):
    def run(seed, stop_at=None, **options):
        planner = another_process(seed, STEPS)
        tuning = FineTuning(epochs=1, lr=3e-3)
        return prune(
            planner.model, EXAMPLE, "60%", planner=planner, fine_tuning=tuning, progress=stopping(stop_at), **options
        )

    usual = run(seed=1)
    folder = tmp_path / "tuning"
    with pytest.raises(KeyboardInterrupt):
        run(seed=1, stop_at=3, checkpoint=folder)
    assert not Interruption(folder).checkpoint.exists()
    # It scores nothing and estimates no batch norm: what these drew must not be missing.
    resumed = run(seed=2, checkpoint=folder)
    assert same_weights(resumed.module, usual.module)
    assert resumed.recovery == usual.recovery


@pytest.fixture(scope="module")
def unfinished(tabled):
    """A run under masks whose second plan was not measured; what its board said of the first is emulated."""
    first, second = (tabled.propose(share * tabled.dense_ms) for share in (0.49, 0.45))
    slow = LatencyCheck("bench", 1.0, 0.6, 0.6, 0.59, 0.61)
    return Result(
        module=apply(tabled.model, first.plan),
        plan=first.plan,
        budget_ms=0.5 * tabled.dense_ms,
        dense_ms=tabled.dense_ms,
        dense_measured=False,
        dense_predicted_ms=tabled.dense_ms,
        predicted_ms=first.predicted_ms,
        measured_ms=None,
        budget_met=None,
        rounds=(dataclasses.replace(unmeasured(first), measured=slow), unmeasured(second)),
        certificate=first.allocation.certificate,
        check_max_abs=0.0,
    )


@pytest.mark.parametrize("stop_at", [STEPS - 1, STEPS + 2], ids=["in the first epoch", "in the second"])
def test_a_plan_made_without_the_search_is_tuned_as_long_after_an_interruption(
    another_process, unfinished, tmp_path, stop_at
):
    settings = Settings(
        budget=Budget(latency_ratio=0.5),
        margin=0.02,
        fine_tuning=FineTuning(epochs=3, lr=3e-3),
        distillations=(),
        taps=(),
        refit=False,
        blocks=False,
        search=SoftMasking(epochs=2, every=3),
        calibration_batches=2,
        most_rounds=3,
        measuring_rounds=2,
    )

    def run(seed, stop_at=None, folder=None, earlier=unfinished):
        return Stages(
            another_process(seed, STEPS),
            settings,
            EXAMPLE,
            board=None,
            earlier=earlier,
            interruption=None if folder is None else Interruption(folder),
            plan_path=None,
            progress=stopping(stop_at),
        ).run()

    usual = run(seed=1)
    assert len(usual.recovery[-1].details["epochs"]) == 3
    with pytest.raises(KeyboardInterrupt):
        run(seed=1, stop_at=stop_at, folder=tmp_path / "tuning")
    # The same command again knows of the interrupted run, not of the one before that.
    resumed = run(seed=2, folder=tmp_path / "tuning", earlier=None)
    assert resumed.recovery == usual.recovery
    assert same_weights(resumed.module, usual.module)
    assert resumed.plan.hash == usual.plan.hash
    assert [note for note in resumed.notes if "without the search" in note]
