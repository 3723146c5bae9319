"""Which networks are timed whole, on the real lowering of a small residual network, and what a calibration learns from them."""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from edgeprune.graph.tracing import trace
from edgeprune.latency.calibration import Calibration, Totals, fit_calibration
from edgeprune.lowering.kernel_graph import KernelGraph, lower
from edgeprune.profiling import design, space

Widths = dict[str, int]


class Pyramid(nn.Module):
    """A wide start of many pixels and a residual end of many weights."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.early = nn.Conv2d(32, 48, 3, padding=1)
        self.down = nn.Conv2d(48, 96, 3, stride=2, padding=1)
        self.first = nn.Conv2d(96, 128, 3, padding=1)
        self.second = nn.Conv2d(128, 96, 3, padding=1)
        self.last = nn.Conv2d(96, 160, 3, stride=2, padding=1)
        self.head = nn.Linear(160, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.down(torch.relu(self.early(torch.relu(self.stem(x))))))
        x = torch.relu(x + self.second(torch.relu(self.first(x))))
        return self.head(torch.relu(self.last(x)).mean((2, 3)))


@pytest.fixture(scope="module")
def kernel_graph() -> KernelGraph:
    torch.manual_seed(0)
    model = Pyramid().eval()
    graph = trace(model, torch.zeros(1, 3, 32, 32))
    return lower(graph, model=model, device={"architecture": "x86_64", "isa": ("avx2", "avx512f")})


def totals(kernel_graph: KernelGraph, widths: Widths) -> Totals:
    kernels = kernel_graph.at(widths)
    return Totals.of(kernels, space.price(kernels, kernel_graph.isa).tolist())


def density(of: Totals) -> float:
    return sum(of.weight_bytes.values()) / of.sum_ms


def test_networks_begin_with_the_dense_one_and_spread_over_costs_and_weights(kernel_graph: KernelGraph) -> None:
    found = design.networks(kernel_graph, 10, seed=0)
    assert found == design.networks(kernel_graph, 10, seed=0)
    assert found[0] == space.group_sizes(kernel_graph)
    told = [totals(kernel_graph, widths) for widths in found]
    shares = sorted(one.sum_ms / told[0].sum_ms for one in told)
    assert shares[0] < 0.4
    assert max(upper / lower for lower, upper in pairwise(shares)) < 1.8
    assert min(map(density, told)) < 0.75 * density(told[0])
    assert max(map(density, told)) > 1.2 * density(told[0])
    assert len({tuple(sorted(kernel.key for kernel in kernel_graph.at(widths))) for widths in found}) == 10


@pytest.mark.parametrize("count", [4, 6, 10])
def test_networks_read_their_weights_in_more_than_one_way(kernel_graph: KernelGraph, count: int) -> None:
    """A price that none of them pays could not be learned: odd widths leave the blocked layout."""
    read = [
        Counter(totals(kernel_graph, widths).weight_bytes) for widths in design.networks(kernel_graph, count, seed=0)
    ]
    others = [sum(found.values()) - sum(found.get(op, 0.0) for op in read[0]) for found in read]
    assert max(other / sum(found.values()) for other, found in zip(others, read, strict=True)) > 0.4


def test_calibrations_learn_more_from_them_than_from_any_others(kernel_graph: KernelGraph) -> None:
    """Of plans that keep the layers of many weights, the median over machines whose weights cost this or that."""
    dice = np.random.default_rng(0)
    sizes = space.group_sizes(kernel_graph)
    chosen = [totals(kernel_graph, widths) for widths in design.networks(kernel_graph, 8, seed=0)]
    drawn = [totals(kernel_graph, widths) for widths in space.draw(sizes, 200, seed=9)]
    asked = [
        totals(kernel_graph, {"stem": stem, "early": early, "first": first})
        for stem, early, first in ((16, 16, 128), (16, 32, 128), (16, 16, 96), (32, 16, 112), (16, 16, 64))
    ]
    assert min(map(density, asked)) > 1.1 * density(chosen[0])
    ops = sorted({op for one in drawn for op in one.weight_bytes})
    ours, chance = [], []
    for index in range(30):
        prices = {op: float(dice.uniform(0, 3e-7)) for op in ops}
        machine = Calibration(float(dice.uniform(0.9, 1.1)), float(dice.uniform(0, 1e-3)), 0.0, prices)
        for networks, errors in ((chosen, ours), (random.Random(index).sample(drawn, 8), chance)):
            measured = np.array([machine.ms(one) for one in networks]) * (1 + 0.01 * dice.standard_normal(8))
            learned = fit_calibration(networks, measured, 1e-3)
            errors += [abs(learned.ms(one) / machine.ms(one) - 1) for one in asked]
    assert np.median(ours) < 0.7 * np.median(chance)
