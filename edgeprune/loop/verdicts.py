"""Whether the limits of a task are kept: the metric of the pruned model on the validation data, which decided nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from edgeprune.loop.result import MetricVerdict

if TYPE_CHECKING:
    from edgeprune.tasks.task import Task


def verdicts(task: Task | None, before: Mapping[str, float], after: Mapping[str, float]) -> tuple[MetricVerdict, ...]:
    """One per objective, in the order of the task; none without a task.

    Args:
        task: With its limits.
        before: Validation metric of the dense model by objective.
        after: The same of the pruned model.
    """
    if task is None:
        return ()
    found = []
    for objective in task.objectives:
        dense, pruned = before[objective.name], after[objective.name]
        limited = objective.limit is not None
        found.append(
            MetricVerdict(
                objective.name,
                dense,
                pruned,
                higher_is_better=objective.higher_is_better,
                limit=str(objective.limit) if limited else "",
                worst=objective.worst(dense),
                kept=objective.meets_limit(pruned, dense) if limited else None,
            )
        )
    return tuple(found)
