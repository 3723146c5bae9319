"""What is a pruned model worth at equal measured latency? CIFAR-10 ResNets, ours beside the ways that others prune.

Every method starts from the same dense checkpoint and scores with the same 2 000 training images. Its plan is moved until
the measured latency, as the interleaved ratio to the dense engine over a real OpenSSH server on this machine, meets the
target (at most 1 % above it, as close as the method can come); one that cannot is "not reachable", which is no win for
anyone. Then all get the same recovery without any gradient: batch-norm re-estimation, or closed-form reconstruction instead,
on the same images without labels. With `--epoch` all are then fine-tuned for one epoch on all training images with the same
settings. `netadapt` alone takes gradient steps while it searches, and is not reconstructed, since it has left the dense
model behind.

Behind the table it says how far the best of ours is ahead of the best other way, or behind it. A cell that is done is not
run again, nor is a search for a ratio of Torch-Pruning; what is missing is printed. Use a machine that does nothing else
meanwhile.

    python benchmarks/pruning_quality.py --data cifar10 --weights resnet20.safetensors
    python benchmarks/pruning_quality.py --data cifar10 --weights resnet20.safetensors --epoch --seeds 0 1 2
    python benchmarks/pruning_quality.py --table                                        # only print what is there

Data and weights are those of `benchmarks/damage_curves.py`. Pillow and sshd must be installed; torch-pruning for the rows of
the peer.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from damage_curves import load_model, padded_behind
from equal_latency import (
    OVER,
    SCORING_IMAGES,
    Candidate,
    DenseModel,
    aimed,
    heading,
    missing_seeds,
    read,
    row,
    write,
)
from predictor_board import loopback
from pruning_rivals import torch_pruning_peer as peer
from pruning_rivals.ahead import KEY, ahead
from quickstart import host
from safetensors.torch import load_file, save_file
from torch import nn

import edgeprune
from edgeprune.boards.board import Board
from edgeprune.errors import BudgetInfeasibleError, EdgepruneError
from edgeprune.loop.netadapt import NetAdapt
from edgeprune.loop.planning import Planner, Proposal
from edgeprune.recovery.batch_norm import reestimate_batch_norm
from edgeprune.recovery.evaluation import evaluate
from edgeprune.recovery.fine_tuning import FineTuning, fine_tune
from edgeprune.recovery.reconstruction import reconstruct
from edgeprune.surgery.plan import make_plan

RESULTS = Path(__file__).parent / "results" / "pruning_quality"
SPEEDUPS = (1.5, 2.0, 3.0)
TURNS, SEARCHES = 4, 2
"""Most plans of one method that are measured to meet one target, and most searches of NetAdapt."""
SEEDS = 3
"""Of the epoch, in a cell that is complete."""
OURS: dict[str, dict[str, Any]] = {
    "edgeprune": {"blocks": True, "settle": True},
    "edgeprune, for a refit": {"blocks": True, "refit": True},
    "edgeprune, LASSO, for a refit": {"blocks": True, "refit": True, "criterion": "lasso"},
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
_WAYS = ("settle", "refit", "netadapt")
"""Of `OURS`, what is no option of a planner."""


class Bench(DenseModel):
    """One network on the machine at hand."""

    def __init__(self, weights: Path, data: Path, minutes: float, board: Board, folder: Path) -> None:
        self.name = weights.stem
        model = padded_behind(load_model(weights))
        super().__init__(model, data, RESULTS / f"{self.name}.parquet", minutes, board, folder)
        self._planners: dict[tuple[Any, ...], Planner] = {}

    def planner(self, method: str) -> Planner:
        """Scores and damage are computed once for all targets, and for all methods that have them in common."""
        options = {name: value for name, value in OURS[method].items() if name not in _WAYS}
        key = tuple(sorted(options.items()))
        if key not in self._planners:
            self._planners[key] = Planner(self.model, self.kernels, self.predictor, task=self.task, **options)
        return self._planners[key]

    @cached_property
    def gradients(self) -> Mapping[str, torch.Tensor]:
        """Of the loss on all scoring images, for Taylor scores of the peer."""
        return peer.gradients(self.model, self.task.objectives[0].train)

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
            return Candidate(edgeprune.apply(self.model, plan), found["ratio"], {}, plan)
        module = self._cut(method, found["pruning_ratio"])
        return Candidate(module, found["ratio"], {}, peer.as_plan(self.graph, module))

    def _ours(self, method: str, target: float) -> Candidate | None:
        planner, ways = self.planner(method), OURS[method]
        first_ms = target * planner.dense_ms
        planner = planner.about(first_ms)
        if ways.get("settle"):
            planner = planner.settled(first_ms)
        if ways.get("refit"):
            planner = planner.settled(first_ms, refitting=self.example)
        seen: set[str] = set()

        def attempt(aim_ms: float) -> Candidate | None:
            proposal = _proposed(planner, aim_ms, target)
            if proposal is None or proposal.plan.hash in seen:
                return None
            seen.add(proposal.plan.hash)
            module = edgeprune.apply(self.model, proposal.plan)
            ratio = self.ratio(module)
            if ways.get("netadapt"):
                found = NETADAPT.search(planner, replace(proposal, aim_ms=aim_ms * min(1.0, target / ratio)))
                proposal = found.proposal
                module = edgeprune.apply(found.planner.model, proposal.plan)
                ratio = self.ratio(module)
            certificate = proposal.allocation.certificate
            details = {
                "predicted_share": proposal.predicted_ms / planner.dense_ms,
                "damage": certificate.damage,
                "gap": certificate.gap,
                "blocks_removed": len(proposal.plan.removed),
                "kept": json.dumps({name: group["kept"] for name, group in proposal.plan.groups.items()}),
            }
            # Reconstruction aims at the dense model, which NetAdapt has trained away from.
            return Candidate(module, ratio, details, None if ways.get("netadapt") else proposal.plan)

        return aimed(target, first_ms, attempt, SEARCHES if ways.get("netadapt") else TURNS)

    def _cut(self, method: str, ratio: float) -> nn.Module:
        return peer.cut(method, self.model, "linear", ratio, self.gradients if "taylor" in method else {})

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
            if measured <= OVER * target:
                return Candidate(module, measured, {"pruning_ratio": ratio}, peer.as_plan(self.graph, module))
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
        reconstruct(own, bench.graph, candidate.plan, bench.example, train, samples=SCORING_IMAGES)
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
        found |= recovered(bench, candidate)
        found |= {"board": bench.board.name, "host": host(), "seconds": time.monotonic() - started}
        if candidate.plan is None and method in OURS:
            path = trained(bench.name, speedup, method)
            save_file(candidate.module.state_dict(), path)
        yield found
    for seed in missing_seeds(found, seeds, KEY):
        if candidate is None:
            candidate = bench.again(method, found)
            if method in OURS and (path := trained(bench.name, speedup, method)).exists():
                candidate.module.load_state_dict(load_file(path))
                candidate = replace(candidate, plan=None)
        started = time.monotonic()
        module = refit(bench, candidate)
        fine_tune(module, bench.every_image, FineTuning(epochs=1, seed=seed), teacher=bench.model)
        accuracy = evaluate(module, bench.task)["accuracy"]
        found = found | {f"{KEY}{seed}": accuracy, f"seconds_of_seed{seed}": time.monotonic() - started}
        yield found


def trained(name: str, speedup: float, method: str) -> Path:
    """Where the weights are of a method that trains on the way."""
    return place(name, speedup, method).with_suffix(".safetensors")


def place(name: str, speedup: float, method: str) -> Path:
    """Where a cell's figures are."""
    spelled = method.replace(",", "").replace(" ", "-").replace("=", "")
    return RESULTS / f"{name}-{speedup:g}x-{spelled}.json"


