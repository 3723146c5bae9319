"""The rounds of the closed loop on emulated boards of any law."""

import dataclasses
import itertools
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from edgeprune.errors import BudgetInfeasibleError
from edgeprune.latency.fitting import fit
from edgeprune.latency.table import LatencyTable
from edgeprune.loop.closing import MOST_ROUNDS, UNUSED, ClosedLoop, unmeasured
from edgeprune.loop.dense import DenseLatency
from edgeprune.loop.result import LatencyCheck

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


@pytest.fixture(scope="module")
def planner(tmp_path_factory, planned):
    """With the predictor of a stored table: the same on every machine and day."""
    return planned(fit(LatencyTable.load(TABLE)), tmp_path_factory.mktemp("chain"))


def closed(planner, share, law, *, begun=(), **options):
    """The loop for a share of the dense latency under a law of (predicted ms), dense included."""
    predicted_ms = planner.dense_ms
    dense = DenseLatency(law(predicted_ms), predicted_ms, measured=True)
    budget_ms = share * dense.ms
    loop = EmulatedLoop(planner, dense, budget_ms, None, law=law, **options)
    return loop.run(planner.propose(share * predicted_ms, margin=0.02), begun), dense, budget_ms


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
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
    if not found.ended and taken.measured_ms(dense.ms) <= budget_ms:
        last = found.rounds[-1]
        sure = (1 - UNUSED) * budget_ms <= last.low_ms(dense.ms) < last.high_ms(dense.ms) <= budget_ms
        assert sure or last.widths == planner.whole, "measured again it lies in the window too"
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
    fastest = max(planner.front(2), key=lambda proposal: proposal.allocation.certificate.damage)
    # At the prices that the rounds are planned with; a point of a front is priced at its own length.
    smallest_ms = planner.cost.ms(fastest.allocation.widths)
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


@pytest.mark.parametrize(
    ("factor", "asked"), [(1.0, []), (1.2, ["once"])], ids=["it is the last plan", "there is another"]
)
def test_what_an_earlier_run_left_is_measured_before_damage_is_measured_beside_it(planner, monkeypatch, factor, asked):
    dense_ms, told = planner.dense_ms, []

    def law(ms):
        return ms if ms == dense_ms else factor * ms

    monkeypatch.setattr(type(planner), "settled", lambda self, budget_ms: told.append("once") or self)
    left = planner.propose(0.7 * dense_ms, margin=0.01)
    loop = EmulatedLoop(
        planner, DenseLatency(dense_ms, dense_ms, measured=True), 0.7 * dense_ms, None, law=law, settle_ms=1.0
    )
    found = loop.run(left)
    assert told == asked
    assert len(found.rounds) > len(asked)
