"""What a report tells of metrics on the way from the dense model to the one that is handed over."""

from __future__ import annotations

from types import SimpleNamespace

from edgeprune.loop.result import MetricVerdict
from edgeprune.recovery.evaluation import RecoveryRecord
from edgeprune.report.tasks import task_table

VERDICT = MetricVerdict("accuracy", 0.9, 0.88, higher_is_better=True)


def told(*recovery: RecoveryRecord) -> dict[str, str]:
    table = task_table(SimpleNamespace(verdicts=(VERDICT,), recovery=recovery))
    (row,) = table.rows
    return dict(zip(table.columns, row.cells, strict=True))


def test_one_metric_is_told_before_and_after_each_step() -> None:
    norms = RecoveryRecord("batch_norm", {"accuracy": 0.5}, {"accuracy": 0.8})
    tuned = RecoveryRecord("fine_tuning", {"accuracy": 0.8}, {"accuracy": 0.88})
    assert told(norms, tuned) == {"dense": "0.9000", "cut": "0.5000", "batch norms": "0.8000", "tuned": "0.8800"}


def test_what_a_search_came_to_is_not_told_twice() -> None:
    masked = RecoveryRecord("soft_masking", {"accuracy": 0.9}, {"accuracy": 0.7})
    norms = RecoveryRecord("batch_norm", {"accuracy": 0.7}, {"accuracy": 0.75})
    assert told(masked, norms) == {"dense": "0.9000", "under masks": "0.7000", "batch norms": "0.7500"}


def test_where_nothing_was_done_there_is_nothing_to_tell() -> None:
    assert task_table(SimpleNamespace(verdicts=(VERDICT,), recovery=())) is None
