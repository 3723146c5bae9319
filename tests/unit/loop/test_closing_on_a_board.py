"""The closed loop on the real board, with a predictor that is wrong on purpose, and when the board is lost."""

import copy
import dataclasses
from functools import partial

import pytest
import torch

from edgeprune.errors import ConfigError
from edgeprune.latency.chosen import Chosen
from edgeprune.loop import verification
from edgeprune.loop.pruning import prune
from edgeprune.loop.result import LatencyCheck
from edgeprune.loop.soft_masking import SoftMasking
from edgeprune.loop.verification import mean_of, measure_ratio
from edgeprune.profiling.comparing import compare
from edgeprune.profiling.sustaining import sustained
from edgeprune.recovery.fine_tuning import FineTuning
from edgeprune.surgery.cutting import apply
from edgeprune.surgery.plan import PruningPlan, uniform_plan


def crooked(planner, factor):
    """The planner's predictor with pruned networks `factor` times as fast as it takes them to be."""
    predictor = copy.copy(planner.predictor)
    dense = planner.kernel_graph.at(planner.graph.widths())

    class Crooked(type(predictor)):
        def network(self, kernels):
            listed = list(kernels)
            ms, low_ms, high_ms = super().network(listed)
            share = 1.0 if listed == dense else factor
            return share * ms, share * low_ms, share * high_ms

    predictor.__class__ = Crooked
    return predictor


def test_a_percentile_on_a_hot_board_is_what_the_board_is_asked_for(case, monkeypatch):
    """Heated for a second here, where it takes minutes to tell that a board is in equilibrium."""
    monkeypatch.setattr(verification, "sustained", partial(sustained, limit_s=1.0, window_s=0.25))
    found = measure_ratio(
        case.board, case.kernel_graph, None, threads=1, rounds=4, chosen=Chosen(percentile=95, sustained=True)
    )
    assert found.percentile == 95
    assert found.heated.startswith("after 1 s of heating the dense network takes")
    assert found.heated.endswith("the board is not in equilibrium: too short to tell")
    assert found.ratio == 1.0


@pytest.mark.usefixtures("roughly")
def test_on_a_real_board_a_wrong_predictor_is_corrected_by_what_is_measured(case, planned, tmp_path, monkeypatch):
    """The predictor has pruned networks much faster than they are: round one must miss, the next must come closer."""
    levels = []

    def watched(*args, **options):
        found = compare(*args, **options)
        levels.append((options["level_ms"], found.level_ms))
        return found

    monkeypatch.setattr(verification, "compare", watched)
    planner = planned(case.predictor, tmp_path)
    result = prune(
        planner.model,
        planner.graph.example_inputs[0],
        "60%",
        board=case.board,
        predictor=crooked(planner, 0.7),
        kernel_graph=planner.kernel_graph,
        plan_path=tmp_path / "plan.json",
        measuring_rounds=12,
    )
    first, last = result.rounds[0], result.rounds[-1]
    assert len(result.rounds) > 1
    assert first.measured_ms(result.dense_ms) > result.budget_ms
    assert last.aim_ms < 0.9 * first.aim_ms
    assert last.measured_ms(result.dense_ms) < first.measured_ms(result.dense_ms)
    taken = result.rounds[result.chosen]
    assert result.chosen > 0
    assert result.measured == taken.measured
    assert PruningPlan.load(tmp_path / "plan.json").widths() == taken.widths == result.plan.widths()
    tried = next(note for note in result.notes if "plans were tried on the board" in note)
    assert tried.endswith(f"plan {result.chosen + 1} was taken.")
    with torch.no_grad():
        assert result.module(planner.graph.example_inputs[0]).shape == (1, 10)
    known, told = zip(*levels, strict=True)
    assert known == (None, *told[:-1]), "what the dense engine takes is handed from one comparison to the next"


