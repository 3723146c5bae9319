"""The rounds of the closed loop: emulated boards of any law, and the real one with a predictor that is wrong on purpose."""

import copy
import dataclasses
import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn

from edgeprune.errors import BudgetInfeasibleError, ConfigError
from edgeprune.graph.tracing import trace
from edgeprune.latency.fitting import fit
from edgeprune.latency.table import LatencyTable
from edgeprune.loop.closing import MOST_ROUNDS, UNUSED, ClosedLoop, unmeasured
from edgeprune.loop.dense import DenseLatency
from edgeprune.loop.planning import Planner
from edgeprune.loop.pruning import prune
from edgeprune.loop.result import LatencyCheck
from edgeprune.loop.verification import mean_of, measure_ratio
from edgeprune.lowering.kernel_graph import lower
from edgeprune.recovery.fine_tuning import FineTuning
from edgeprune.surgery.cutting import apply
from edgeprune.surgery.plan import PruningPlan, uniform_plan

INTERVAL = 0.003
TABLE = Path(__file__).parents[2] / "data" / "onnxruntime_avx512_kernels.parquet"


class EmulatedLoop(ClosedLoop):
    """Emulated: a plan takes what the law makes of its prediction, and nothing is cut."""

    def __init__(self, *args, law, lost_in=None, **options):
        super().__init__(*args, **options)
        self.law, self.lost_in, self.count = law, lost_in, 0

    def measure(self, proposal):
        self.count += 1
        turn = unmeasured(proposal)
        if self.count == self.lost_in:
            return turn, None, "bench could not measure it: emulated"
        ratio = self.law(proposal.predicted_ms) / self.dense.ms
        check = LatencyCheck("bench", 1.0, ratio, ratio, ratio * (1 - INTERVAL), ratio * (1 + INTERVAL))
        return dataclasses.replace(turn, measured=check), None, ""


def chain(*widths):
    layers, channels = [], 1
    for width in widths:
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10)).eval()


EXAMPLE = torch.zeros(1, 1, 16, 16)


def planned(predictor, folder):
    """Of a net that is deep enough for plans next to any budget; its predictions are extrapolated, and only those count."""
    torch.manual_seed(0)
    model = chain(32, 48, 64, 64, 80, 64)
    device = predictor.table.header["identity"]
    kernel_graph = lower(trace(model, EXAMPLE), model=model, device=device, workdir=folder)
    return Planner(model, kernel_graph, predictor)


@pytest.fixture(scope="module")
def planner(tmp_path_factory):
    """With the predictor of a stored table: the same on every machine and day."""
    return planned(fit(LatencyTable.load(TABLE)), tmp_path_factory.mktemp("chain"))


def closed(planner, share, law, *, begun=(), **options):
    """The loop for a share of the dense latency under a law of (predicted ms), dense included."""
    predicted_ms = planner.dense_ms
    dense = DenseLatency(law(predicted_ms), predicted_ms, measured=True)
    budget_ms = share * dense.ms
    loop = EmulatedLoop(planner, dense, budget_ms, None, law=law, **options)
    return loop.run(planner.propose(share * predicted_ms, margin=0.02), begun), dense, budget_ms


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0.45, 0.9), factor=st.floats(0.8, 1.25), tilt=st.floats(-0.2, 0.2), ripple=st.floats(0, 0.01))
def test_what_is_taken_meets_the_budget_under_any_smooth_law(planner, share, factor, tilt, ripple):
    dense_ms = planner.dense_ms

    def law(predicted_ms):
        scatter = 1 + ripple * (hash(round(predicted_ms, 9)) % 201 - 100) / 100
        return predicted_ms * factor * (predicted_ms / dense_ms) ** tilt * (scatter if predicted_ms != dense_ms else 1)

    try:
        found, dense, budget_ms = closed(planner, share, law)
    except BudgetInfeasibleError:
        assume(False)
    assert 1 <= len(found.rounds) <= MOST_ROUNDS
    taken = found.rounds[found.chosen]
    reached = [turn.measured_ms(dense.ms) for turn in found.rounds]
    assert found.proposal.plan.widths() == taken.widths
    if taken.measured_ms(dense.ms) > budget_ms:
        assert taken.measured_ms(dense.ms) == min(reached)
        assert found.ended
    else:
        better = [
            turn
            for turn in found.rounds
            if turn.high_ms(dense.ms) <= budget_ms and turn.certificate.damage < taken.certificate.damage
        ]
        assert not better
    # Of plans that meet the budget the least damage counts, which may be that of a faster one.
    used_up = max(ms for ms in reached if ms <= budget_ms or ms == min(reached)) >= (1 - UNUSED) * budget_ms
    assert used_up or found.ended or taken.measured_ms(dense.ms) > budget_ms
    assert all(earlier.widths != later.widths for earlier, later in itertools.combinations(found.rounds, 2)), (
        "no plan is measured twice"
    )


