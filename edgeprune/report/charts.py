"""Report data to plotly figures, as plain JSON-ready dicts.

Colors are names such as ``"@after"``; the page puts the color of the reader's light or dark theme in their place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import Any

from edgeprune.report.data import GroupChoice, Layer, Prediction, ServedGroup, Staircase

Figure = dict[str, Any]

_MAX_BARS = 40
_LABEL_CHARS = 30
_BAR_PX = 30
_FRAME_PX = 110
_TOLERANCE = 0.10
_DRIFT = 0.03
_LOGARITHMIC: Figure = {"type": "log"}


def staircase(data: Staircase) -> Figure:
    """Measured points, the predictor's curve, and lines at the dense and the chosen width."""
    traces: list[Figure] = []
    if data.predicted:
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": "predicted",
                "x": [width for width, _ in data.predicted],
                "y": [ms for _, ms in data.predicted],
                "line": {"color": "@muted", "shape": "hv", "width": 1.5},
                "hovertemplate": "%{x}: %{y:.4g} ms predicted<extra></extra>",
            }
        )
    traces.append(
        {
            "type": "scatter",
            "mode": "markers" if data.predicted else "lines+markers",
            "name": "measured",
            "x": list(data.widths),
            "y": list(data.measured_ms),
            "marker": {"color": "@after", "size": 7},
            "line": {"color": "@after", "shape": "hv", "width": 1.5},
            "hovertemplate": "%{x}: %{y:.4g} ms measured<extra></extra>",
        }
    )
    if data.edges:
        heights = dict(zip(data.widths, data.measured_ms, strict=True)) | dict(data.predicted)
        at = [width for width in data.edges if width in heights]
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": "edge found",
                "x": at,
                "y": [heights[width] for width in at],
                "marker": {"color": "@accent", "size": 11, "symbol": "triangle-left-open", "line": {"width": 2}},
                "hovertemplate": "%{x}: one unit less is a step quicker<extra></extra>",
            }
        )
    marks = [(data.dense, "dense", "@before"), (data.chosen, "chosen", "@accent")]
    if data.dense is not None and data.dense == data.chosen:
        marks = [(data.chosen, "chosen = dense", "@accent")]
    present = [(width, text, color) for width, text, color in marks if width is not None]
    return _figure(
        traces,
        height=300,
        x={"title": {"text": data.x_title}},
        y={"title": {"text": "ms"}, "rangemode": "tozero"},
        legend=bool(data.predicted or data.edges),
        legend_below=True,  # the widths' labels stand above the plot
        shapes=[
            {
                "type": "line",
                "xref": "x",
                "yref": "paper",
                "x0": width,
                "x1": width,
                "y0": 0,
                "y1": 1,
                "line": {"color": color, "width": 2, "dash": "dot"},
            }
            for width, _, color in present
        ],
        annotations=[
            {
                "x": width,
                "y": 1,
                "xref": "x",
                "yref": "paper",
                "yanchor": "bottom",
                "showarrow": False,
                "text": f"{text} {width}",
                "font": {"color": color, "size": 12},
            }
            for width, text, color in present
        ],
    )


def layers(rows: Sequence[Layer]) -> Figure:
    """Milliseconds per layer before and after, in order of execution; the smallest are summed when there are many."""
    shown = list(rows)
    if len(shown) > _MAX_BARS:
        by_cost = sorted(shown, key=lambda row: max(row.before_ms or 0.0, row.after_ms or 0.0), reverse=True)
        kept = {id(row) for row in by_cost[: _MAX_BARS - 1]}
        rest = [row for row in shown if id(row) not in kept]
        summed = Layer(
            f"{len(rest)} smaller layers",
            math.fsum(row.before_ms or 0.0 for row in rest),
            math.fsum(row.after_ms or 0.0 for row in rest),
        )
        shown = [*(row for row in shown if id(row) in kept), summed]
    labels = _unique([_shortened(row.name) for row in shown])
    traces = [
        {
            "type": "bar",
            "orientation": "h",
            "name": name,
            "y": labels,
            "x": [getattr(row, attribute) for row in shown],
            "customdata": [row.name for row in shown],
            "marker": {"color": color},
            "hovertemplate": "%{customdata}: %{x:.4g} ms " + name + "<extra></extra>",
        }
        for name, attribute, color in (("before", "before_ms", "@before"), ("after", "after_ms", "@after"))
    ]
    return _figure(
        traces,
        height=_FRAME_PX + _BAR_PX * len(shown),
        x={"title": {"text": "ms"}, "rangemode": "tozero"},
        y={"autorange": "reversed", "automargin": True, "tickfont": {"size": 11}},
        barmode="group",
        bargap=0.25,
        legend=True,
    )


