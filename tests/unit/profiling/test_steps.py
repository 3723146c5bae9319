"""Step hunting and doubt, on the real lowering of a small network and latencies whose steps are known."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from edgeprune.graph.tracing import trace
from edgeprune.latency.fitting import fit
from edgeprune.latency.table import LatencyTable
from edgeprune.latency.table_rows import kernel_row
from edgeprune.lowering.kernel_graph import lower
from edgeprune.profiling import doubting, refining, space, steps
from edgeprune.profiling.subjects import Subject
from edgeprune.spec import Kernel, Measurement

HEADER = {"identity": {"architecture": "x86_64"}, "runtime": "onnxruntime", "threads": 1, "precision": "fp32"}
STAIR = 20
"""Output channels that cost the same together."""


@pytest.fixture(scope="module")
def subject() -> Subject:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 48, 3, padding=1), nn.ReLU(), nn.Conv2d(48, 100, 3, padding=1), nn.ReLU(), nn.Conv2d(100, 8, 1)
    ).eval()
    graph = trace(model, torch.zeros(1, 3, 16, 16))
    # Without vector instructions the runtime leaves channels as they are: every width is a kernel of its own.
    return Subject("stack", "", lower(graph, model=model, device={"architecture": "riscv64", "isa": ()}))


def stair_ms(kernel: Kernel) -> float:
    """A machine that computes output channels by twenties, whatever the input channels."""
    if kernel.family != "conv":
        return 1e-3
    return 1e-3 + 0.05 * math.ceil(kernel.output[1] / STAIR)


def priced(kernels: Iterable[Kernel]) -> dict[Kernel, float]:
    return {kernel: stair_ms(kernel) for kernel in kernels}


def table(kernels: list[Kernel], **header: Any) -> LatencyTable:
    def timed(ms: float) -> Measurement:
        return Measurement(ms, ms, ms, 0.0, (ms, ms, ms), 9)

    rows = [kernel_row(kernel, timed(stair_ms(kernel))) for kernel in dict.fromkeys(kernels)]
    return LatencyTable.from_rows({**HEADER, **header}, rows)


def hunted(subject: Subject, turns: int, count: int) -> tuple[list[steps.Line], dict[Kernel, float], list[int]]:
    lines = steps.lines([subject], priced)
    known: dict[Kernel, float] = {}
    sizes = []
    for _ in range(turns):
        found = steps.hunt(lines, known, count)
        sizes.append(len(found))
        assert not set(found) & set(known), "nothing is measured twice"
        known.update((kernel, stair_ms(kernel)) for kernel in found)
    return lines, known, sizes


def test_bisection_finds_every_edge_and_measures_few_widths(subject: Subject) -> None:
    lines, known, sizes = hunted(subject, turns=14, count=40)
    assert sizes[-1] == 0, "every interval is closed"
    found = {(edge["group"], edge["width"]) for edge in steps.edges(lines, known)}
    wanted = set()
    for line in lines:
        least = space.smallest_width(line.size)
        wanted |= {(line.group, width) for width in range(least + 1, line.size + 1) if (width - 1) % STAIR == 0}
    assert found == wanted
    assert len(wanted) >= 6
    for edge in steps.edges(lines, known):
        assert edge["at_ms"] - edge["below_ms"] == pytest.approx(0.05, rel=0.01)
    every = sum(line.size - space.smallest_width(line.size) for line in lines)
    looked_at = sum(len(line.widths(known)) for line in lines)
    assert looked_at < 0.6 * every


def test_time_bounds_what_a_turn_measures(subject: Subject) -> None:
    _, known, sizes = hunted(subject, turns=3, count=7)
    assert all(0 < size <= 7 + 3 for size in sizes)
    assert len(known) == sum(sizes)


def test_what_cannot_be_measured_is_not_asked_for_again(subject: Subject) -> None:
    lines, _, _ = hunted(subject, turns=0, count=0)
    first = steps.hunt(lines, {}, 1000)
    refused = first[:3]
    known = {kernel: stair_ms(kernel) for kernel in first[3:]}
    for _ in range(14):
        more = steps.hunt(lines, known, 1000, refused)
        assert not set(more) & set(refused)
        known.update((kernel, stair_ms(kernel)) for kernel in more)
    assert more == []


def test_lines_are_those_that_matter_most_and_each_kind_once(subject: Subject) -> None:
    lines = steps.lines([subject, subject], priced)
    sizes = space.group_sizes(subject.kernel_graph)
    assert len(lines) <= len(sizes), "the same model twice has each line once"
    gains = [
        sum(stair_ms(kernel) * count for kernel, count in line.touched(line.size).items())
        - sum(stair_ms(kernel) * count for kernel, count in line.touched(space.smallest_width(line.size)).items())
        for line in lines
    ]
    assert gains == sorted(gains, reverse=True)
    assert steps.lines([subject], priced, 1)[0].group == lines[0].group


def test_doubt_goes_to_what_costs_much_and_is_far_from_what_is_known(subject: Subject) -> None:
    reached = space.reach([subject.kernel_graph], seed=2, draws=60)
    pool = [kernel for kernel in reached.kernels() if kernel.family == "conv"]
    narrow = [kernel for kernel in pool if kernel.output[1] < 40]
    predictor = fit(table(narrow))
    found = doubting.doubtful(reached, predictor, 10)
    assert len(found) == len(set(found)) == 10
    assert not set(found) & set(narrow)
    assert doubting.doubtful(reached, predictor, 4) == found[:4], "any beginning is the shorter choice"
    assert found == doubting.doubtful(reached, predictor, 10)
    # The first choice is not next to another one of the first few: what is chosen counts as known.
    points = space.coordinates(found[:4], reached.isa)
    apart = np.linalg.norm(points[:, None] - points[None], axis=2)[np.triu_indices(4, 1)]
    assert apart.min() > 0
    refused = table(narrow, unsupported={found[0].key: "no engine"})
    assert found[0] not in doubting.doubtful(reached, fit(refused), 10)
    assert doubting.doubtful(space.Reach((Counter(narrow),), (Counter(narrow),), reached.isa), predictor, 5) == []


def test_stages_follow_from_what_was_measured_and_survive_the_journal(subject: Subject) -> None:
    start = space.sample(subject.kernel_graph, 30, draws=40)
    measured, done, spent_s = list(start), [], 0.0

    def refinement() -> refining.Refinement:
        return refining.Refinement([subject], dense_ms=0.2, refine_s=70.0, seed=0)

    first = refinement()
    while (stage := first.following(done, table(measured), spent_s)) is not None:
        # Whoever comes from the journal decides the same.
        kept = [refining.Stage.from_record(entry.record()) for entry in done]
        assert refinement().following(kept, table(measured), spent_s) == stage
        assert not set(stage.kernels) & set(measured)
        measured += stage.kernels
        done.append(stage)
        spent_s += 3.2 + 0.155 * len(stage.kernels)
    assert [stage.why for stage in done][:2] == [refining.DOUBTED, refining.STEPS]
    assert len(done) >= 4
    assert spent_s <= 70.0
    edges = first.edges(done, table(measured))
    assert edges
    assert all((edge["width"] - 1) % STAIR == 0 for edge in edges)
    assert refinement().edges([refining.Stage.from_record(entry.record()) for entry in done], table(measured)) == edges
    report = fit(table(measured, edges=edges)).report()
    assert len(report.edges) == len(edges)


def test_too_little_time_refines_nothing(subject: Subject) -> None:
    refinement = refining.Refinement([subject], dense_ms=0.2, refine_s=1.0, seed=0)
    start = space.sample(subject.kernel_graph, 30, draws=40)
    assert refinement.following([], table(start), 0.0) is None
    assert refinement.edges([], table(start)) == []
