"""What is a pruned model worth at equal measured latency? CIFAR-10 ResNets, ours beside the ways that others prune.

Every method starts from the same dense checkpoint and scores with the same 2 000 training images. Its plan is moved until the
measured latency, as the interleaved ratio to the dense engine, meets the target (at most 1 % above it, as close as the method can
come); one that cannot is "not reachable", which is no win for anyone. Then all get the same recovery without any gradient:
batch-norm re-estimation, or closed-form reconstruction instead, on the same images without labels. With `--epoch` all are
then fine-tuned for one epoch on all training images with the same settings. `netadapt` alone takes gradient steps while it
searches, and is not reconstructed, since it has left the dense model behind.

A cell that is done is not run again; what is missing is printed. Use a machine that does nothing else meanwhile.

    python benchmarks/pruning_quality.py --data cifar10 --weights resnet20.safetensors
    python benchmarks/pruning_quality.py --data cifar10 --weights resnet20.safetensors --epoch --seeds 0 1 2
    python benchmarks/pruning_quality.py --table                                        # only print what is there

Data and weights are those of `benchmarks/damage_curves.py`. Pillow must be installed; torch-pruning for the rows of the peer.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from damage_curves import accuracy, images, load_model, padded_behind
from pruning_rivals import torch_pruning_peer as peer
from quickstart import host
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

import edgeprune
from edgeprune.boards.board import Board
from edgeprune.errors import BudgetInfeasibleError
from edgeprune.loop.netadapt import NetAdapt
from edgeprune.loop.planning import Planner, Proposal
from edgeprune.loop.verification import measure_ratio
from edgeprune.recovery.batch_norm import reestimate_batch_norm
from edgeprune.recovery.evaluation import evaluate
from edgeprune.recovery.fine_tuning import FineTuning, fine_tune
from edgeprune.recovery.reconstruction import reconstruct
from edgeprune.surgery.plan import PruningPlan, make_plan
from edgeprune.tasks.task import Task

RESULTS = Path(__file__).parent / "results" / "pruning_quality"
SPEEDUPS = (1.5, 2.0, 3.0)
IMAGES, TEST_IMAGES, BATCH = 2_000, 10_000, 100
TURNS = 4
"""Most plans of one method that are measured to meet one target."""
OURS: dict[str, dict[str, Any]] = {
    "edgeprune": {"blocks": True, "settle": True},
    "edgeprune, not settled": {"blocks": True},
    "edgeprune, widths only": {},
    "knapsack": {"allocator": "knapsack"},
    "global_threshold": {"allocator": "global_threshold"},
    "uniform": {"allocator": "uniform"},
    "blockdrop": {"allocator": "blockdrop", "blocks": True},
    "netadapt": {"blocks": True, "netadapt": True},
}
NETADAPT = NetAdapt(reduction=0.1, tuning_steps=5, batches=4)
"""It trains while it searches, so its figures before the epoch hold some hundred short tunings on the 2 000 images."""
METHODS = (*OURS, *peer.METHODS)


@dataclass(frozen=True)
class Candidate:
    """A cut model that meets a target.

    Attributes:
        module: It.
        plan: By which it is reconstructed; None where it cannot be.
        ratio: Measured share of the dense latency.
        details: What is written down of it.
    """

    module: nn.Module
    plan: PruningPlan | None
    ratio: float
    details: dict[str, Any]


class Bench:
    """One network on the machine at hand."""

    def __init__(self, weights: Path, data: Path, minutes: float, board: Board, folder: Path) -> None:
        self.name, self.board = weights.stem, board
        self.model = padded_behind(load_model(weights))
        self.example = torch.zeros(1, 3, 32, 32)
        self.data = data
        self.graph = edgeprune.trace(self.model, self.example)
        self.kernels = edgeprune.lower(self.graph, model=self.model, device=board.probe(), workdir=folder)
        path = RESULTS / f"{self.name}.parquet"
        if path.exists():
            self.table = edgeprune.LatencyTable.load(path)
        else:
            self.table = edgeprune.profile(
                self.model, self.example, board, minutes=minutes, out=path, graph=self.graph, kernel_graph=self.kernels
            )
        self.predictor = edgeprune.fit(self.table)
        self._planners: dict[str, Planner] = {}

    @cached_property
    def task(self) -> Task:
        train, test = (self._split(split, count) for split, count in (("train", IMAGES), ("test", TEST_IMAGES)))
        return Task.single(train=train, validation=test, loss=F.cross_entropy, metric=accuracy, name="accuracy")

    @cached_property
    def every_image(self) -> Task:
        inputs, labels = images(self.data / "train.parquet", 50_000)
        train = _Flipped(inputs, labels)
        test = self.task.objectives[0].validation
        return Task.single(train=train, validation=test, loss=F.cross_entropy, metric=accuracy, name="accuracy")

    def _split(self, split: str, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        parts = (torch.split(part, BATCH) for part in images(self.data / f"{split}.parquet", count))
        return list(zip(*parts, strict=True))

    def ratio(self, module: nn.Module, rounds: int = 12, precision: float = 0.01) -> float:
        """Measured share of the dense latency."""
        found = measure_ratio(self.board, self.kernels, module, threads=1, rounds=rounds, precision=precision)
        return found.ratio

    def planner(self, method: str) -> Planner:
        """Scores and damage are computed once for all targets."""
        if method not in self._planners:
            options = {name: value for name, value in OURS[method].items() if name not in ("settle", "netadapt")}
            self._planners[method] = Planner(self.model, self.kernels, self.predictor, task=self.task, **options)
        return self._planners[method]

    def candidate(self, method: str, speedup: float) -> Candidate | None:
        """A method's model for a target; None where it cannot reach it."""
        if method not in OURS:
            return self._peer(method, 1 / speedup)
        return self._ours(method, 1 / speedup)

    def again(self, method: str, found: dict[str, Any]) -> Candidate:
        """The model that a cell was measured with."""
        if method in OURS:
            kept = {name: tuple(units) for name, units in json.loads(found["kept"]).items()}
            plan = make_plan(self.graph, kept)
            return Candidate(edgeprune.apply(self.model, plan), plan, found["ratio"], {})
        module = self._cut(method, found["pruning_ratio"])
        return Candidate(module, peer.as_plan(self.graph, module), found["ratio"], {})

    def _ours(self, method: str, target: float) -> Candidate | None:
        planner = self.planner(method)
        aim_ms, best = target * planner.dense_ms, None
        if OURS[method].get("settle"):
            planner = planner.settled(aim_ms)
        seen: set[str] = set()
        for _ in range(TURNS):
            proposal = _proposed(planner, aim_ms, target)
            if proposal is None or proposal.plan.hash in seen:
                break
            seen.add(proposal.plan.hash)
            module = edgeprune.apply(self.model, proposal.plan)
            ratio = self.ratio(module)
            if OURS[method].get("netadapt"):
                found = NETADAPT.search(planner, replace(proposal, aim_ms=aim_ms * min(1.0, target / ratio)))
                proposal = found.proposal
                module = edgeprune.apply(found.planner.model, proposal.plan)
                ratio = self.ratio(module)
            if ratio <= 1.01 * target and (best is None or ratio > best.ratio):
                certificate = proposal.allocation.certificate
                details = {
                    "predicted_share": proposal.predicted_ms / planner.dense_ms,
                    "damage": certificate.damage,
                    "gap": certificate.gap,
                    "blocks_removed": len(proposal.plan.removed),
                    "kept": json.dumps({name: group["kept"] for name, group in proposal.plan.groups.items()}),
                }
                # Reconstruction aims at the dense model, which NetAdapt has trained away from.
                plan = None if OURS[method].get("netadapt") else proposal.plan
                best = Candidate(module, plan, ratio, details)
            if abs(ratio / target - 1) <= 0.01:
                break
            aim_ms *= target / ratio
        return best

    def _cut(self, method: str, ratio: float) -> nn.Module:
        return peer.cut(method, self.model, "linear", ratio, self.task.objectives[0].train)

    def _peer(self, method: str, target: float) -> Candidate | None:
        path = RESULTS / f"{self.name}-{method.replace(' ', '-').replace('=', '')}.curve.json"
        curve: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}

        def look(ratio: float) -> float:
            if str(ratio) not in curve:
                curve[str(ratio)] = self.ratio(self._cut(method, ratio), rounds=6, precision=0.02)
                write(path, curve)
            return curve[str(ratio)]

        for ratio in peer.RATIOS:
            look(ratio)
        for ratio in peer.mildest(target, curve, look):
            module = self._cut(method, ratio)
            measured = self.ratio(module)
            if measured <= 1.01 * target:
                return Candidate(module, peer.as_plan(self.graph, module), measured, {"pruning_ratio": ratio})
        return None