def groups(rows: Sequence[GroupChoice]) -> Figure:
    """Units kept over units there were, per channel group."""
    labels = _unique([_shortened(row.name) for row in rows])
    common: Figure = {"type": "bar", "orientation": "h", "y": labels, "customdata": [row.name for row in rows]}
    traces = [
        {
            **common,
            "name": "kept",
            "x": [row.kept for row in rows],
            "marker": {"color": "@after"},
            "text": [f"{row.kept} of {row.size}" for row in rows],
            "textposition": "auto",
            "hovertemplate": "%{customdata}: %{x} kept<extra></extra>",
        },
        {
            **common,
            "name": "removed",
            "x": [row.size - row.kept for row in rows],
            "marker": {"color": "@before", "opacity": 0.45},
            "hovertemplate": "%{customdata}: %{x} removed<extra></extra>",
        },
    ]
    return _figure(
        traces,
        height=_FRAME_PX + _BAR_PX * len(rows),
        x={"title": {"text": "units"}},
        y={"autorange": "reversed", "automargin": True, "tickfont": {"size": 11}},
        barmode="stack",
        bargap=0.3,
        legend=True,
    )


def served(rows: Sequence[ServedGroup]) -> Figure:
    """A square where a task needs a channel group, the darker the more of it is kept."""
    names = list(dict.fromkeys(name for row in rows for name in row.tasks))
    labels = _unique([_shortened(row.name) for row in rows])
    there = [(label, row, name) for label, row in zip(labels, rows, strict=True) for name in row.tasks]
    traces: list[Figure] = [
        {
            "type": "scatter",
            "mode": "markers+text",
            "x": [name for _, _, name in there],
            "y": [label for label, _, _ in there],
            "text": [f"{row.kept} of {row.size}" for _, row, _ in there],
            "textposition": "middle right",
            "customdata": [row.name for _, row, _ in there],
            "marker": {
                "symbol": "square",
                "size": 18,
                "color": "@after",
                "opacity": [0.15 + 0.85 * row.kept / row.size for _, row, _ in there],
            },
            "hovertemplate": "%{customdata} serves %{x}: %{text} kept<extra></extra>",
        }
    ]
    return _figure(
        traces,
        height=_FRAME_PX + _BAR_PX * len(rows),
        # Rows and columns that nothing stands in are there all the same.
        x={"categoryorder": "array", "categoryarray": names, "side": "top", "range": [-0.5, len(names) - 0.2]},
        y={
            "categoryorder": "array",
            "categoryarray": labels,
            "range": [len(labels) - 0.5, -0.5],
            "automargin": True,
            "tickfont": {"size": 11},
        },
        legend=False,
    )


def predictions(rows: Sequence[Prediction], *, logarithmic: bool) -> Figure:
    """Predicted over measured latency, with the diagonal and a band of 10 %."""
    low = min(min(row.measured_ms, row.predicted_ms) for row in rows) * 0.9
    high = max(max(row.measured_ms, row.predicted_ms) for row in rows) * 1.1
    line = {"type": "scatter", "mode": "lines", "hoverinfo": "skip", "x": [low, high], "showlegend": False}
    traces: list[Figure] = [
        {**line, "y": [low * (1 - _TOLERANCE), high * (1 - _TOLERANCE)], "line": {"width": 0}},
        {
            **line,
            "y": [low * (1 + _TOLERANCE), high * (1 + _TOLERANCE)],
            "line": {"width": 0},
            "fill": "tonexty",
            "fillcolor": "@band",
            "name": "within 10 %",
            "showlegend": True,
        },
        {**line, "y": [low, high], "line": {"color": "@muted", "width": 1, "dash": "dot"}},
    ]
    points: Figure = {
        "type": "scatter",
        "mode": "markers",
        "name": "predicted",
        "x": [row.measured_ms for row in rows],
        "y": [row.predicted_ms for row in rows],
        "text": [row.name for row in rows],
        "marker": {"color": "@after", "size": 7, "opacity": 0.75},
        "hovertemplate": "%{text}<br>measured %{x:.4g} ms<br>predicted %{y:.4g} ms<extra></extra>",
    }
    if any(row.low_ms is not None and row.high_ms is not None for row in rows):
        points["error_y"] = {
            "type": "data",
            "symmetric": False,
            "array": [(row.high_ms or row.predicted_ms) - row.predicted_ms for row in rows],
            "arrayminus": [row.predicted_ms - (row.low_ms or row.predicted_ms) for row in rows],
            "color": "@muted",
            "thickness": 1,
        }
    traces.append(points)
    axis = _LOGARITHMIC if logarithmic else {}
    return _figure(
        traces,
        height=380,
        x={"title": {"text": "measured, ms"}, **axis},
        y={"title": {"text": "predicted, ms"}, **axis},
        legend=True,
    )


