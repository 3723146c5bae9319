"""`prune` with a board, which has the last word: what is measured, what is met, and what is left when it is lost."""

from __future__ import annotations

import re

import pytest
import torch

from edgeprune.allocation.cost import CostModel
from edgeprune.budget import Budget
from edgeprune.errors import TableMismatchError
from edgeprune.latency.table import LatencyTable
from edgeprune.loop.pruning import prune
from edgeprune.loop.verification import require_same_device
from edgeprune.recovery.evaluation import evaluate
from edgeprune.recovery.fine_tuning import FineTuning
from edgeprune.surgery.plan import PruningPlan


def pruned(case, budget, **changes):
    return prune(case.model, case.example, budget, predictor=case.predictor, kernel_graph=case.kernel_graph, **changes)


@pytest.mark.usefixtures("roughly")
def test_a_task_and_a_board_give_a_tuned_and_measured_model(case, tmp_path):
    state = {name: value.clone() for name, value in case.model.state_dict().items()}
    path = tmp_path / "plans" / "plan.json"
    steps, seen = [], []

    def progress(step, done, total):
        if not steps or steps[-1] != step:
            steps.append(step)
            seen.append((step, path.exists()))

    result = pruned(
        case,
        Budget(latency_ratio=0.6),
        board=case.board,
        task=case.task,
        fine_tuning=FineTuning(epochs=2, lr=3e-3),
        plan_path=path,
        most_rounds=1,
        measuring_rounds=8,
        progress=progress,
    )
    # A share is one of the dense latency as it was measured while profiling.
    dense_ms = case.predictor.table.header["reference"]["median_ms"]
    assert result.dense_measured
    assert result.dense_ms == dense_ms
    assert result.budget_ms == pytest.approx(0.6 * dense_ms)
    assert result.predicted_ms <= 0.98 * result.budget_ms
    aim_ms = 0.98 * result.budget_ms * min(1.0, result.dense_predicted_ms / dense_ms)
    assert result.rounds[0].aim_ms == pytest.approx(aim_ms)
    assert result.rounds[0].predicted_low_ms <= result.predicted_ms <= result.rounds[0].predicted_high_ms
    assert result.rounds[0].widths == result.plan.widths()
    # The plan was on disk, with its prediction, before anything was cut, compiled or timed.
    assert steps == [
        "scoring", "allocating", "cutting", "measuring on the board", "checking", "re-estimating batch norm", "fine-tuning",
        "measuring on the board",
    ]  # fmt: skip
    assert [step for step, written in seen if not written] == ["scoring", "allocating"]
    written = PruningPlan.load(path)
    assert written.hash == result.plan.hash
    assert written.predicted["latency_ms"] == pytest.approx(result.predicted_ms)
    assert written.predicted["low_ms"] <= written.predicted["latency_ms"] <= written.predicted["high_ms"]
    assert written.predicted["table"] == case.predictor.table_hash
    # Cut exactly, recovered, and the model that was given is as it was.
    assert result.check_max_abs < 1e-6
    assert sum(p.numel() for p in result.module.parameters()) < sum(p.numel() for p in case.model.parameters())
    assert result.metrics_before == evaluate(case.model, case.task)
    assert result.metrics_after == evaluate(result.module, case.task)
    # How deep 60 % of the latency cuts is the machine's to say; tuning must bring back most of what the cut took.
    cut = result.recovery[0].before["accuracy"]
    assert result.metrics_after["accuracy"] > max(0.5, (cut + result.metrics_before["accuracy"]) / 2)
    assert [record.step for record in result.recovery] == ["batch_norm", "fine_tuning"]
    assert all(torch.equal(value, state[name]) for name, value in case.model.state_dict().items())
    # The board has the last word, on the tuned model.
    measured = result.measured
    assert measured != result.rounds[0].measured
    assert measured.ratio == pytest.approx(result.rounds[0].measured.ratio, rel=0.2)
    assert measured.board == case.board.name
    assert measured.pruned_ms > 0
    assert result.measured_ms == measured.ratio * result.dense_ms, "on the scale of the budget, not of the day"
    assert measured.ratio_low <= measured.ratio <= measured.ratio_high
    assert measured.ratio < 0.9
    assert result.budget_met == (measured.ratio <= 0.6)
    assert ("is not met as measured" in " ".join(result.notes)) == (not result.budget_met)


@pytest.mark.slow
def test_met_is_the_ratio_on_the_board_times_the_dense_latency(case, predictor_with):
    """Not the milliseconds of another day: the same ratio meets a budget in ms exactly when it meets the share."""
    predicted_ms = CostModel(case.kernel_graph, case.predictor).dense_ms
    doubled = predictor_with(2 * predicted_ms)
    result = prune(
        case.model,
        case.example,
        Budget(latency_ms=1.2 * predicted_ms),
        board=case.board,
        predictor=doubled,
        kernel_graph=case.kernel_graph,
        measuring_rounds=4,
    )
    ratio = result.measured.ratio
    assert result.budget_met == (ratio <= 0.6)
    assert abs(ratio - 1) > 0.05


def test_an_unchanged_model_is_measured_too(case):
    result = pruned(case, Budget(latency_ratio=1.0), board=case.board, measuring_rounds=2)
    assert result.unchanged
    assert result.measured_ms is not None
    assert result.budget_met
    assert not any("unverified" in note for note in result.notes)


@pytest.mark.usefixtures("roughly")
def test_without_a_latency_budget_it_is_measured_and_nothing_is_met(case):
    measured = pruned(case, Budget(macs_ratio=0.6), board=case.board, measuring_rounds=2)
    assert measured.spent[0].value <= measured.spent[0].at_most
    assert measured.measured is not None
    assert len(measured.rounds) == 1
    assert measured.budget_met is None, "no latency was asked for"
    assert not any("of the budget" in note for note in measured.notes)


def test_a_table_of_another_device_is_refused(case):
    header = dict(case.predictor.table.header)
    header["identity"] = {**header["identity"], "cpu_model": "Cortex-A76"}
    foreign = LatencyTable(header, list(case.predictor.table.rows))
    with pytest.raises(
        TableMismatchError, match=r"found another cpu_model \(table: Cortex-A76, board: .*\)\."
    ) as caught:
        require_same_device(foreign, case.board)
    assert caught.value.hint == f"edgeprune profile --board {case.board.name}"


def test_a_table_of_another_version_of_the_runtime_names_both(case):
    header = dict(case.predictor.table.header)
    header["identity"] = {**header["identity"], "runtime_version": "1.20.1", "runtime_sha256": "another"}
    foreign = LatencyTable(header, list(case.predictor.table.rows))
    version = case.predictor.table.header["identity"]["runtime_version"]
    words = rf"found another runtime_version \(table: 1\.20\.1, board: {re.escape(version)}\)\."
    with pytest.raises(TableMismatchError, match=words):
        require_same_device(foreign, case.board)


def test_a_board_that_is_lost_at_the_end_does_not_take_the_model_along(case, lost_board):
    result = pruned(case, Budget(latency_ratio=0.6), board=lost_board, measuring_rounds=2)
    assert result.measured_ms is None
    assert result.budget_met is None
    assert any("unverified" in note and "could not measure it: the board must answer" in note for note in result.notes)
    assert result.plan.widths() != case.graph.widths()
