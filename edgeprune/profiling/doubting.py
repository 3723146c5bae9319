"""Which kernels a fit on what is measured so far knows least about, for what candidates would spend on them.

A kernel is worth a measurement when candidates run it and spend much time in it (representativeness), when nothing like
it is measured yet (diversity), and where the fit errs on what it had not seen (uncertainty). The three are multiplied,
and after each choice the distances are taken anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgeprune.latency.predictor import Estimate
from edgeprune.profiling import extending, space
from edgeprune.spec import Kernel

if TYPE_CHECKING:
    from edgeprune.latency.predictor import Predictor

NEIGHBORS = 5
"""Measured kernels whose errors tell what to expect nearby."""

LEAST_ERROR = 0.5
"""Share of a family's interval that a kernel has at least, however well its neighbors are predicted."""


def doubtful(reached: space.Reach, predictor: Predictor, count: int) -> list[Kernel]:
    """Kernels that are not measured, the most worth measuring first.

    Args:
        reached: Candidates, other ones than those that what is measured was drawn from.
        predictor: Fitted to what is measured.
        count: Most kernels.
    """
    held, refused = set(predictor.table.kernels), predictor.table.header.get("unsupported", {})
    known = extending.estimates(predictor, reached.kernels())
    shares = _mean_shares(reached, known)
    waiting = [kernel for kernel in shares if kernel not in held and kernel.key not in refused]
    if not waiting:
        return []
    isa = reached.isa
    errors = _expected_errors(waiting, known, predictor, isa)
    worth = np.array([shares[kernel] for kernel in waiting]) * errors
    near = _distances(waiting, predictor.table.kernels, isa)
    points = space.coordinates(waiting, isa)
    ops = np.array([kernel.op for kernel in waiting])
    free = np.ones(len(waiting), dtype=bool)
    chosen: list[Kernel] = []
    while free.any() and len(chosen) < count:
        gain = np.where(free, worth * np.minimum(near, 1.0), -1.0)
        pick = int(np.argmax(gain))
        if gain[pick] <= 0:
            break
        free[pick] = False
        chosen.append(waiting[pick])
        apart = np.sqrt(((points - points[pick]) ** 2).sum(axis=1))
        near = np.where(ops == ops[pick], np.minimum(near, apart), near)
    return chosen


def _mean_shares(reached: space.Reach, known: Mapping[Kernel, Estimate]) -> dict[Kernel, float]:
    """Per kernel the share of a candidate's time that it takes, on average over all candidates."""
    shares: dict[Kernel, float] = {}
    for kernels in reached.candidates:
        times = {kernel: known[kernel].ms * times for kernel, times in kernels.items() if kernel in known}
        total = sum(times.values())
        for kernel, ms in times.items():
            shares[kernel] = shares.get(kernel, 0.0) + ms / total / len(reached.candidates)
    return dict(sorted(shares.items(), key=lambda item: item[0].key))


def _expected_errors(
    waiting: Sequence[Kernel], known: Mapping[Kernel, Estimate], predictor: Predictor, isa: Sequence[str]
) -> NDArray[np.float64]:
    """What a prediction may be off, in log space, shape (kernels,): the family's interval, more where neighbors err more."""
    missed = {held.name: abs(np.log(held.predicted_ms / held.measured_ms)) for held in predictor.held_out()[0]}
    errors = np.array([known[kernel].half_width for kernel in waiting])
    for family in sorted({kernel.family for kernel in waiting}):
        places = [place for place, kernel in enumerate(waiting) if kernel.family == family]
        seen = [kernel for kernel in predictor.table.kernels if kernel.family == family and kernel.key in missed]
        if not seen:
            continue
        misses = np.array([missed[kernel.key] for kernel in seen])
        apart = _apart([waiting[place] for place in places], seen, isa)
        nearest = np.argsort(apart, axis=1, kind="stable")[:, :NEIGHBORS]
        local = misses[nearest].mean(axis=1) / max(float(misses.mean()), 1e-12)
        errors[places] *= np.maximum(local, LEAST_ERROR)
    return errors


def _distances(waiting: Sequence[Kernel], held: Sequence[Kernel], isa: Sequence[str]) -> NDArray[np.float64]:
    """Distance of each kernel from the nearest measured one of its operation; infinite without one. Shape (kernels,)."""
    found = np.full(len(waiting), np.inf)
    for op in sorted({kernel.op for kernel in waiting}):
        places = [place for place, kernel in enumerate(waiting) if kernel.op == op]
        known = [kernel for kernel in held if kernel.op == op]
        if known:
            found[places] = _apart([waiting[place] for place in places], known, isa).min(axis=1)
    return found


def _apart(kernels: Sequence[Kernel], others: Sequence[Kernel], isa: Sequence[str]) -> NDArray[np.float64]:
    """Distances, shape (kernels, others)."""
    from scipy.spatial.distance import cdist

    return np.asarray(cdist(space.coordinates(kernels, isa), space.coordinates(others, isa)))
