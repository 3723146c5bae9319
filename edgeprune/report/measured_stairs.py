"""Staircases that a latency table shows by itself: kernels that are alike in everything but one channel count.

`collecting.staircases` needs the model, and sweeps the widths of its channel groups; here the table and its predictor are all
that there is, as after `edgeprune fit` or with a table of somebody else's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from edgeprune.latency.features import channels_of
from edgeprune.profiling.steps import differs
from edgeprune.report.collecting import MOST_STAIRCASES, describe_kernel
from edgeprune.report.data import Staircase

if TYPE_CHECKING:
    from edgeprune.latency.predictor import Predictor
    from edgeprune.spec import Kernel

LEAST_WIDTHS = 4
"""Measured widths that make a staircase."""


class _Axis(NamedTuple):
    """A channel count that may vary.

    Attributes:
        title: What it is.
        read: Whether it is the channels that are read.
        made: Whether it is those that are made.
    """

    title: str
    read: bool
    made: bool


_MADE, _READ, _BOTH = (
    _Axis("output channels", False, True),
    _Axis("input channels", True, False),
    _Axis("channels", True, True),
)


def measured_staircases(predictor: Predictor, *, most: int = MOST_STAIRCASES) -> tuple[Staircase, ...]:
    """Convolutions and matrix products of a table over one channel count, with the predictor's curve between them.

    An edge is marked where two measured widths with none between them differ by more than `steps.STEP`.

    Args:
        predictor: Fitted to the table.
        most: How many to return: those along which most time can be saved.
    """
    lines: dict[tuple[_Axis, Kernel], dict[int, Kernel]] = {}
    for kernel in predictor.table.kernels:
        for axis, width in _widths(kernel):
            lines.setdefault((axis, _at(kernel, axis, 1)), {})[width] = kernel
    timed = predictor.table.measurements

    def order(line: tuple[_Axis, dict[int, Kernel]]) -> tuple[float, str, str]:
        times = [timed[kernel.key].median_ms for kernel in line[1].values()]
        return min(times) - max(times), line[0].title, line[1][max(line[1])].key

    ranked = sorted(((axis, found) for (axis, _), found in lines.items() if len(found) >= LEAST_WIDTHS), key=order)
    return tuple(_staircase(predictor, axis, dict(sorted(found.items()))) for axis, found in ranked[:most])


def _staircase(predictor: Predictor, axis: _Axis, measured: dict[int, Kernel]) -> Staircase:
    times = {width: predictor.table.measurements[kernel.key].median_ms for width, kernel in measured.items()}
    # Blocked kernels have whole blocks of channels: no other width is theirs.
    step = math.gcd(*measured)
    widest = measured[max(measured)]
    swept = range(min(measured), max(measured) + 1, step)
    curve = predictor.kernel_ms([_at(widest, axis, width) for width in swept]).tolist()
    return Staircase(
        title=f"{describe_kernel(widest)} · {widest.op}",
        x_title=axis.title,
        widths=tuple(measured),
        measured_ms=tuple(times[width] for width in measured),
        predicted=tuple(zip(swept, curve, strict=True)),
        edges=tuple(
            upper
            for lower, upper in pairwise(measured)
            if upper - lower == step and differs(times[upper] / times[lower])
        ),
    )


def _widths(kernel: Kernel) -> Iterator[tuple[_Axis, int]]:
    """Channel counts of a kernel that may vary alone, and what they are."""
    if kernel.family not in ("conv", "gemm") or not kernel.inputs:
        return
    read, made = (channels_of(kernel.family, shape) for shape in (kernel.inputs[0], kernel.output))
    groups = kernel.attribute("groups", 1)
    if groups != 1:
        if groups == read == made and _at(kernel, _BOTH, made) == kernel:
            yield _BOTH, made
        return
    # Where the axis is not where it is looked for, the kernel would not come back as it is.
    for axis, width in ((_MADE, made), (_READ, read)):
        if _at(kernel, axis, width) == kernel:
            yield axis, width


def _at(kernel: Kernel, axis: _Axis, width: int) -> Kernel:
    """The kernel with another channel count; what it adds has as many channels as what it makes."""
    first, *rest = kernel.inputs
    residual = bool(kernel.attribute("residual", False))
    found = replace(
        kernel,
        inputs=(
            _with_channels(kernel, first, width) if axis.read else first,
            *(_with_channels(kernel, shape, width) if axis.made and residual else shape for shape in rest),
        ),
        output=_with_channels(kernel, kernel.output, width) if axis.made else kernel.output,
    )
    if not (axis.read and axis.made):
        return found
    return replace(
        found, attributes=tuple((name, width if name == "groups" else value) for name, value in kernel.attributes)
    )


def _with_channels(kernel: Kernel, shape: tuple[int, ...], width: int) -> tuple[int, ...]:
    behind_batch = kernel.family == "conv"
    if len(shape) < 2:
        return shape
    return (shape[0], width, *shape[2:]) if behind_batch else (*shape[:-1], width)
