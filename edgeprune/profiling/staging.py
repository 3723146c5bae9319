"""Stages of one profiling run: items measured in rounds of their own, around one sentinel, and what follows from them."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgeprune.boards.board import Board
from edgeprune.errors import UnsupportedKernelError
from edgeprune.profiling import space
from edgeprune.profiling.assembling import Part, Profiled, extended, table_of
from edgeprune.profiling.journal import Journal
from edgeprune.profiling.measuring import MeasuredRun, Progress, measure
from edgeprune.profiling.refining import DOUBTED, Refinement, Stage
from edgeprune.profiling.selecting import ROUNDS, SAMPLE_MS, SAMPLES, WARMUP_MS, Selection
from edgeprune.profiling.setting import Setting
from edgeprune.spec import Kernel

if TYPE_CHECKING:
    from edgeprune.latency.table import LatencyTable
    from edgeprune.lowering.kernel_graph import KernelGraph
    from edgeprune.profiling.extending import Link

logger = logging.getLogger("edgeprune.profiling")


def assembled(base: LatencyTable | None, profiled: Profiled, link: Link | None) -> LatencyTable:
    """The table of what was measured so far."""
    return table_of(profiled) if base is None or link is None else extended(base, profiled, link)


def measure_stage(
    board: Board,
    setting: Setting,
    selection: Selection,
    engines: Mapping[str, bytes | Path],
    kernels: Sequence[str],
    journal: Path | None,
    budget_s: float,
    tell: Progress,
    told: Callable[[str], None] | None,
    level_ms: float | None = None,
) -> MeasuredRun:
    """Items that are measured in rounds of their own, around the sentinel of all stages."""
    return measure(
        board,
        engines,
        runtime=setting.runtime,
        threads=setting.threads,
        rounds=ROUNDS,
        samples=SAMPLES,
        sample_ms=SAMPLE_MS,
        warmup_ms=WARMUP_MS,
        sentinel=setting.subjects[0].network(0),
        every=selection.every,
        passes=selection.passes,
        seed=setting.seed,
        journal=journal,
        progress=tell,
        told=told,
        kernels=kernels,
        budget_s=budget_s,
        identity=setting.request["identity"],
        level_ms=level_ms,
        wait_s=setting.wait_s,
        timing_s=None if setting.layer_times is None else setting.layer_times.timing_s,
    )


def refined(
    board: Board,
    setting: Setting,
    selection: Selection,
    profiled: Profiled,
    link: Link | None,
    book: Journal,
    path: Path | None,
    tell: Progress,
    told: Callable[[str], None] | None,
) -> Profiled:
    """The same with the stages that follow from it, and the stair edges that they found."""
    if not selection.refine_s:
        return profiled
    subjects, first = setting.subjects, profiled.parts[0].run
    refinement = Refinement(subjects, first.level_ms, selection.refine_s, setting.seed)
    decided = stages_of(book)
    done: list[Stage] = []
    spent_s = 0.0
    while True:
        if len(done) == len(decided):
            tell(0, 0, selection.refine_s - spent_s, "choosing what to measure next")
            stage = refinement.following(done, assembled(setting.table, profiled, link), spent_s)
            if stage is None:
                break
            decided.append(stage)
            book.append(stage.record())
        stage = decided[len(done)]
        done.append(stage)
        left_s = selection.refine_s - spent_s
        sizes = space.group_sizes(subjects[0].kernel_graph)
        engines: dict[str, bytes | Path] = {subjects[0].network(0): subjects[0].kernel_graph.network_engine(sizes)}
        kernels, unsupported = kernel_engines(stage.kernels, subjects[0].kernel_graph, engines)
        if not kernels:
            head = profiled.parts[0]
            head = replace(head, unsupported={**head.unsupported, **unsupported})
            profiled = replace(profiled, parts=[head, *profiled.parts[1:]])
            continue
        run = measure_stage(
            board,
            setting,
            selection,
            engines,
            list(kernels),
            path and beside(path, f"journal-{len(done)}"),
            left_s,
            _said(tell, "what the fit doubts" if stage.why == DOUBTED else "the edges of steps"),
            told,
            first.level_ms,
        )
        spent_s += run.spent_s
        profiled = replace(profiled, parts=[*profiled.parts, Part(run, kernels, unsupported)])
    edges = refinement.edges(done, assembled(setting.table, profiled, link))
    return replace(profiled, edges=edges)


def stages_of(book: Journal) -> list[Stage]:
    """Stages that a journal of selections holds, in order."""
    return [Stage.from_record(record) for record in book.records if record["kind"] == "stage"]


def _said(tell: Progress, what: str) -> Progress:
    def said(done: int, total: int, left_s: float, message: str) -> None:
        tell(done, total, left_s, f"{what}: {message}")

    return said


def kernel_engines(
    kernels: Sequence[Kernel], kernel_graph: KernelGraph, engines: dict[str, bytes | Path]
) -> tuple[dict[str, Kernel], dict[str, str]]:
    """Add an engine for each kernel; ids with their kernels, and keys of those that cannot run alone with the reason."""
    made: dict[str, Kernel] = {}
    unsupported: dict[str, str] = {}
    for kernel in kernels:
        name = hashlib.sha256(kernel.key.encode()).hexdigest()[:16]
        try:
            engines[name] = kernel_graph.backend.kernel_engine(kernel)
            made[name] = kernel
        except UnsupportedKernelError as error:
            unsupported[kernel.key] = error.message
            logger.warning("%s", error.message)
    return made, unsupported


def beside(path: Path, what: str) -> Path:
    """A journal that lies beside a table while it is made."""
    return path.with_name(f"{path.name}.{what}.jsonl")
