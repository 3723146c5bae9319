"""Rows that count as repeats of one kernel, and are not: a column that tells them apart was not mapped."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from edgeprune.spec import Kernel

WIDE = 0.2
"""Share by which times of one kernel may differ before it is asked why."""

FAR = 4.0
"""So many times what other kernels differ by is far more than they do."""

FEW_VALUES = 8
"""A column with more different values than this names single rows, rather than kinds of them."""

_NAMED = 4


class Repeat(NamedTuple):
    """One row of a kernel.

    Attributes:
        ms: Its time, milliseconds.
        line: Of the file.
        cells: By column.
    """

    ms: float
    line: int
    cells: Mapping[str, str]


def mixed(repeats: Mapping[Kernel, Sequence[Repeat]], unmapped: Sequence[str]) -> str | None:
    """What makes it likely that rows of different kernels were taken for one, in a sentence; None where nothing does.

    Args:
        repeats: Kernel to its rows.
        unmapped: Columns that nothing was read from.
    """
    ends = {kernel: _ends(rows) for kernel, rows in repeats.items() if len(rows) > 1}
    differences = {kernel: last.ms / first.ms - 1 for kernel, (first, last) in ends.items()}
    usual = [share for share in differences.values() if share <= WIDE]
    limit = max(WIDE, FAR * statistics.median(usual)) if usual else WIDE
    wide = [kernel for kernel, share in differences.items() if share > limit]
    if not wide:
        return None
    worst = max(wide, key=differences.__getitem__)
    share = differences[worst]
    text = f"{1 + share:.1f} times" if share >= 1 else f"{100 * share:.0f} %"
    lines = " and ".join(str(row.line) for row in sorted(ends[worst], key=lambda row: row.line))
    count = "1 kernel has" if len(wide) == 1 else f"{len(wide)} kernels have"
    suspects = _suspects([repeats[kernel] for kernel in wide], unmapped)
    return (
        f"{count} times that differ by up to {text} (lines {lines}), and count as repeats of one measurement: a column that "
        f"tells them apart may not be mapped{f' ({suspects})' if suspects else ''}; map it (columns, --column) or keep one of "
        "its values (where, --where)"
    )


def _ends(rows: Sequence[Repeat]) -> tuple[Repeat, Repeat]:
    """The quickest and the slowest, of many those that a tenth is beyond: a single disturbed repeat is no other kernel."""
    ordered = sorted(rows, key=lambda row: row.ms)
    beyond = len(ordered) // 10
    return ordered[beyond], ordered[-1 - beyond]


def _suspects(kernels: Sequence[Sequence[Repeat]], unmapped: Sequence[str]) -> str:
    """Columns of few values that differ within most of these kernels, with their values; where there are some that explain
    most of the differences, only these."""
    found, explaining = [], []
    for column in unmapped:
        values = [{row.cells[column].strip() for row in rows} for rows in kernels]
        every = sorted(set().union(*values))
        if len(every) > FEW_VALUES or 2 * sum(len(one) > 1 for one in values) < len(kernels):
            continue
        found.append(f"{column}: {', '.join(value or 'empty' for value in every[:_NAMED])}" + _more(every))
        if statistics.median(_left(rows, column) for rows in kernels) < 0.5:
            explaining.append(found[-1])
    named = explaining or found
    return "; ".join(named[:_NAMED]) + _more(named)


def _left(rows: Sequence[Repeat], column: str) -> float:
    """Share of the difference between a kernel's rows that is left between those of one value in a column."""
    groups: dict[str, list[Repeat]] = {}
    for row in rows:
        groups.setdefault(row.cells[column].strip(), []).append(row)
    within = [last.ms / first.ms - 1 for first, last in map(_ends, groups.values())]
    first, last = _ends(rows)
    return max(within) / (last.ms / first.ms - 1)


def _more(items: Sequence[str]) -> str:
    return ", ..." if len(items) > _NAMED else ""
