"""From measured and predicted times to figures, and from stored cells to tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import spearmanr

Cell = Mapping[str, Any]


def figures(predicted_ms: np.ndarray, measured_ms: np.ndarray) -> dict[str, float]:
    """Relative errors of predictions, in percent, and the rank correlation."""
    errors = predicted_ms / measured_ms - 1
    sizes = np.abs(errors)
    return {
        "within_5": 100 * float(np.mean(sizes <= 0.05)),
        "within_10": 100 * float(np.mean(sizes <= 0.10)),
        "within_20": 100 * float(np.mean(sizes <= 0.20)),
        "mean_error": 100 * float(sizes.mean()),
        "median_error": 100 * float(np.median(sizes)),
        "p95_error": 100 * float(np.quantile(sizes, 0.95)),
        "bias": 100 * float(np.median(errors)),
        "spearman": float(spearmanr(predicted_ms, measured_ms).statistic) if np.ptp(predicted_ms) > 0 else 0.0,
    }


def covered(frame: Any, measured_ms: np.ndarray) -> dict[str, float]:
    """How many measured times lie in their intervals, and how wide these are, in percent."""
    low, high, ms = (frame[name].to_numpy() for name in ("low_ms", "high_ms", "ms"))
    return {
        "coverage": 100 * float(np.mean((low <= measured_ms) & (measured_ms <= high))),
        "width": 100 * float(np.median((high - low) / ms)),
    }


def markdown(cells: Sequence[Cell]) -> str:
    """One row per task, training size and method: mean over seeds, and standard deviation where it says so."""
    lines = [
        "| data | training | method | seeds | within 10 % | spread | worst seed | within 5 % | median error | MAPE | rho "
        "| goal |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for task in dict.fromkeys(cell["task"] for cell in cells):
        of_task = [cell for cell in cells if cell["task"] == task]
        for method in dict.fromkeys(name for cell in of_task for name in cell["methods"]):
            rows = [cell["methods"][method] for cell in of_task if method in cell["methods"]]
            within = np.array([row["within_10"] for row in rows])
            mean = {name: float(np.mean([row[name] for row in rows])) for name in rows[0] if name != "chosen"}
            sizes = sorted({cell["n_train"] for cell in of_task})
            goal = of_task[0].get("goal") if method == "edgeprune" else None
            met = "" if goal is None else f"{goal:g}: {'met' if within.mean() >= goal else 'MISSED'}"
            spread = f"{within.std(ddof=1):.1f}" if len(within) > 1 else "-"
            lines.append(
                f"| {task} | {'-'.join(map(str, sizes))} | {method} | {len(rows)} | {within.mean():.1f} | {spread} | "
                f"{within.min():.1f} | {mean['within_5']:.1f} | {mean['median_error']:.1f} | {mean['mean_error']:.1f} | "
                f"{mean['spearman']:.3f} | {met} |"
            )
    return "\n".join(lines)


def intervals(cells: Sequence[Cell]) -> str:
    """Coverage and width of the 90 % intervals of edgeprune."""
    lines = ["| data | inside the 90 % interval | median full width |", "|---|---|---|"]
    for task in dict.fromkeys(cell["task"] for cell in cells):
        rows = [cell["methods"]["edgeprune"] for cell in cells if cell["task"] == task]
        inside, width = (float(np.mean([row[name] for row in rows])) for name in ("coverage", "width"))
        lines.append(f"| {task} | {inside:.1f} % | {width:.0f} % |")
    return "\n".join(lines)


def transfer_verdict(cells: Sequence[Cell]) -> str:
    """On how many devices transfer is ahead of ridge on one-hot, in points within 10 %."""
    gains: dict[str, list[float]] = {}
    for cell in cells:
        if cell["set"] == "nasbench201":
            methods = cell["methods"]
            gain = methods["edgeprune"]["within_10"] - methods["ridge on one-hot"]["within_10"]
            gains.setdefault(cell["device"], []).append(gain)
    if not gains:
        return ""
    means = {device: float(np.mean(values)) for device, values in gains.items()}
    ahead = sum(value >= 10 for value in means.values())
    lost = min(min(values) for values in gains.values())
    listed = ", ".join(f"{device} {value:+.1f}" for device, value in means.items())
    verdict = "met" if ahead >= 4 and min(means.values()) >= -2 else "MISSED"
    return (
        f"NAS-Bench-201, 20 cells, transfer minus ridge in points within 10 %: {listed}; at least 10 ahead on {ahead} of "
        f"{len(means)} devices (goal 4 of 6, none behind by more than 2: {verdict}), worst single draw {lost:+.1f}."
    )
