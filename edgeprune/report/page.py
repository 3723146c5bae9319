"""`ReportData` to one HTML file that needs nothing else: no network, no other file."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

from edgeprune.files import write_text
from edgeprune.report import charts
from edgeprune.report.data import ReportData


def render(data: ReportData) -> str:
    """The page as text; plotly's library is inlined once, and only when there is something to draw."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("edgeprune.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["ms"] = _ms
    figures = _figures(data)
    return environment.get_template("report.html.j2").render(
        data=data,
        figures=set(figures),
        figures_json=_script_safe(figures),
        plotly=_plotly_library() if figures else "",
    )


def write(data: ReportData, path: Path) -> Path:
    """Write the page whole or not at all; returns `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, render(data))
    return path


def _figures(data: ReportData) -> dict[str, Any]:
    figures = {f"staircase-{number}": charts.staircase(one) for number, one in enumerate(data.staircases)}
    if data.layers:
        figures["layers"] = charts.layers(data.layers)
    if data.served:
        figures["served"] = charts.served(data.served)
    if data.groups:
        figures["groups"] = charts.groups(data.groups)
    if data.kernel_predictions:
        figures["kernel-predictions"] = charts.predictions(data.kernel_predictions, logarithmic=True)
    if data.network_predictions:
        figures["network-predictions"] = charts.predictions(data.network_predictions, logarithmic=False)
    if data.kernel_predictions or data.network_predictions:
        figures["residuals"] = charts.residuals(data.kernel_predictions, data.network_predictions)
    if data.sentinels_ms:
        figures["drift"] = charts.drift(data.sentinels_ms)
    return figures


def _script_safe(value: Any) -> str:
    """JSON that cannot end the script element that it stands in, whatever names it holds."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _plotly_library() -> str:
    return resources.files("plotly.package_data").joinpath("plotly.min.js").read_text(encoding="utf-8")


def _ms(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:#.3g}" if value < 0.01 else f"{value:.3f}" if value < 100 else f"{value:.0f}"