@pytest.mark.parametrize("factor", [0.8, 1.0, 1.2])
def test_a_law_that_only_pruned_plans_follow_is_learned_in_one_round(planner, factor):
    """Dense is as predicted, what is pruned is not: the second round must come within reach of the budget."""
    dense_ms = planner.dense_ms
    found, dense, budget_ms = closed(planner, 0.7, lambda ms: ms if ms == dense_ms else factor * ms)
    first = found.rounds[0].measured_ms(dense.ms) / budget_ms
    assert first == pytest.approx(0.98 * factor, rel=0.03)
    taken = found.rounds[found.chosen].measured_ms(dense.ms) / budget_ms
    assert taken <= 1
    # Stair edges of six layers leave gaps of some percent between plans.
    assert taken >= 0.9
    assert found.chosen > 0 or factor == 1.0


def test_a_budget_that_no_plan_meets_says_so_and_gives_the_fastest(planner):
    dense_ms = planner.dense_ms
    smallest_ms = max(planner.front(2), key=lambda proposal: proposal.allocation.certificate.damage).predicted_ms
    share = 1.2 * smallest_ms / dense_ms
    found, dense, budget_ms = closed(planner, share, lambda ms: ms if ms == dense_ms else 1.5 * ms)
    assert "no plan with a smaller predicted latency" in found.ended
    reached = [turn.measured_ms(dense.ms) for turn in found.rounds]
    assert found.rounds[found.chosen].measured_ms(dense.ms) == min(reached) > budget_ms
    assert found.rounds[-1].predicted_ms == pytest.approx(smallest_ms)


def test_a_board_that_is_lost_leaves_the_better_aim_and_a_later_run_measures_it(planner):
    dense_ms = planner.dense_ms

    def law(ms):
        return ms if ms == dense_ms else 1.2 * ms

    lost, dense, budget_ms = closed(planner, 0.7, law, lost_in=2)
    assert [turn.measured is None for turn in lost.rounds] == [False, True]
    assert (lost.chosen, lost.lost) == (1, "bench could not measure it: emulated")
    whole, _, _ = closed(planner, 0.7, law)
    assert lost.rounds[1].widths == whole.rounds[1].widths
    loop = EmulatedLoop(planner, dense, budget_ms, None, law=law)
    later = loop.run(lost.proposal, lost.rounds[:1])
    assert [turn.widths for turn in later.rounds] == [turn.widths for turn in whole.rounds]
    assert (later.chosen, loop.count) == (whole.chosen, len(whole.rounds) - 1)


def test_a_plan_that_met_the_budget_is_kept_when_the_board_is_lost_after_it(planner):
    dense_ms = planner.dense_ms
    found, dense, budget_ms = closed(planner, 0.8, lambda ms: ms if ms == dense_ms else 0.8 * ms, lost_in=2)
    assert len(found.rounds) == 2
    assert (found.chosen, found.lost) == (0, "bench could not measure it: emulated")
    assert found.rounds[0].high_ms(dense.ms) <= budget_ms


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


def test_on_a_real_board_a_wrong_predictor_is_corrected_by_what_is_measured(case, tmp_path):
    """The predictor has pruned networks much faster than they are: round one must miss, the next must come closer."""
    planner = planned(case.predictor, tmp_path)
    result = prune(
        planner.model,
        EXAMPLE,
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
        assert result.module(EXAMPLE).shape == (1, 10)


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
