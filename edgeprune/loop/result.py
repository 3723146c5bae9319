"""What `edgeprune.prune` returns."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from edgeprune.allocation._base import Certificate
from edgeprune.loop.pruned import Pruned


@dataclass(frozen=True)
class LatencyCheck:
    """One comparison of a pruned engine with the dense one on a board, timed interleaved.

    Attributes:
        board: Name of the board.
        dense_ms: Median of the dense engine as timed, milliseconds; of the percentile where one was compared.
        pruned_ms: The same of the pruned engine.
        ratio: Pruned over dense, median over the rounds.
        ratio_low: Lower end of its confidence interval.
        ratio_high: Upper end.
        percentile: What of each round was compared; 50 is the median.
        heated: Where the board was heated first, one sentence on what that came to; else empty.
        disturbance: Where rounds were disturbed, a clause on how many; else empty.
        level_ms: What the dense engine usually takes, milliseconds, see `edgeprune.profiling.comparing.Comparison`; None where
            that was not kept.
    """

    board: str
    dense_ms: float
    pruned_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float
    percentile: int = 50
    heated: str = ""
    disturbance: str = ""
    level_ms: float | None = None

    @property
    def of_dense(self) -> str:
        """``"61.2%"``, and how many rounds were disturbed, if any."""
        return ", ".join(filter(None, (f"{self.ratio:.1%}", self.disturbance)))


@dataclass(frozen=True)
class Spent:
    """What a plan takes of a budget besides the latency.

    Attributes:
        name: ``"parameters"``, ``"multiply-accumulates"``, ``"memory"`` or ``"energy"``.
        value: What the pruned model has.
        at_most: The budget.
        dense: What the dense model has.
        unit: Of the three, ``"bytes"`` or ``"mJ"``; empty for what is only counted.
    """

    name: str
    value: float
    at_most: float
    dense: float
    unit: str = ""


@dataclass(frozen=True)
class MetricVerdict:
    """An objective's validation metric before and after, and whether its limit is kept.

    Attributes:
        objective: Its name.
        dense: Metric of the dense model.
        pruned: Metric of the pruned model.
        higher_is_better: Direction of the metric.
        limit: The limit as it was asked for; empty where there is none.
        worst: Worst acceptable value of the metric, or None.
        kept: Whether the pruned model keeps the limit; None where there is none.
    """

    objective: str
    dense: float
    pruned: float
    higher_is_better: bool
    limit: str = ""
    worst: float | None = None
    kept: bool | None = None

    @property
    def asked(self) -> str:
        """``"at least 0.784 (2%)"``; empty without a limit."""
        if self.worst is None:
            return ""
        text = f"at {'least' if self.higher_is_better else 'most'} {self.worst:.4g}"
        return f"{text} ({self.limit})" if self.limit.endswith(("%", "pp")) else text


@dataclass(frozen=True)
class Serves:
    """Which objectives the parts of the dense model serve, where there are several.

    Attributes:
        outputs: By objective the places of the model's outputs that its loss reads.
        groups: By channel group the objectives that need it.
        latency_ms: Sets of objectives, and the predicted dense latency of what serves just these, milliseconds; they add up to
            all of it.
    """

    outputs: Mapping[str, tuple[int, ...]]
    groups: Mapping[str, tuple[str, ...]]
    latency_ms: tuple[tuple[tuple[str, ...], float], ...]


@dataclass(frozen=True)
class PruningRound:
    """One turn of the loop: widths, what was predicted for them, and what the board said.

    Attributes:
        aim_ms: Predicted latency that the allocation had to stay below, milliseconds.
        widths: Group name to units kept, and name of a weight to tiles kept where tiles go.
        predicted_ms: Predicted latency, milliseconds.
        predicted_low_ms: Lower end of the predictor's interval.
        predicted_high_ms: Upper end.
        certificate: How good the widths are.
        measured: What the board said of the cut model, before it was tuned; None where it was not asked or did not answer.
    """

    aim_ms: float
    widths: Mapping[str, int]
    predicted_ms: float
    predicted_low_ms: float
    predicted_high_ms: float
    certificate: Certificate
    measured: LatencyCheck | None = None

    def measured_ms(self, dense_ms: float) -> float:
        """Latency as measured on the scale of a dense latency, milliseconds; infinite where it was not measured."""
        return math.inf if self.measured is None else self.measured.ratio * dense_ms

    def low_ms(self, dense_ms: float) -> float:
        """Lower end of the interval of `measured_ms`."""
        return math.inf if self.measured is None else self.measured.ratio_low * dense_ms

    def high_ms(self, dense_ms: float) -> float:
        """Upper end of the interval of `measured_ms`."""
        return math.inf if self.measured is None else self.measured.ratio_high * dense_ms


@dataclass(frozen=True, kw_only=True)
class Result(Pruned):
    """A pruned model and everything that is known about it: what `edgeprune.loop.pruned.Pruned` has, and the budget.

    Its `module` is the dense one, copied, when `unchanged`; `measured` is of `module` itself where it was tuned and the board was
    still there, else of its round.

    Attributes:
        budget_ms: Latency that was asked for, milliseconds; a share was taken of `dense_ms`, which it is where only other
            costs were bounded.
        dense_ms: Latency of the dense model that the budget refers to, milliseconds.
        dense_measured: Whether `dense_ms` was measured while profiling; it is the predicted one where the latency table does
            not hold the dense network of this model.
        dense_predicted_ms: Predicted latency of the dense model, milliseconds.
        predicted_ms: Predicted latency of `module`, milliseconds.
        measured_ms: `dense_ms` times the ratio to the dense engine, timed interleaved on the board in the end, milliseconds:
            on the scale of the budget and of `predicted_ms`, however fast the board happened to be. None where no board
            measured it: it is *unverified*.
        budget_met: Whether `measured_ms` is within the budget; None where it was not measured, or the latency is not bounded.
        certificate: How good the widths are.
        spent: What the plan takes of budgets besides the latency.
        unchanged: Whether the dense model already meets the budget, so that nothing was cut.
        serves: Which objectives what of the dense model serves; None where there are not several, or it cannot be told.
    """

    budget_ms: float
    dense_ms: float
    dense_measured: bool
    dense_predicted_ms: float
    predicted_ms: float
    measured_ms: float | None
    budget_met: bool | None
    certificate: Certificate
    spent: tuple[Spent, ...] = ()
    unchanged: bool = False
    serves: Serves | None = None