def _proposed(planner: Planner, aim_ms: float, target: float) -> Proposal | None:
    """A plan for an aim; where it is out of reach, the smallest one, if it may still meet the target."""
    try:
        return planner.propose(aim_ms)
    except BudgetInfeasibleError as error:
        if error.best_ms > planner.dense_ms * target * 1.05 or error.best_ms <= aim_ms:
            return None
        try:
            return planner.propose(error.best_ms * (1 + 1e-9))
        except BudgetInfeasibleError:
            return None


class _Flipped:
    """All training images in random order, flipped and moved by up to four pixels."""

    def __init__(self, inputs: torch.Tensor, labels: torch.Tensor, batch: int = 128) -> None:
        self.inputs, self.labels, self.batch = inputs, labels, batch

    def __len__(self) -> int:
        return -(-len(self.labels) // self.batch)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for chosen in torch.split(torch.randperm(len(self.labels)), self.batch):
            x = F.pad(self.inputs[chosen], (4, 4, 4, 4))
            top, left = torch.randint(0, 9, (2,)).tolist()
            x = x[:, :, top : top + 32, left : left + 32]
            yield (x.flip(3) if torch.rand(()) < 0.5 else x), self.labels[chosen]


def recovered(bench: Bench, candidate: Candidate) -> dict[str, Any]:
    """Accuracies on the test images before any gradient."""
    found: dict[str, Any] = {"plain": evaluate(candidate.module, bench.task)["accuracy"]}
    train = bench.task.objectives[0].train
    normed = copy.deepcopy(candidate.module)
    reestimate_batch_norm(normed, train)
    found["batch_norm"] = evaluate(normed, bench.task)["accuracy"]
    if candidate.plan is not None:
        refitted = refit(bench, candidate)
        found["reconstruction"] = evaluate(refitted, bench.task)["accuracy"]
    return found


def refit(bench: Bench, candidate: Candidate) -> nn.Module:
    """The same model reconstructed where it has a plan, else with batch norms estimated anew."""
    train = bench.task.objectives[0].train
    module = copy.deepcopy(candidate.module)
    if candidate.plan is not None:
        own = edgeprune.apply(bench.model, candidate.plan)
        own.load_state_dict(module.state_dict())
        reconstruct(own, bench.graph, candidate.plan, bench.example, train, samples=IMAGES)
        return own
    reestimate_batch_norm(module, train)
    return module


def cell(
    bench: Bench, method: str, speedup: float, seeds: list[int], found: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """One method at one target, as far as it is done after each step; what `found` has already is kept."""
    candidate = None
    if "reachable" not in found:
        started = time.monotonic()
        candidate = bench.candidate(method, speedup)
        if candidate is None:
            yield {"reachable": False, "host": host()}
            return
        parameters = sum(value.numel() for value in candidate.module.parameters())
        found = {"reachable": True, "ratio": candidate.ratio, "parameters": parameters, **candidate.details}
        found |= recovered(bench, candidate) | {"host": host(), "seconds": time.monotonic() - started}
        if candidate.plan is None and method in OURS:
            path = trained(bench.name, speedup, method)
            save_file(candidate.module.state_dict(), path)
        yield found
    for seed in missing_seeds(found, seeds):
        if candidate is None:
            candidate = bench.again(method, found)
            if method in OURS and (path := trained(bench.name, speedup, method)).exists():
                candidate.module.load_state_dict(load_file(path))
                candidate = replace(candidate, plan=None)
        module = refit(bench, candidate)
        fine_tune(module, bench.every_image, FineTuning(epochs=1, seed=seed), teacher=bench.model)
        found = found | {f"epoch_seed{seed}": evaluate(module, bench.task)["accuracy"]}
        yield found


def missing_seeds(found: dict[str, Any], seeds: list[int]) -> list[int]:
    """Those that a cell was not trained with yet."""
    if found.get("reachable") is False:
        return []
    return [seed for seed in seeds if f"epoch_seed{seed}" not in found]


def trained(name: str, speedup: float, method: str) -> Path:
    """Where the weights are of a method that trains on the way."""
    return place(name, speedup, method).with_suffix(".safetensors")


def write(path: Path, values: dict[str, Any]) -> None:
    """In one step."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(values, indent=1, allow_nan=False) + "\n")
    partial.replace(path)


def place(name: str, speedup: float, method: str) -> Path:
    """Where a cell's figures are."""
    spelled = method.replace(",", "").replace(" ", "-").replace("=", "")
    return RESULTS / f"{name}-{speedup:g}x-{spelled}.json"


def table(name: str) -> None:
    """Print what is there, and what is missing."""
    missing = []
    print("| network | target | method | measured | parameters | cut | batch norm | reconstruction | one epoch |")
    print("|---|---|---|---|---|---|---|---|---|")
    for speedup in SPEEDUPS:
        for method in METHODS:
            path = place(name, speedup, method)
            if not path.exists():
                missing.append(path.stem)
                continue
            row = json.loads(path.read_text())
            if not row["reachable"]:
                print(f"| {name} | {speedup:g}x | {method} | not reachable | | | | | |")
                continue
            figures = [f"{row[key]:.1%}" if key in row else "-" for key in ("plain", "batch_norm", "reconstruction")]
            last = ", ".join(f"{value:.1%}" for key, value in row.items() if key.startswith("epoch_seed")) or "-"
            print(
                f"| {name} | {speedup:g}x | {method} | {1 / row['ratio']:.2f}x | {row['parameters']:,} | "
                f"{' | '.join(figures)} | {last} |"
            )
    if missing:
        print(f"missing: {', '.join(missing)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--minutes", type=float, default=1.0, help="of profiling")
    parser.add_argument("--only", action="append", choices=METHODS)
    parser.add_argument("--speedup", type=float, action="append", choices=SPEEDUPS)
    parser.add_argument("--epoch", action="store_true", help="fine-tune for one epoch too")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--table", action="store_true", help="only print what is there")
    options = parser.parse_args()
    if options.table:
        for name in sorted({path.name.rpartition("x-")[0].rpartition("-")[0] for path in RESULTS.glob("*x-*.json")}):
            table(name)
        return
    if options.data is None or options.weights is None:
        parser.error("--data and --weights must be given")
    torch.set_num_threads(1)
    RESULTS.mkdir(parents=True, exist_ok=True)
    with_peer = importlib.util.find_spec("torch_pruning") is not None
    wanted = [name for name in options.only or METHODS if with_peer or name not in peer.METHODS]
    with Board.open("local") as board, tempfile.TemporaryDirectory(prefix="edgeprune-benchmark-") as folder:
        _run(Bench(options.weights, options.data, options.minutes, board, Path(folder)), wanted, options)
    table(options.weights.stem)


def _run(bench: Bench, methods: list[str], options: argparse.Namespace) -> None:
    for speedup in options.speedup or SPEEDUPS:
        for method in methods:
            path = place(bench.name, speedup, method)
            found = json.loads(path.read_text()) if path.exists() else {}
            seeds = options.seeds if options.epoch else []
            if found and not missing_seeds(found, seeds):
                continue
            if missing_seeds(found, seeds) and found and method in OURS and "kept" not in found:
                found = {}  # of an earlier version, which did not say what it kept
            for done in cell(bench, method, speedup, seeds, found):
                write(path, done)
                figures = {key: value for key, value in done.items() if key not in ("host", "kept")}
                print(f"{path.stem}: {figures}", flush=True)


if __name__ == "__main__":
    main()
