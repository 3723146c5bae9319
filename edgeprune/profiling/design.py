"""Which networks to time whole: those after which the calibration knows best what pruning reaches.

Timing a network is an experiment, and which ones to do is an old question with an answer. What the calibration may turn out to
be is known before anything is measured: its terms are those of `edgeprune.latency.calibration`, about as large as its prior
says. So the latency of every network that pruning reaches is uncertain by so much, and timing one takes away from its own
uncertainty and from that of all that are like it. Networks are chosen one by one, each the one that leaves the least variance
over all that can be reached (Bayesian I-optimal design: Chaloner and Verdinelli 1995, "Bayesian Experimental Design: A Review",
section 2; one at a time: Cohn 1996, "Neural Network Exploration Using Optimal Experiment Design").

What a byte of weights costs depends on the operation that reads it and on how long a network takes, so networks of equal cost
must differ in their weights or the one would pass for the other. Drawn widths differ little in that; those that allocators find
differ a lot, since they keep the layers whose channels are cheap, which are the ones of many weights and few pixels. Half of the
candidates are therefore drawn with a lean towards or away from such layers.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgeprune.latency.arrays import Floats
from edgeprune.latency.calibration import PRIOR_SPREADS, TOLERANCE, Totals
from edgeprune.latency.likeness import Skeleton, grouped, skeleton
from edgeprune.profiling.space import ALIGNMENTS, Widths, aligned, draw, group_sizes, price
from edgeprune.spec import SMALLEST_SHARE, Kernel

if TYPE_CHECKING:
    from edgeprune.lowering.kernel_graph import KernelGraph

_UNIFORM = ((0.5, 8), (0.75, 8), (0.35, 8), (0.6, 4), (0.25, 16))
"""Shares of all groups, and what their widths are multiples of: plain candidates besides those that are drawn."""
_LEAN = 0.8
"""Most by which the logarithm of a group's share is moved, up where its channels are cheap and down where they are dear."""
_LEAST_COST = 0.2
"""Of the dense cost: smaller networks tell most about what every network pays, and nothing about what is asked for."""
_SHARED = 0.5
"""How much of the variance of a calibration networks share that are calibrated apart."""
_ALIKE_PRICES, _PRICE_REACH = 0.5, 0.5
"""How much of the variance of the price of a byte all networks share, and how far apart, as a logarithm of their costs, two
networks may be to share most of the rest: the longer one takes, the less of its weights is still in a cache."""


def networks(kernel_graph: KernelGraph, count: int = 12, *, seed: int = 0) -> list[Widths]:
    """Widths of whole networks to measure, the dense one first; any beginning of the list is a good choice of that length.

    Args:
        kernel_graph: The lowered model.
        count: Most networks.
        seed: Of the drawn widths.
    """
    pool = _candidates(kernel_graph, 12 * max(count, 12), seed)
    unknown = _covariance(pool)
    chosen: list[int] = []
    while len(chosen) < min(count, len(pool)):
        left = np.einsum("ij,ij->j", unknown, unknown) / (np.diag(unknown) + TOLERANCE**2)
        left[chosen] = -1.0
        best = int(np.argmax(left)) if chosen else 0
        chosen.append(best)
        told = unknown[:, best]
        unknown = unknown - np.outer(told, told) / (told[best] + TOLERANCE**2)
    return [pool[place].widths for place in chosen]


@dataclass(frozen=True)
class _Network:
    """A network that could be measured.

    Attributes:
        widths: Of its groups.
        totals: What its latency follows from, in `price` instead of milliseconds.
        bones: What pruning leaves of its kernels.
    """

    widths: Widths
    totals: Totals
    bones: Skeleton


