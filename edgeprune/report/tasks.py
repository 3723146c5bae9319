"""Report data of a task: a row per objective, a column per step and round, and which channels serve which objective."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edgeprune.report.data import ServedGroup, TaskRow, TaskTable

if TYPE_CHECKING:
    from edgeprune.loop.result import Result

ROUND_SOURCE = (
    "Columns named after a round or a plan say how much of what its limit allows each task used up then, on the training "
    "batches that the search looked at; above 100 % the limit was broken. "
)
STEP_SOURCE = "The other columns are metrics on the validation data, after the step that they are named after."
_STEPS = {
    "pagcp": "search",
    "per_task": "cut",
    "batch_norm": "batch norms",
    "fine_tuning": "tuned",
    "reconstruction": "refitted",
    "bias_compensation": "biases compensated",
    "soft_masking": "under masks",
}


def task_table(result: Result) -> TaskTable | None:
    """What became of each objective on the way: searched, cut, and recovered step by step; None where nothing was done.

    Args:
        result: Of `edgeprune.prune`.
    """
    if len(result.verdicts) < 2 and not result.recovery:
        return None
    names = [verdict.objective for verdict in result.verdicts]
    columns = ["dense"]
    cells = {verdict.objective: [f"{verdict.dense:.4f}"] for verdict in result.verdicts}
    rounds = False

    def metrics(title: str, found: Mapping[str, float]) -> None:
        columns.append(title)
        for name in names:
            cells[name].append(f"{found[name]:.4f}" if name in found else "–")

    for record in result.recovery:
        if any(f"{record.before[name]:.4f}" != cells[name][-1] for name in names if name in record.before):
            metrics("cut", record.before)
        for title, used in _rounds(record.details):
            rounds = True
            columns.append(title)
            for name in names:
                cells[name].append(f"{100 * used[name]:.0f} %" if name in used else "–")
        metrics(_STEPS.get(record.step, record.step.replace("_", " ")), record.after)
    rows = tuple(
        TaskRow(
            verdict.objective,
            tuple(cells[verdict.objective]),
            verdict.asked or "no limit",
            "" if verdict.kept is None else "good" if verdict.kept else "bad",
        )
        for verdict in result.verdicts
    )
    return TaskTable(tuple(columns), rows, (ROUND_SOURCE if rounds else "") + STEP_SOURCE)


def served_groups(result: Result) -> tuple[ServedGroup, ...]:
    """The channel groups of the plan with the objectives that need them; none where that is not known."""
    if result.serves is None:
        return ()
    serves = result.serves.groups
    return tuple(
        ServedGroup(name, int(group["size"]), len(group["kept"]), tuple(serves[name]))
        for name, group in result.plan.groups.items()
        if name in serves
    )


def latency_shares(result: Result) -> tuple[tuple[str, float], ...]:
    """Of the predicted dense latency: what serves which objectives, as text and share; the largest first."""
    if result.serves is None:
        return ()
    total = sum(ms for _, ms in result.serves.latency_ms)
    every = len(result.serves.outputs)
    shares = [
        ("all tasks" if len(names) == every else f"only {', '.join(names)}" if names else "no task", ms / total)
        for names, ms in result.serves.latency_ms
    ]
    return tuple(sorted(shares, key=lambda one: -one[1]))


def _rounds(details: Mapping[str, Any]) -> Sequence[tuple[str, Mapping[str, float]]]:
    """Of a search: its rounds, or the plans that it weighed, with what each objective used of its limit."""
    if "used_by_round" in details:
        return [(f"round {number}", used) for number, used in enumerate(details["used_by_round"], 1)]
    plans = [plan for plan in details.get("plans", ()) if "used" in plan]
    return [(f"plan {number}", plan["used"]) for number, plan in enumerate(plans, 1)]
