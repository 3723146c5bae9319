"""What a report shows, as plain data. Every part may be missing; a missing part is left out of the page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Card:
    """One figure at the top of the page.

    Attributes:
        title: What it is, e.g. ``"latency"``.
        value: The figure with its unit, e.g. ``"2.41 ms → 1.19 ms"``.
        detail: One line below it.
        verdict: ``good`` and ``bad`` are colored, ``""`` is neutral.
    """

    title: str
    value: str
    detail: str = ""
    verdict: Literal["good", "bad", ""] = ""


@dataclass(frozen=True)
class Staircase:
    """Latency of one kernel over one of its widths, everything else equal.

    Attributes:
        title: Which kernel.
        x_title: Which width, e.g. ``"output channels"``.
        widths: Measured widths, ascending.
        measured_ms: Median latency at each, milliseconds.
        predicted: (width, milliseconds) of the predictor's curve, when there is one.
        dense: Width in the dense model.
        chosen: Width that was chosen.
        edges: Widths at which profiling found an edge of the stairs: one unit less is a step quicker.
    """

    title: str
    x_title: str
    widths: tuple[int, ...]
    measured_ms: tuple[float, ...]
    predicted: tuple[tuple[int, float], ...] = ()
    dense: int | None = None
    chosen: int | None = None
    edges: tuple[int, ...] = ()


@dataclass(frozen=True)
class Layer:
    """Latency of one layer before and after, milliseconds; None where the layer is not there."""

    name: str
    before_ms: float | None
    after_ms: float | None


@dataclass(frozen=True)
class Prediction:
    """One predicted and measured latency, milliseconds; `low_ms` and `high_ms` bound the prediction where known."""

    name: str
    measured_ms: float
    predicted_ms: float
    low_ms: float | None = None
    high_ms: float | None = None


@dataclass(frozen=True)
class GroupChoice:
    """Width of one channel group before and after."""

    name: str
    size: int
    kept: int


@dataclass(frozen=True)
class Candidate:
    """One row of the comparison.

    Attributes:
        name: ``dense``, ``uniform``, ``pruned``.
        latency_ms: The page's dense latency times `ratio`, milliseconds.
        ratio: Latency as the interleaved ratio to dense.
        accuracy: Value of the task's metric.
        parameters: Number of parameters.
    """

    name: str
    latency_ms: float | None = None
    ratio: float | None = None
    accuracy: float | None = None
    parameters: int | None = None


@dataclass(frozen=True)
class Round:
    """One plan that the closed loop tried.

    Attributes:
        aim_ms: Predicted latency that it had to stay below, milliseconds.
        predicted_ms: Its predicted latency, milliseconds.
        measured_ms: As the board said, on the page's scale, milliseconds; None where it was not measured.
        of_budget: That as a share of the budget.
        taken: Whether it is the plan of this page.
    """

    aim_ms: float
    predicted_ms: float
    measured_ms: float | None = None
    of_budget: float | None = None
    taken: bool = False


@dataclass(frozen=True)
class TaskRow:
    """One task of several.

    Attributes:
        name: Of the objective.
        cells: One text per column of the table.
        asked: What its limit asks for.
        verdict: Whether the limit is kept in the end.
    """

    name: str
    cells: tuple[str, ...]
    asked: str = ""
    verdict: Literal["good", "bad", ""] = ""


@dataclass(frozen=True)
class TaskTable:
    """A row per task, a column per round or step.

    Attributes:
        columns: Their titles.
        rows: The tasks.
        source: What the figures are, in sentences.
    """

    columns: tuple[str, ...]
    rows: tuple[TaskRow, ...]
    source: str


@dataclass(frozen=True)
class ServedGroup:
    """Width of one channel group before and after, and the tasks that need it."""

    name: str
    size: int
    kept: int
    tasks: tuple[str, ...]


@dataclass(frozen=True)
class FrozenGroup:
    """An axis that was left alone, and why."""

    name: str
    size: int | None
    reason: str


@dataclass(frozen=True)
class ReportData:
    """Everything on the page.

    Attributes:
        title: Headline.
        provenance: How the latencies came about: ``measured on ...``, ``emulated ...`` or ``replayed ...``.
        created: When the page was made, for a person.
        cards: Figures at the top.
        board: Name and value of what was probed.
        conditions: Name and value of the conditions of the measurement.
        disturbances: Sentences on what could have disturbed it.
        dense_ms: Dense latency that all milliseconds of latencies as a whole are scaled to, where it is known.
        candidates: Dense, uniform and pruned model.
        metric: What the accuracy column holds.
        rounds: What the closed loop tried, in order.
        tasks: What became of each task on the way, step by step.
        served: Channel groups with the tasks that need them.
        task_latency: Whom how much of the dense latency serves: text and share.
        staircases: Kernels over widths.
        layers: Layers in order of execution.
        layer_source: Where the milliseconds per layer come from.
        kernel_predictions: Kernels, each predicted by a fit that did not see it.
        network_predictions: Whole networks.
        sentinels_ms: What the sentinel took over the profiling run, milliseconds, in order.
        noise: What a second measurement of the same kernels agreed to, one sentence.
        errors: Rows of the predictor's error table: family to column to text.
        groups: Widths chosen.
        frozen: Axes left alone.
        hashes: Name and hash or value of everything that this page rests on.
        notes: Sentences at the end.
    """

    title: str = "edgeprune report"
    provenance: str = ""
    created: str = ""
    cards: tuple[Card, ...] = ()
    board: Mapping[str, str] = field(default_factory=dict)
    conditions: Mapping[str, str] = field(default_factory=dict)
    disturbances: tuple[str, ...] = ()
    dense_ms: float | None = None
    candidates: tuple[Candidate, ...] = ()
    metric: str = "accuracy"
    rounds: tuple[Round, ...] = ()
    tasks: TaskTable | None = None
    served: tuple[ServedGroup, ...] = ()
    task_latency: tuple[tuple[str, float], ...] = ()
    staircases: tuple[Staircase, ...] = ()
    layers: tuple[Layer, ...] = ()
    layer_source: str = ""
    kernel_predictions: tuple[Prediction, ...] = ()
    network_predictions: tuple[Prediction, ...] = ()
    sentinels_ms: tuple[float, ...] = ()
    noise: str = ""
    errors: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    groups: tuple[GroupChoice, ...] = ()
    frozen: tuple[FrozenGroup, ...] = ()
    hashes: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
