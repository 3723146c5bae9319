"""The eight steps of the quickstart, each through the public library, each told to the caller as it begins.

The plan is on disk, with its prediction, before any pruned model is compiled or timed. A run that was interrupted goes on:
the trained model and the latency table of the same settings are taken from the output folder.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch

import edgeprune
from edgeprune.allocation.uniform import closest_uniform
from edgeprune.boards.board import Board
from edgeprune.budget import Budget
from edgeprune.deployment.artifact import Artifact
from edgeprune.deployment.result import Deployment
from edgeprune.errors import ConfigError, TableFormatError
from edgeprune.files import write_text
from edgeprune.graph.channel_graph import ChannelGraph
from edgeprune.latency.predictor import Predictor
from edgeprune.latency.table import LatencyTable
from edgeprune.loop.dense import dense_latency
from edgeprune.loop.planning import Planner, Proposal
from edgeprune.loop.realizing import realize
from edgeprune.loop.result import Result
from edgeprune.lowering.kernel_graph import KernelGraph
from edgeprune.profiling.comparing import Comparison, compare
from edgeprune.quickstart import digits, summarizing, training
from edgeprune.quickstart.network import DigitNet
from edgeprune.quickstart.waiting import held
from edgeprune.recovery.fine_tuning import FineTuning
from edgeprune.report import page, stored
from edgeprune.report.data import Candidate
from edgeprune.report.pruning import parameter_count
from edgeprune.spec import Fingerprint

EPOCHS = 1
"""Of fine-tuning, brief: so many that the pruned model is within a point of the dense one on the validation images."""
MINUTES = 1.0
"""Time for profiling."""
TOLERANCE = 0.05
"""Of the latency gate."""
_UNIFORM_CANDIDATES = 5


class Reporter(Protocol):
    """What a step is told while it runs; `edgeprune.cli.console.Progress` is one."""

    def share(self, done: int, total: int) -> None: ...
    def timed(self, done: int, total: int, left_s: float, message: str) -> None: ...
    def stepped(self, step: str, done: int, total: int) -> None: ...
    def staged(self, state: str, done: int, total: int, message: str) -> None: ...
    def told(self, step: str, message: str) -> None: ...
    def said(self, text: str) -> None: ...


Steps = Callable[[str], AbstractContextManager[Reporter]]
"""Called with the headline of a step; the context is the step."""


@dataclass(frozen=True)
class Settings:
    """What the user chose.

    Attributes:
        board: As in `Board.open`.
        budget: Latency budget; a share is one of the measured dense latency.
        out: Folder for everything that is written.
        seed: Of weights, training, and the order of measuring.
        minutes: Time for profiling.
        tolerance: Share by which the deployment's latency gate may exceed the budget.
        epochs: Of fine-tuning, for the pruned model and for its uniform rival.
    """

    board: str = "local"
    budget: Budget = field(default_factory=lambda: Budget(latency_ratio=0.5))
    out: Path = Path("edgeprune-quickstart")
    seed: int = 0
    minutes: float = MINUTES
    tolerance: float = TOLERANCE
    epochs: int = EPOCHS


@dataclass(frozen=True)
class Outcome:
    """What came of it.

    Attributes:
        summary: Contents of ``summary.json``.
        candidates: Dense, uniform and pruned, with accuracy on the test split and interleaved latency.
        board: What was found on the board: property to text.
        fit: One line on the predictor's errors.
        disturbances: What could have disturbed the measurements.
        notes: What a person should read.
    """

    summary: Mapping[str, Any]
    candidates: tuple[Candidate, ...]
    board: Mapping[str, str]
    fit: str
    disturbances: tuple[str, ...]
    notes: tuple[str, ...]


def run(settings: Settings, steps: Steps) -> Outcome:
    """Run all steps.

    Args:
        settings: What the user chose.
        steps: Told each step.

    Raises:
        EdgepruneError: Any of the errors of `profile`, `prune`, `compile` and `deploy`; the board keeps what it ran.
    """
    started = time.monotonic()
    out = settings.out
    if out.exists() and not out.is_dir():
        raise ConfigError(f"the output must be a folder, {out} is a file.", hint="--out another")
    out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        with steps("1/8 open and probe the board") as reporter:
            reporter.told("board", settings.board)
            board = stack.enter_context(Board.open(settings.board))
            fingerprint = board.probe()
        data = digits.load()
        with steps("2/8 train the dense model on handwritten digits") as reporter:
            checkpoint = out / f"dense-seed{settings.seed}.safetensors"
            if checkpoint.exists():
                reporter.said(f"trained by an earlier run, kept in {checkpoint}")
            dense = training.train(data, seed=settings.seed, checkpoint=checkpoint, progress=reporter.share)
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="edgeprune-quickstart-")))
        with steps("3/8 profile the kernels on the board") as reporter:
            table, kernel_graph = _profiled(settings, board, fingerprint, dense, scratch, reporter)
        with steps("4/8 fit the latency predictor"):
            predictor = edgeprune.fit(table)
        job = _Job(settings, board, fingerprint, data, dense, table, kernel_graph, predictor)
        with steps(f"5/8 prune to {settings.budget}") as reporter:
            result = job.prune(reporter)
            uniform = job.uniform(result, reporter)
        with steps("6/8 compile with ONNX Runtime") as reporter:
            reference, artifact = job.compile(result, reporter)
        with steps("7/8 deploy: check on the board, then switch") as reporter:
            deployment = job.deploy(artifact, reference, reporter)
            compared = job.compare(artifact, reference, uniform, reporter)
        with steps("8/8 report"):
            return job.finish(result, uniform, artifact, deployment, compared, time.monotonic() - started)


def _profiled(
    settings: Settings, board: Board, fingerprint: Fingerprint, dense: DigitNet, scratch: Path, reporter: Reporter
) -> tuple[LatencyTable, KernelGraph]:
    graph = edgeprune.trace(dense, _example())
    kernel_graph = edgeprune.lower(graph, model=dense, device=fingerprint, workdir=scratch)
    path = settings.out / "latency_table.parquet"
    table = _kept_table(path, graph, kernel_graph, fingerprint, settings)
    if table is not None:
        reporter.said(f"measured by an earlier run ({table.header['created']}), kept in {path}")
        return table, kernel_graph
    with held(board, reporter.said):
        table = edgeprune.profile(
            dense,
            _example(),
            board,
            minutes=settings.minutes,
            seed=settings.seed,
            out=path,
            graph=graph,
            kernel_graph=kernel_graph,
            progress=reporter.timed,
            told=reporter.said,
        )
    return table, kernel_graph


def _kept_table(
    path: Path, graph: ChannelGraph, kernel_graph: KernelGraph, fingerprint: Fingerprint, settings: Settings
) -> LatencyTable | None:
    """The table of an earlier run with the same model, device, runtime and settings."""
    if not path.exists():
        return None
    try:
        table = LatencyTable.load(path)
    except TableFormatError:
        return None
    header = table.header
    same = (
        header["identity"] == fingerprint.identity(kernel_graph.backend.name)
        and header["model"]["signature"] == graph.signature
        and header["protocol"]["minutes"] == settings.minutes
        and header["protocol"]["seed"] == settings.seed
    )
    return table if same else None


def _example() -> torch.Tensor:
    return torch.zeros(1, 1, digits.SIZE, digits.SIZE)


@dataclass(frozen=True)
class _Uniform:
    """The uniform rival: one share of channels everywhere, at the latency of the pruned model."""

    proposal: Proposal
    module: torch.nn.Module
    engine: Path


@dataclass(frozen=True)
class _Job:
    """The steps after profiling, with what they share."""

    settings: Settings
    board: Board
    fingerprint: Fingerprint
    data: digits.Digits
    dense: DigitNet
    table: LatencyTable
    kernel_graph: KernelGraph
    predictor: Predictor

    @property
    def out(self) -> Path:
        return self.settings.out

    @cached_property
    def planner(self) -> Planner:
        """Scores for the pruned model and for its uniform rival."""
        return Planner(self.dense, self.kernel_graph, self.predictor, task=training.task(self.data))

    @cached_property
    def dense_ms(self) -> float:
        """Dense latency as measured while profiling, milliseconds: what a relative budget is a share of."""
        return dense_latency(self.predictor, self.kernel_graph).ms

    @property
    def budget_ms(self) -> float:
        return self.settings.budget.resolve_ms(self.dense_ms)

    @property
    def _fine_tuning(self) -> FineTuning:
        return FineTuning(epochs=self.settings.epochs, seed=self.settings.seed)

    def prune(self, reporter: Reporter) -> Result:
        """Widths, plan, cut, check, recovery; nothing is compiled or timed."""
        return edgeprune.prune(
            self.dense,
            _example(),
            self.settings.budget,
            planner=self.planner,
            fine_tuning=self._fine_tuning,
            distill=True,
            plan_path=self.out / "plan.json",
            progress=reporter.stepped,
        )

    def uniform(self, result: Result, reporter: Reporter) -> _Uniform:
        """Uniform widths whose *measured* latency comes closest to the pruned model's, cut and tuned in the same way.

        Latency does not depend on the values of weights, so candidates are timed before they are tuned, with made-up ones.
        """
        planner = self.planner
        groups, damage = self.kernel_graph.graph.groups, planner.damage
        allocations = {}
        for share in range(_UNIFORM_CANDIDATES):
            target_ms = result.predicted_ms * (0.9 + 0.2 * share / (_UNIFORM_CANDIDATES - 1))
            allocation = closest_uniform(groups, damage, planner.cost, target_ms, planner.rules)
            allocations[tuple(sorted(allocation.widths.items()))] = allocation
        named = {f"uniform{index}": allocation for index, allocation in enumerate(allocations.values())}
        engines: dict[str, bytes | Path] = {
            name: self.kernel_graph.network_engine(allocation.widths) for name, allocation in named.items()
        }
        engines["pruned"] = self.kernel_graph.network_engine(result.plan.widths())
        with held(self.board, reporter.said):
            found = compare(self.board, engines, "pruned", rounds=8, progress=reporter.timed)
        closest = min(named, key=lambda name: abs(found.ratios[name].ratio - 1))
        proposal = planner.proposal(named[closest], result.predicted_ms)
        module = realize(
            planner,
            proposal,
            _example(),
            fine_tuning=self._fine_tuning,
            distill=True,
            progress=lambda step, done, total: reporter.stepped(f"uniform rival, {step}", done, total),
        ).module
        engine = self.out / "uniform.onnx"
        self.kernel_graph.backend.export(module, self.kernel_graph.graph.example_inputs, engine)
        return _Uniform(proposal, module, engine)

    def compile(self, result: Result, reporter: Reporter) -> tuple[Artifact, Artifact]:
        """Artifacts of the dense model (the reference of the latency gate) and of the pruned one."""
        images = self.data.train[0][:32]
        normalization = {"mean": [0.3053], "std": [0.3232]}
        labels = [str(digit) for digit in range(digits.CLASSES)]
        reference = edgeprune.compile(
            self.dense,
            _example(),
            self.out / "dense",
            name="digits-dense",
            labels=labels,
            normalization=normalization,
            golden_inputs=images,
            fingerprint=self.fingerprint,
            progress=reporter.told,
        )
        artifact = edgeprune.compile(
            result.module,
            _example(),
            self.out / "artifact",
            name="digits",
            plan=result.plan,
            labels=labels,
            normalization=normalization,
            golden_inputs=images,
            fingerprint=self.fingerprint,
            progress=reporter.told,
        )
        return reference, artifact

    def deploy(self, artifact: Artifact, reference: Artifact, reporter: Reporter) -> Deployment:
        """Parity and latency on the board, then the switch."""
        with held(self.board, reporter.said):
            return edgeprune.deploy(
                artifact,
                self.board,
                budget_ms=self.budget_ms,
                reference=reference,
                dense_ms=self.dense_ms,
                tolerance=self.settings.tolerance,
                progress=reporter.staged,
            )

    def compare(self, artifact: Artifact, reference: Artifact, uniform: _Uniform, reporter: Reporter) -> Comparison:
        """Dense, uniform and pruned engine in the same rounds."""
        engines: dict[str, bytes | Path] = {
            "dense": reference.engine,
            "uniform": uniform.engine,
            "pruned": artifact.engine,
        }
        with held(self.board, reporter.said):
            return compare(self.board, engines, "dense", rounds=20, progress=reporter.timed)

    def finish(
        self,
        result: Result,
        uniform: _Uniform,
        artifact: Artifact,
        deployment: Deployment,
        compared: Comparison,
        seconds: float,
    ) -> Outcome:
        """Write ``summary.json``, ``report.json`` and ``report.html``."""
        modules = {"dense": self.dense, "uniform": uniform.module, "pruned": result.module}
        right = {name: training.test_answers(module, self.data) for name, module in modules.items()}
        candidates = tuple(
            Candidate(
                name,
                self.dense_ms * compared.ratios[name].ratio,
                compared.ratios[name].ratio,
                float(right[name].float().mean()),
                parameter_count(module),
            )
            for name, module in modules.items()
        )
        report_path = self.out / "report.html"
        summary = summarizing.summary(result, candidates, deployment, compared) | {
            "table": str(self.out / "latency_table.parquet"),
            "plan": str(self.out / "plan.json"),
            "artifact": str(artifact.folder),
            "report": str(report_path),
            "seconds": seconds,
            "seed": self.settings.seed,
            # Of a few hundred images: whether the two differ is told by those that only one of them recognizes.
            "test_images": len(right["pruned"]),
            "only_pruned_right": int((right["pruned"] & ~right["uniform"]).sum()),
            "only_uniform_right": int((right["uniform"] & ~right["pruned"]).sum()),
        }
        verified = summarizing.verified(result, compared, board=self.board.name, tolerance=self.settings.tolerance)
        data = summarizing.report_data(
            verified,
            candidates,
            deployment,
            kernel_graph=self.kernel_graph,
            predictor=self.predictor,
            budget=self.settings.budget,
        )
        stored.save(data, self.out / stored.FILE_NAME)
        page.write(data, report_path)
        write_text(self.out / "summary.json", json.dumps(summary, indent=2) + "\n")
        return Outcome(
            summary=summary,
            candidates=candidates,
            board=data.board,
            fit=self.predictor.report().summary(),
            disturbances=self.fingerprint.disturbances,
            notes=verified.notes,
        )