def _candidates(kernel_graph: KernelGraph, count: int, seed: int) -> list[_Network]:
    """The dense network, plain ones, and `count` that are drawn; those that run the same kernels are one network to the clock."""
    sizes = group_sizes(kernel_graph)
    plain = [{name: aligned(size, share, multiple) for name, size in sizes.items()} for share, multiple in _UNIFORM]
    drawn = draw(sizes, count // 2, seed=seed + 1)
    leaning = _leaning(sizes, _leans(kernel_graph, sizes), count - count // 2, seed)
    distinct: dict[tuple[str, ...], _Network] = {}
    for widths in [dict(sizes), *plain, *drawn, *leaning]:
        kernels = sorted(kernel_graph.at(widths), key=lambda kernel: kernel.key)
        identity = tuple(kernel.key for kernel in kernels)
        if identity not in distinct:
            distinct[identity] = _Network(widths, _totals(kernels, kernel_graph), skeleton(kernels))
    found = list(distinct.values())
    enough = [one for one in found if one.totals.sum_ms >= _LEAST_COST * found[0].totals.sum_ms]
    return enough if len(enough) >= count // 4 else found


def _totals(kernels: Sequence[Kernel], kernel_graph: KernelGraph) -> Totals:
    return Totals.of(kernels, price(kernels, kernel_graph.isa).tolist())


def _leans(kernel_graph: KernelGraph, sizes: Widths) -> dict[str, float]:
    """Rank of each group, from -1 to 1, by the bytes of weights that go with the cost that its channels save."""
    whole = _totals(kernel_graph.at(sizes), kernel_graph)
    read = sum(whole.weight_bytes.values())
    density = {}
    for name, size in sizes.items():
        half = _totals(kernel_graph.at({**sizes, name: aligned(size, 0.5, 8)}), kernel_graph)
        saved = read - sum(half.weight_bytes.values())
        density[name] = saved / max(whole.sum_ms - half.sum_ms, 1e-6 * whole.sum_ms)
    places = {name: place for place, name in enumerate(sorted(sizes, key=lambda name: (density[name], name)))}
    return {name: 2 * place / max(len(sizes) - 1, 1) - 1 for name, place in places.items()}


def _leaning(sizes: Mapping[str, int], leans: Mapping[str, float], number: int, seed: int) -> list[Widths]:
    """Widths of one common share that leans towards the groups of many weights, or away from them."""
    source = random.Random(f"leaning widths/{seed}")
    vectors = []
    for _ in range(number):
        alignment = source.choices(list(ALIGNMENTS), list(ALIGNMENTS.values()))[0]
        common, lean = source.uniform(SMALLEST_SHARE, 1.0), source.uniform(-_LEAN, _LEAN)
        shares = {name: max(SMALLEST_SHARE, common * math.exp(lean * leans[name])) for name in sizes}
        vectors.append({name: aligned(size, shares[name], alignment) for name, size in sizes.items()})
    return vectors


def _covariance(pool: Sequence[_Network]) -> Floats:
    """What is not known of the networks before one is measured, relative to their costs, shape (networks, networks)."""
    cost = np.array([one.totals.sum_ms for one in pool])
    kernels = np.array([one.totals.kernels for one in pool])
    middle = float(np.median(cost))
    terms = np.column_stack([np.ones(len(pool)), kernels / cost * np.median(cost / kernels), middle / cost])
    terms = terms * PRIOR_SPREADS[:3]
    ops = sorted({op for one in pool for op in one.totals.weight_bytes})
    read = np.array([[one.totals.weight_bytes.get(op, 0.0) for op in ops] for one in pool])
    usual = max(float(np.median(read.sum(axis=1))), 1.0)
    prices = read / cost[:, None] * (middle / usual * PRIOR_SPREADS[3])
    apart = (np.log(cost)[:, None] - np.log(cost)[None, :]) / _PRICE_REACH
    alike = _ALIKE_PRICES + (1 - _ALIKE_PRICES) * np.exp(-(apart**2) / 2)
    shared = np.full((len(pool), len(pool)), _SHARED)
    for model in grouped([one.bones for one in pool]):
        shared[np.ix_(model, model)] = 1.0
    return np.asarray((terms @ terms.T + (prices @ prices.T) * alike) * shared)
