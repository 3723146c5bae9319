"""Which candidates are drawn and which kernels are chosen, on the real lowering of a small residual network."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from edgeprune.graph.tracing import trace
from edgeprune.latency.features import Machine, features
from edgeprune.lowering.kernel_graph import KernelGraph, lower
from edgeprune.profiling import space

SIZES = {"a": 64, "b": 24, "c": 10, "d": 1, "e": 300}


@given(size=st.integers(1, 3000))
def test_candidate_widths_reach_from_an_eighth_to_the_whole(size: int) -> None:
    found = space.candidates(size)
    assert list(found) == sorted(set(found))
    assert found[-1] == size
    assert found[0] >= 1
    assert size / 9 - 1 <= found[0] <= size / 8 + 1
    assert len(found) <= 48
    if size >= 64:
        assert any(width % 2 for width in found)
        assert sum(width % 4 == 0 for width in found) >= 5


@given(size=st.integers(1, 2000), share=st.floats(0.01, 2.0), multiple_of=st.sampled_from([1, 4, 8, 16]))
def test_aligned_width_is_a_width_of_the_group(size: int, share: float, multiple_of: int) -> None:
    width = space.aligned(size, share, multiple_of)
    assert 1 <= width <= size
    if size >= 2 * multiple_of:
        assert width % multiple_of == 0 or width == size


def test_drawn_widths_are_seeded_valid_and_of_all_kinds() -> None:
    vectors = space.draw(SIZES, 400, seed=3)
    assert vectors == space.draw(SIZES, 400, seed=3)
    assert vectors != space.draw(SIZES, 400, seed=4)
    assert all(1 <= widths[name] <= size for widths in vectors for name, size in SIZES.items())
    wide = [widths["e"] for widths in vectors]
    assert min(wide) < 300 / 5
    assert max(wide) == 300
    for multiple in (16, 8, 4):
        assert sum(width % multiple == 0 for width in wide) > 40
    assert 10 < sum(width % 4 != 0 for width in wide if width != 300) < 120
    # One half shares a ratio: the two widest groups move together there and not in the other.
    shares = np.array([[widths["a"] / 64, widths["e"] / 300] for widths in vectors])
    together, apart = (np.corrcoef(part.T)[0, 1] for part in (shares[1::2], shares[0::2]))
    assert together > 0.6
    assert abs(apart) < 0.3


@pytest.fixture(scope="module")
def kernel_graph() -> KernelGraph:
    torch.manual_seed(0)
    model = Residual().eval()
    graph = trace(model, torch.zeros(1, 3, 16, 16))
    return lower(graph, model=model, device={"architecture": "x86_64", "isa": ("avx2", "avx512f")})


class Residual(nn.Module):
    """A stem, one residual block, a strided convolution and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 48, 3, padding=1)
        self.first = nn.Conv2d(48, 64, 3, padding=1)
        self.second = nn.Conv2d(64, 48, 3, padding=1)
        self.last = nn.Conv2d(48, 96, 3, stride=2, padding=1)
        self.head = nn.Linear(96, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.second(torch.relu(self.first(x))))
        return self.head(torch.relu(self.last(x)).mean((2, 3)))


def test_sample_is_seeded_distinct_and_any_beginning_is_the_shorter_sample(kernel_graph: KernelGraph) -> None:
    long = space.sample(kernel_graph, 120, seed=2, draws=120)
    assert len(set(long)) == len(long) == 120
    assert space.sample(kernel_graph, 120, seed=2, draws=120) == long
    assert space.sample(kernel_graph, 30, seed=2, draws=120) == long[:30]


def test_sample_begins_with_the_dense_network_and_holds_every_operation_that_pruning_reaches(
    kernel_graph: KernelGraph,
) -> None:
    dense = set(kernel_graph.at({}))
    chosen = space.sample(kernel_graph, 60, seed=0, draws=150)
    assert set(chosen[: len(dense)]) == dense
    # However short the sample is: what the dense network runs is told of each kind before any kind is told twice.
    ops = {kernel.op for kernel in dense}
    assert {kernel.op for kernel in chosen[: len(ops)]} == ops
    assert len(ops) < len(dense)
    reached: Counter[str] = Counter()
    for widths in space.draw(space.group_sizes(kernel_graph), 150, seed=0):
        reached.update(kernel.op for kernel in kernel_graph.at(widths))
    # Odd widths leave the blocked layout: the plain convolutions and reorders that then run are among the chosen.
    assert {"nchwc.Conv", "nchwc.ReorderOutput"} <= set(reached)
    assert {kernel.op for kernel in chosen} == set(reached)


def test_sample_stops_where_nothing_new_is_reached(kernel_graph: KernelGraph) -> None:
    everything = space.sample(kernel_graph, 100_000, seed=0, draws=40)
    reached = set(kernel_graph.at({}))
    for widths in space.draw(space.group_sizes(kernel_graph), 40, seed=0):
        reached |= set(kernel_graph.at(widths))
    assert set(everything) == reached


def test_sample_covers_better_than_chance(kernel_graph: KernelGraph) -> None:
    """The kernel farthest from all measured ones is nearer than with as many kernels picked at random."""
    pool = [kernel for kernel in space.sample(kernel_graph, 100_000, seed=0, draws=200) if kernel.op == "nchwc.Conv"]
    chosen = {kernel for kernel in space.sample(kernel_graph, 80, seed=0, draws=200) if kernel.op == "nchwc.Conv"}
    matrix = features(pool, Machine(512))
    points = np.column_stack([matrix.column(name) for name in ("log_work", "log_bytes_in", "log_bytes_out")])

    def gap(members: list[int]) -> float:
        near = np.linalg.norm(points[:, None] - points[members][None], axis=2).min(axis=1)
        return float(near.max())

    ours = gap([place for place, kernel in enumerate(pool) if kernel in chosen])
    source = np.random.default_rng(0)
    random = [gap(list(source.choice(len(pool), len(chosen), replace=False))) for _ in range(20)]
    assert ours < np.median(random)
