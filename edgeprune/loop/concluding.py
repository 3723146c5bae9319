"""What a pruning came to: its `Result`, with the sentences that a person should read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from edgeprune.errors import TaskError
from edgeprune.loop.limits import spent
from edgeprune.loop.notes import accuracy_notes, latency_notes, round_notes, search_notes, table_notes
from edgeprune.loop.result import LatencyCheck, Result, Serves
from edgeprune.loop.serving import serving
from edgeprune.loop.verdicts import verdicts

if TYPE_CHECKING:
    from torch import nn

    from edgeprune.budget import Budget
    from edgeprune.loop.dense import DenseLatency
    from edgeprune.loop.planning import Planner
    from edgeprune.loop.realizing import Realized
    from edgeprune.loop.taken import Taken
    from edgeprune.tasks.task import Task


def told_serving(task: Task | None, model: nn.Module, planner: Planner) -> tuple[Serves | None, tuple[str, ...]]:
    """What of the dense model serves which objectives, where there are several, and sentences on it.

    Args:
        task: With its objectives, or None.
        model: The dense model.
        planner: Of it.
    """
    if task is None or len(task.objectives) == 1:
        return None, ()
    try:
        found = serving(task, model, planner.graph)
    except TaskError as error:
        # What was pruned is not lost for a sentence.
        return None, (f"Which objectives need what cannot be told: {error.message}",)
    if found is None:
        return None, ()
    return found.told(planner.cost), tuple(found.sentences(planner.cost))


def concluded(
    taken: Taken,
    realized: Realized,
    *,
    budget: Budget,
    dense: DenseLatency,
    metrics: tuple[Mapping[str, float], Mapping[str, float]],
    measured: LatencyCheck | None,
    lost: str,
    unchanged: bool,
    serves: tuple[Serves | None, tuple[str, ...]],
    notes: tuple[str, ...],
) -> Result:
    """Everything that is known in the end.

    Args:
        taken: The plan.
        realized: Its model.
        budget: As it was asked for.
        dense: Latency of the dense model.
        metrics: Of the dense and of the pruned model, by objective.
        measured: What the board had to say last.
        lost: A clause on why it had not, or empty.
        unchanged: Whether nothing was cut.
        serves: See `told_serving`.
        notes: Of the stages before.
    """
    planner, proposal = taken.planner, taken.proposal
    budget_ms = budget.resolve_ms(dense.ms)
    measured_ms = None if measured is None else measured.ratio * dense.ms
    timed = measured_ms is not None and budget.bounds_latency
    before, after = (dict(one) for one in metrics)
    found = verdicts(planner.task, before, after)
    return Result(
        module=realized.module,
        plan=proposal.plan,
        budget_ms=budget_ms,
        dense_ms=dense.ms,
        dense_measured=dense.measured,
        dense_predicted_ms=dense.predicted_ms,
        predicted_ms=proposal.predicted_ms,
        measured_ms=measured_ms,
        measured=measured,
        budget_met=measured_ms <= budget_ms if timed and measured_ms is not None else None,
        rounds=taken.rounds,
        chosen=taken.chosen,
        certificate=proposal.allocation.certificate,
        check_max_abs=realized.check_max_abs,
        metrics_before=before,
        metrics_after=after,
        recovery=realized.recovery,
        spent=spent(planner.limits, proposal.plan.widths()),
        unchanged=unchanged,
        verdicts=found,
        serves=serves[0],
        notes=(
            *table_notes(planner.predictor, planner.kernel_graph, dense),
            *latency_notes(
                budget,
                dense,
                budget_ms=budget_ms,
                predicted_ms=proposal.predicted_ms,
                measured=measured,
                unchanged=unchanged,
                lost=lost,
            ),
            *(round_notes(taken.closed, dense, budget_ms) if taken.closed and budget.bounds_latency else ()),
            *notes,
            *serves[1],
            *accuracy_notes(planner, found),
            *search_notes(proposal.allocation.certificate, unchanged),
        ),
    )