def table(name: str) -> None:
    """Print what is there, how far ours are ahead, and what is missing."""
    missing, few, lines = [], [], []
    columns = (
        "network",
        "target",
        "method",
        "measured",
        "parameters",
        "cut",
        "batch norm",
        "reconstruction",
        "one epoch",
    )
    heading(*columns)
    for speedup in SPEEDUPS:
        cells: dict[str, dict[str, Any]] = {}
        for method in METHODS:
            path = place(name, speedup, method)
            if not path.exists():
                missing.append(path.stem)
                continue
            found, first = read(path), (name, f"{speedup:g}x", method)
            cells[method] = found
            if not found["reachable"]:
                row(*first, "not reachable", *("" for _ in columns[4:]))
                continue
            figures = [
                f"{found[key]:.1%}" if key in found else "-" for key in ("plain", "batch_norm", "reconstruction")
            ]
            if (seeds := sum(key.startswith(KEY) for key in found)) < SEEDS:
                few.append(f"{path.stem} ({seeds})")
            last = ", ".join(f"{value:.1%}" for key, value in found.items() if key.startswith(KEY)) or "-"
            row(*first, f"{1 / found['ratio']:.2f}x", f"{found['parameters']:,}", *figures, last)
        lines += ahead(cells, f"{name}, {speedup:g}x", peer.METHODS)
    print("\n".join(["", *lines]))
    if few:
        print(f"tuned with fewer than {SEEDS} seeds: {', '.join(few)}")
    print(f"missing: {', '.join(missing) or 'nothing'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--minutes", type=float, default=1.0, help="of profiling")
    parser.add_argument("--local", action="store_true", help="without the OpenSSH server: this machine as it is")
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
    opened: AbstractContextManager[Board] = Board.open("local") if options.local else loopback()
    with opened as board, tempfile.TemporaryDirectory(prefix="edgeprune-benchmark-") as folder:
        _run(Bench(options.weights, options.data, options.minutes, board, Path(folder)), wanted, options)
    table(options.weights.stem)


def _run(bench: Bench, methods: list[str], options: argparse.Namespace) -> None:
    for speedup in options.speedup or SPEEDUPS:
        for method in methods:
            path = place(bench.name, speedup, method)
            found = read(path)
            seeds = options.seeds if options.epoch else []
            if found and not missing_seeds(found, seeds, KEY):
                continue
            if missing_seeds(found, seeds, KEY) and found and method in OURS and "kept" not in found:
                found = {}  # of an earlier version, which did not say what it kept
            try:
                for done in cell(bench, method, speedup, seeds, found):
                    write(path, done)
                    figures = {key: value for key, value in done.items() if key not in ("host", "kept")}
                    print(f"{path.stem}: {figures}", flush=True)
            except EdgepruneError as error:
                print(f"{path.stem} failed: {type(error).__name__}: {error}", flush=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