def residuals(kernels: Sequence[Prediction], networks: Sequence[Prediction]) -> Figure:
    """Relative error of each prediction over what was measured; above zero it was too slow."""
    traces: list[Figure] = [
        {
            "type": "scatter",
            "mode": "markers",
            "name": name,
            "x": [row.measured_ms for row in rows],
            "y": [100 * (row.predicted_ms / row.measured_ms - 1) for row in rows],
            "text": [row.name for row in rows],
            "marker": {"color": color, "size": size, "opacity": 0.75},
            "hovertemplate": "%{text}<br>measured %{x:.4g} ms<br>error %{y:.1f} %<extra></extra>",
        }
        for name, rows, color, size in (("kernels", kernels, "@after", 6), ("networks", networks, "@accent", 8))
        if rows
    ]
    return _figure(
        traces,
        height=320,
        x={"title": {"text": "measured, ms"}, **_LOGARITHMIC},
        y={"title": {"text": "predicted over measured, % off"}},
        legend=True,
        shapes=_band(100 * _TOLERANCE),
    )


def drift(sentinels_ms: Sequence[float]) -> Figure:
    """The sentinel over a run, against its median."""
    usual = median(sentinels_ms)
    return _figure(
        [
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": "sentinel",
                "x": list(range(1, len(sentinels_ms) + 1)),
                "y": [100 * (value / usual - 1) for value in sentinels_ms],
                "customdata": list(sentinels_ms),
                "marker": {"color": "@after", "size": 5},
                "line": {"color": "@after", "width": 1},
                "hovertemplate": "no. %{x}: %{customdata:.4g} ms, %{y:+.1f} %<extra></extra>",
            }
        ],
        height=260,
        x={"title": {"text": "sentinel, in the order of measuring"}},
        y={"title": {"text": "from its median, %"}},
        legend=False,
        shapes=_band(100 * _DRIFT),
    )


def _band(percent: float) -> list[Figure]:
    box = {"type": "rect", "xref": "paper", "yref": "y", "x0": 0, "x1": 1, "y0": -percent, "y1": percent}
    return [{**box, "fillcolor": "@band", "line": {"width": 0}, "layer": "below"}]


def _figure(
    traces: list[Figure],
    *,
    height: int,
    x: Figure,
    y: Figure,
    legend: bool,
    legend_below: bool = False,
    **layout: Any,
) -> Figure:
    axis = {"gridcolor": "@grid", "zerolinecolor": "@grid", "linecolor": "@grid"}
    return {
        "data": traces,
        "layout": {
            "height": height,
            "margin": {"l": 56, "r": 16, "t": 32, "b": 48},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "font": {"color": "@text", "family": "system-ui, sans-serif", "size": 12},
            "hoverlabel": {"namelength": -1},
            "showlegend": legend,
            "legend": {
                "orientation": "h",
                "x": 0,
                "y": -0.28 if legend_below else 1,
                "yanchor": "top" if legend_below else "bottom",
            },
            "xaxis": {**axis, **x},
            "yaxis": {**axis, **y},
            **layout,
        },
    }


def _shortened(name: str) -> str:
    return name if len(name) <= _LABEL_CHARS else "…" + name[-(_LABEL_CHARS - 1) :]


def _unique(labels: Sequence[str]) -> list[str]:
    """Plotly would draw equal categories as one: tell them apart by invisible characters."""
    seen: dict[str, int] = {}
    unique = []
    for label in labels:
        count = seen[label] = seen.get(label, -1) + 1
        unique.append(label + "\u200b" * count)
    return unique
