"""Sentences of a pruning result that a person should read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from edgeprune.latency.chosen import Chosen
from edgeprune.loop.closing import UNUSED

if TYPE_CHECKING:
    from edgeprune.allocation._base import Certificate
    from edgeprune.budget import Budget
    from edgeprune.latency.predictor import Predictor
    from edgeprune.loop.closing import Closed
    from edgeprune.loop.dense import DenseLatency
    from edgeprune.loop.planning import Planner
    from edgeprune.loop.result import LatencyCheck, MetricVerdict
    from edgeprune.lowering.kernel_graph import KernelGraph


def latency_notes(
    budget: Budget,
    dense: DenseLatency,
    *,
    budget_ms: float,
    predicted_ms: float,
    measured: LatencyCheck | None,
    unchanged: bool,
    lost: str,
) -> Iterator[str]:
    """Why nothing was pruned, whether the latency is verified, and what became of the budget.

    Args:
        budget: As it was asked for.
        dense: Latency of the dense model.
        budget_ms: The budget in milliseconds.
        predicted_ms: Predicted latency of the pruned model, milliseconds.
        measured: What a board said.
        unchanged: Whether the plan removes nothing.
        lost: A clause on why the board did not answer in the end, or empty.
    """
    if unchanged and not budget.bounds_latency:
        yield f"The dense model is within the budget of {budget}: nothing was pruned."
    elif unchanged and dense.ms <= budget_ms:
        known = "was measured" if dense.measured else "is predicted"
        yield (
            f"The dense model {known} to take {dense.ms:.4g} ms, which is within the budget of {budget_ms:.4g} ms: "
            "nothing was pruned."
        )
    elif unchanged:
        yield f"No smaller widths come closer to the budget of {budget_ms:.4g} ms: nothing was pruned."
    if measured is None:
        yield unverified_note(lost)
        return
    if budget.bounds_latency:
        yield from missed_notes(budget, dense, measured, predicted_ms)
    if lost:
        yield f"The latency is that of the cut model before it was tuned; afterwards {lost}"


def unverified_note(lost: str, *, predicted: bool = True) -> str:
    """That no board has measured the latency.

    Args:
        lost: A clause on why the board did not answer; empty where there was none.
        predicted: Whether there is a prediction.
    """
    known = "predicted" if predicted else "not known"
    return f"The latency is unverified: it is {known}, {lost or 'no board was given to measure it on.'}"


def missed_notes(budget: Budget, dense: DenseLatency, measured: LatencyCheck, predicted_ms: float) -> Iterator[str]:
    """That a budget of latency is not met, where it is not.

    Args:
        budget: As it was asked for.
        dense: Latency of the dense model.
        measured: What a board said.
        predicted_ms: Predicted latency of the pruned model, milliseconds.
    """
    if measured.ratio * dense.ms > budget.resolve_ms(dense.ms):
        yield (
            f"The budget of {budget} is not met as measured on {measured.board}: {measured.ratio:.1%} of the dense model's "
            f"{dense.ms:.4g} ms, where {predicted_ms:.4g} ms were predicted."
        )


def round_notes(closed: Closed, dense: DenseLatency, budget_ms: float) -> Iterator[str]:
    """What the rounds came to, where there was more than one or the budget was not met."""
    turn = closed.rounds[closed.chosen]
    if len(closed.rounds) > 1:
        shares = [
            "not measured" if one.measured is None else f"{one.measured_ms(dense.ms) / budget_ms:.1%} of the budget"
            for one in closed.rounds
        ]
        yield (
            f"{len(closed.rounds)} plans were tried on the board ({', '.join(shares)}); plan {closed.chosen + 1} was taken."
        )
    if closed.lost and turn.measured is not None:
        yield f"The last of them was not measured: {closed.lost}"
    if turn.measured is not None and turn.measured_ms(dense.ms) > budget_ms and closed.ended:
        yield f"No further plan was tried: {closed.ended}. This is the fastest one that was measured."
    elif turn.measured is not None and closed.ended and (left := 1 - turn.measured_ms(dense.ms) / budget_ms) > UNUSED:
        yield (
            f"When the plan was tried, before tuning, it left {left:.1%} of the budget unused, and no further one was made: "
            f"{closed.ended}."
        )


def table_notes(predictor: Predictor, kernel_graph: KernelGraph, dense: DenseLatency) -> Iterator[str]:
    """What of the dense model the table does not hold: of another input or model it is extrapolated, and that must be said."""
    chosen = Chosen.of(predictor.table.header)
    if not chosen.plain:
        yield f"All latencies are {chosen}."
    if chosen.precision == "int8":
        yield (
            "All latencies are of engines with every layer in int8, and metrics are of the model in float: compile leaves the "
            "layers in float that int8 would make too noisy, and says what int8 does to the metrics."
        )
    kernels = kernel_graph.at(kernel_graph.graph.widths())
    predicted = predictor.predict(kernels)
    guessed = predicted["source"] == "fallback"
    if guessed.any():
        names = sorted({kernel.op for kernel, guess in zip(kernels, guessed, strict=True) if guess})
        yield (
            f"No kernel like {', '.join(names)} was measured: what these take, {predicted['ms'][guessed].sum():.3g} ms of the "
            "dense model, is a guess from kernels of other kinds or from their memory traffic, and widens the interval."
        )
    if dense.measured:
        return
    unknown = predicted[predicted["source"] != "measured"]
    if len(unknown):
        share = float(unknown["ms"].sum() / predicted["ms"].sum())
        yield (
            f"{len(unknown)} of {len(predicted)} kernels of the dense model ({share:.0%} of its time) are not in the latency "
            "table, so its predictions are extrapolated: profile this model with this input."
        )
    else:
        yield "The dense model as a whole is not in the latency table, so its latency is predicted: profile this model."


def accuracy_notes(planner: Planner, found: Iterable[MetricVerdict]) -> Iterator[str]:
    """That accuracy was not measured, or which limit of the task is not kept."""
    if planner.task is None:
        yield (
            f"Accuracy was not measured: there is no task, the criterion {planner.criterion.name} used no data, "
            "and nothing was fine-tuned."
        )
        return
    yield from limit_notes(found)


def limit_notes(found: Iterable[MetricVerdict]) -> Iterator[str]:
    """Which limits of a task are not kept."""
    for verdict in found:
        if verdict.kept is False:
            yield (
                f"The metric of {verdict.objective} is {verdict.pruned:.4g}, beyond its limit: {verdict.asked} "
                f"where the dense model has {verdict.dense:.4g}."
            )


def search_notes(certificate: Certificate, unchanged: bool) -> Iterator[str]:
    """That widths are not proven optimal, where they are not."""
    if not unchanged and certificate.bound is None:
        yield f"The widths are not proven optimal: {certificate.note}"