@pytest.mark.usefixtures("roughly")
def test_what_a_lost_board_left_is_finished_without_tuning_again(case, lost_board):
    options = {"predictor": case.predictor, "kernel_graph": case.kernel_graph, "task": case.task}
    tuning = FineTuning(epochs=1)
    begun = prune(case.model, case.example, "70%", board=lost_board, fine_tuning=tuning, **options)
    assert begun.measured is None
    assert any(note.startswith("The latency is unverified") for note in begun.notes)
    steps = set()
    # Rounds that end with the first plan, whatever this machine measures.
    later = prune(
        case.model,
        case.example,
        "70%",
        board=case.board,
        earlier=begun,
        most_rounds=1,
        measuring_rounds=4,
        progress=lambda step, *_: steps.add(step),
        **options,
    )
    assert later.measured is not None
    assert later.module is begun.module
    assert later.metrics_after == begun.metrics_after
    assert "fine-tuning" not in steps
    assert "scoring" not in steps
    assert later.plan.kept == begun.plan.kept
    with pytest.raises(ConfigError, match="needs a board to measure on, found none"):
        prune(case.model, case.example, "70%", earlier=begun, **options)
    for changed, words in (
        (later, "found that all its rounds were"),
        (dataclasses.replace(begun, budget_ms=2 * begun.budget_ms), "of the same model, predictor and budget"),
    ):
        with pytest.raises(ConfigError, match=words):
            prune(case.model, case.example, "70%", board=case.board, earlier=changed, **options)


def test_comparisons_that_are_not_precise_enough_are_repeated_and_averaged(case):
    once = measure_ratio(case.board, case.kernel_graph, None, threads=1, rounds=2)
    assert once.ratio == once.ratio_low == once.ratio_high == 1.0
    model = apply(case.model, uniform_plan(case.graph, 0.5))
    counted = []

    def progress(step, done, total):
        counted.append(done == total)

    rough = measure_ratio(case.board, case.kernel_graph, model, threads=1, rounds=2, progress=progress)
    assert sum(counted) == 1
    counted.clear()
    fine = measure_ratio(case.board, case.kernel_graph, model, threads=1, rounds=2, precision=1e-6, progress=progress)
    assert sum(counted) == 4
    assert fine.ratio_low < fine.ratio < fine.ratio_high < 1
    assert fine.ratio == pytest.approx(rough.ratio, rel=0.3)


def test_the_mean_of_comparisons_has_the_interval_of_independent_ones():
    one = LatencyCheck("bench", 2.0, 1.0, 0.50, 0.47, 0.54)
    two = LatencyCheck("bench", 4.0, 3.0, 0.54, 0.50, 0.57)
    found = mean_of([one, two])
    assert (found.dense_ms, found.pruned_ms) == (3.0, 2.0)
    assert found.ratio == pytest.approx(0.52)
    assert found.ratio_low == pytest.approx(0.52 - 0.05 / 2)
    assert found.ratio_high == pytest.approx(0.52 + 0.05 / 2)


@pytest.mark.slow
def test_what_was_masked_in_training_is_measured_as_any_other_plan(case, lost_board):
    options = {
        "predictor": case.predictor,
        "kernel_graph": case.kernel_graph,
        "task": case.task,
        "fine_tuning": FineTuning(epochs=2),
        "soft_masking": SoftMasking(every=5),
        "most_rounds": 1,
        "measuring_rounds": 4,
    }
    begun = prune(case.model, case.example, "70%", board=lost_board, **options)
    assert [record.step for record in begun.recovery] == ["soft_masking", "batch_norm", "fine_tuning"]
    assert begun.measured is None
    steps = set()
    later = prune(
        case.model,
        case.example,
        "70%",
        board=case.board,
        earlier=begun,
        progress=lambda step, *_: steps.add(step),
        **options,
    )
    assert later.measured is not None
    assert later.module is begun.module
    assert later.plan.hash == begun.plan.hash
    assert "soft masking" not in steps
    at_once = prune(case.model, case.example, "70%", board=case.board, **options)
    assert at_once.plan.hash == begun.plan.hash, "training under masks is the same again"
    assert at_once.measured.ratio < 0.9
    assert any(note.startswith("Soft masking:") for note in at_once.notes)
