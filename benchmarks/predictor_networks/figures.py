"""From stored rows to the figures that are published."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

Floats = NDArray[np.float64]
Row = Mapping[str, Any]

_LEVEL = 0.9
_REJECTED = 0.01
_GOALS = ((0.05, 0.95), (0.10, 0.99))
"""Relative error, and share of networks that shall be within it..."""
_OF_CEILING = 0.95
"""...or this much of the share that a second measurement reaches, where that is lower."""
_WIDEST = 0.12
"""Median full width of the intervals at most."""
_MOST_S, _SECOND_SHARE, SECOND = 600.0, 0.4, "-second"
"""Longest that profiling a family may take, seconds; of that, what a second network may; the end of the name of such a case."""


def errors(row: Row, rule: Callable[[Row, Row], float], turn: str = "first") -> Floats:
    """Predicted over measured minus 1 of every network of a family, by a rule from (family, network) to milliseconds."""
    measured = np.array([network[turn]["ratio"] * row["dense_ms"] for network in row["networks"]])
    return np.array([rule(row, network) for network in row["networks"]]) / measured - 1


def _ours(row: Row, network: Row) -> float:
    return float(network["ms"])


def _second_measurement(row: Row, network: Row) -> float:
    return float(network["second"]["ratio"] * row["dense_ms"])


def _plain_sum(row: Row, network: Row) -> float:
    return float(network["sum_ms"])


def _constant(row: Row, network: Row) -> float:
    return float(np.exp(np.mean(np.log([entry["measured_ms"] for entry in row["calibration"]]))))


def _log_flops(row: Row, network: Row) -> float:
    macs = np.log([entry["macs"] for entry in row["calibration"]])
    slope, offset = np.polyfit(macs, np.log([entry["measured_ms"] for entry in row["calibration"]]), 1)
    return float(np.exp(offset + slope * np.log(network["macs"])))


RULES: dict[str, Callable[[Row, Row], float]] = {
    "edgeprune": _ours,
    "a second measurement": _second_measurement,
    "sum of kernels, uncalibrated": _plain_sum,
    "log-FLOPs": _log_flops,
    "a constant": _constant,
}
"""What is compared; the simple rules are fitted to the same whole networks that calibrate ours."""


def markdown(rows: Sequence[Row]) -> str:
    """One table per rule, the intervals, and whether what was aimed at is met."""
    lines = [
        "| rule | family | networks | median error | within 5 % | within 10 % | worst |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, rule in RULES.items():
        pooled = []
        for row in rows:
            found = np.abs(errors(row, rule))
            pooled.append(found)
            lines.append(_line(name, row["family"], found))
        if len(rows) > 1:
            lines.append(_line(name, "**all**", np.concatenate(pooled)))
    lines += [
        "",
        "| family | inside the 90 % interval | not rejected at 1 % | median full width |",
        "|---|---|---|---|",
    ]
    inside = [_inside(row) for row in rows]
    for row, hits in zip(rows, inside, strict=True):
        lines.append(_interval_line(row["family"], hits, _widths(row)))
    if len(rows) > 1:
        lines.append(_interval_line("**all**", np.concatenate(inside), np.concatenate([_widths(row) for row in rows])))
    return "\n".join([*lines, "", *_verdicts(rows)])


def _verdicts(rows: Sequence[Row]) -> list[str]:
    """What was aimed at, over all families together, and whether it is met."""
    ours, again = (np.abs(np.concatenate([errors(row, RULES[name]) for row in rows])) for name in list(RULES)[:2])
    found = []
    for limit, goal in _GOALS:
        share, ceiling = (float((sizes <= limit).mean()) for sizes in (ours, again))
        least = min(goal, _OF_CEILING * ceiling)
        found.append(
            f"within {limit:.0%}: {share:.1%}; goal {least:.1%}, the lower of {goal:.0%} and {_OF_CEILING} x {ceiling:.1%} "
            f"(a second measurement): {_met(share >= least)}"
        )
    inside = [_inside(row) for row in rows]
    rejected = [row["family"] for row, hits in zip(rows, inside, strict=True) if not _kept(hits)]
    rejected += [] if _kept(np.concatenate(inside)) else ["all"]
    width = float(np.median(np.concatenate([_widths(row) for row in rows])))
    found.append(
        f"intervals: rejected of {', '.join(rejected) or 'none'}: {_met(not rejected)}; median full width {width:.1%}, goal at "
        f"most {_WIDEST:.0%}: {_met(width <= _WIDEST)}"
    )
    found += _profiling(rows)
    return [f"- {line}" for line in found]


def _profiling(rows: Sequence[Row]) -> list[str]:
    """How long profiling took, set-up and fits included, where that is known: not of tables that were kept from before."""
    found = []
    for second in (False, True):
        taken = [
            row["profiled_s"] for row in rows if row["family"].endswith(SECOND) == second and row.get("profiled_s")
        ]
        most = _MOST_S * (_SECOND_SHARE if second else 1)
        if taken:
            found.append(
                f"profiling took {min(taken):.0f} to {max(taken):.0f} s, set-up and fits included; goal at most {most:.0f} s: "
                f"{_met(max(taken) <= most)}"
            )
    return found


def _met(met: bool) -> str:
    return "met" if met else "MISSED"


def _kept(hits: NDArray[np.bool_]) -> bool:
    return bool(binomtest(int(hits.sum()), len(hits), _LEVEL).pvalue >= _REJECTED)


def _line(rule: str, family: str, found: Floats) -> str:
    shares = [f"{float((found <= limit).mean()):.1%}" for limit in (0.05, 0.10)]
    return f"| {rule} | {family} | {len(found)} | {np.median(found):.1%} | {' | '.join(shares)} | {found.max():.1%} |"


def _inside(row: Row) -> NDArray[np.bool_]:
    measured = np.array([network["first"]["ratio"] * row["dense_ms"] for network in row["networks"]])
    low = np.array([network["low_ms"] for network in row["networks"]])
    high = np.array([network["high_ms"] for network in row["networks"]])
    return np.asarray((low <= measured) & (measured <= high))


def _widths(row: Row) -> Floats:
    return np.array([(network["high_ms"] - network["low_ms"]) / network["ms"] for network in row["networks"]])


def _interval_line(family: str, hits: NDArray[np.bool_], widths: Floats) -> str:
    return f"| {family} | {hits.mean():.1%} | {'yes' if _kept(hits) else 'NO'} | {np.median(widths):.1%} |"
