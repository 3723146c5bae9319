"""What is a pruned vision transformer worth at equal measured latency? Tiles and channels together, beside other ways.

The dense model is that of `vit_training.py` (CIFAR-10, width 128, six layers). Every method's plan is moved until the measured
latency, as the interleaved ratio to the dense engine, meets the target (at most 1 % above it); one that cannot is "not
reachable". Then all get the same recovery: fine-tuning with the same settings, taught by the dense model, over several seeds.
Accuracy is that on the test images.

- joint: tiles and channels in one allocation; channels: the same search without tiles; tiles: tiles alone;
- uniform: the same share of heads and of hidden units of every block, the least Taylor scores first;
- published: LPViT's published search by floating-point operations, its target moved until the latency is met;
- torch-pruning: its example for vision transformers (`pruning_rivals/torch_pruning_vit.py`), where it is installed.

How fast a larger one runs, DeiT-S end to end and its layers, is told by `block_sparse.py`.

A cell that is done is not run again; what is missing is printed. Use a machine that does nothing else meanwhile.

    python benchmarks/vit.py --data cifar10 --weights vit.safetensors --seeds 0 1 2
    python benchmarks/vit.py --table                                                  # only print what is there
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
import time
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from damage_curves import accuracy
from equal_latency import OVER, Candidate, DenseModel, aimed, heading, missing_seeds, read, row, write
from pruning_rivals import torch_pruning_vit as peer
from quickstart import host
from torch import nn
from vit_model import load_vit

import edgeprune
from edgeprune.allocation.tiles.costs import flops, layer_tokens
from edgeprune.allocation.tiles.problem import TileLayer, TileProblem, least_kept
from edgeprune.allocation.tiles.published import Published
from edgeprune.allocation.tiles.slope import SlopeSearch
from edgeprune.boards.board import Board
from edgeprune.criteria.damage import best_units
from edgeprune.criteria.taylor import Taylor
from edgeprune.criteria.tiles.curves import tile_curves
from edgeprune.criteria.tiles.losses import squared_outputs
from edgeprune.criteria.tiles.sums import gradient_sums
from edgeprune.errors import BudgetInfeasibleError, EmptyPlanError
from edgeprune.loop.joint.choosing import Channels, JointChoosing
from edgeprune.loop.tile_costs import plan_of
from edgeprune.recovery.evaluation import evaluate
from edgeprune.recovery.fine_tuning import FineTuning, fine_tune
from edgeprune.surgery.plan import PruningPlan, make_plan
from edgeprune.surgery.tiles import tile_grids
from edgeprune.tasks.task import Task

RESULTS = Path(__file__).parent / "results" / "vit"
SPEEDUPS = (1.5, 2.0)
TURNS = 6
KEY = "seed"
OURS = ("joint", "channels", "tiles")
METHODS = (*OURS, "uniform", "published", *peer.METHODS)


class Bench(DenseModel):
    """The dense model on the machine at hand."""

    def __init__(self, options: argparse.Namespace, board: Board, folder: Path) -> None:
        self.options = options
        super().__init__(
            load_vit(options.weights),
            options.data,
            RESULTS / f"{options.weights.stem}.parquet",
            options.minutes,
            board,
            folder,
            every=options.images,
            test_images=options.test_images,
            tiles=(tuple(options.tile),),
        )
        self.grids = tile_grids(self.model, self.graph, tuple(options.tile))
        self.tokens = layer_tokens(self.model, self.example, self.grids)
        self._choosing: dict[str, JointChoosing] = {}

    def candidate(self, method: str, speedup: float) -> Candidate | None:
        """A method's model for a target; None where it cannot reach it."""
        if method in OURS:
            return self._aimed(method, 1 / speedup)
        if method in peer.METHODS:
            return self._least(
                [{"pruning_ratio": ratio} for ratio in peer.RATIOS],
                1 / speedup,
                lambda one: (self._cut(method, one), None),
            )
        settings = (
            [{"heads": heads, "hidden": hidden} for heads in (4, 3, 2, 1) for hidden in range(512, 0, -32)]
            if method == "uniform"
            else [{"flops": round(1 - step / 40, 3)} for step in range(1, 38)]
        )
        if method == "uniform":
            # One share for both: hidden units in step with heads, as near as heads allow.
            settings = [one for one in settings if abs(one["hidden"] / 512 - one["heads"] / 4) <= 0.125]
        plans = self._uniform if method == "uniform" else self._published

        def made(one: dict[str, Any]) -> tuple[nn.Module, PruningPlan]:
            plan = plans(one)
            return edgeprune.apply(self.model, plan), plan

        return self._least(settings, 1 / speedup, made)

    def again(self, method: str, found: dict[str, Any], plan: PruningPlan | None) -> nn.Module:
        """The model that a cell was measured with."""
        return self._cut(method, found) if plan is None else edgeprune.apply(self.model, plan)

    def _aimed(self, method: str, target: float) -> Candidate | None:
        """Ours, with the aim moved by what was measured."""
        if method not in self._choosing:
            grids = {} if method == "channels" else self.grids
            keep = edgeprune.Constraints(keep=["*"]) if method == "tiles" else edgeprune.Constraints()
            self._choosing[method] = JointChoosing(
                self.model,
                self.kernels,
                self.predictor,
                grids,
                self.tokens,
                self.task,
                Channels(keep, blocks=method != "tiles"),
                batches=64,
                latency=True,
            )
        choosing, seen = self._choosing[method], set[str]()

        def attempt(aim: float) -> Candidate | None:
            try:
                chosen = choosing.choose(min(aim, 0.999 * choosing.dense))
            except BudgetInfeasibleError:
                return None
            if chosen.plan.hash in seen:
                return None
            seen.add(chosen.plan.hash)
            module = edgeprune.apply(self.model, chosen.plan)
            said = {
                "predicted_share": chosen.cost / choosing.dense,
                "damage": chosen.allocation.damage,
                "tiled_layers": len(chosen.plan.kept_tiles),
                "blocks_removed": len(chosen.plan.removed),
                "merged": {name: list(counts) for name, counts in chosen.merged.items()},
            }
            return Candidate(module, self.ratio(module), said, chosen.plan)

        return aimed(target, target * choosing.dense, attempt, TURNS)

    def _least(self, settings: list[dict[str, Any]], target: float, made: Any) -> Candidate | None:
        """The mildest of several settings, from mild to harsh, that meets a target: halved in on, its neighbors looked at."""
        low, high = -1, len(settings)
        while high - low > 1:
            middle = (low + high) // 2
            try:
                module, _ = made(settings[middle])
                fits = self.ratio(module, rounds=6, precision=0.02) <= OVER * target
            except (BudgetInfeasibleError, EmptyPlanError):
                fits = False
            low, high = (low, middle) if fits else (middle, high)
        for place in range(max(0, high - 1), len(settings)):
            try:
                module, plan = made(settings[place])
            except (BudgetInfeasibleError, EmptyPlanError):
                continue
            ratio = self.ratio(module)
            if ratio <= OVER * target:
                return Candidate(module, ratio, settings[place], plan)
        return None

    @cached_property
    def _scores(self) -> dict[str, Any]:
        return Taylor().score(self.graph, self.model, self.task)

    def _uniform(self, one: dict[str, Any]) -> PruningPlan:
        kept = {}
        for group in self.graph.groups:
            wanted = (
                one["heads"] if group.unit == "head" else one["hidden"] if group.name.endswith("fc1") else group.size
            )
            if wanted < group.size:
                kept[group.name] = best_units(self._scores[group.name], wanted)
        return make_plan(self.graph, kept)

    @cached_property
    def _problem(self) -> TileProblem:
        objective = self.task.objectives[0]
        squared = Task.single(
            train=objective.train, validation=objective.validation, loss=squared_outputs, metric=accuracy, name="none"
        )
        curves = tile_curves(gradient_sums(self.model, self.grids, squared), "taylor", curvature="mean", convex=False)
        layers = {
            name: TileLayer(one, flops(one, self.tokens[name]), least=least_kept(one)) for name, one in curves.items()
        }
        return TileProblem(layers)

    def _published(self, one: dict[str, Any]) -> PruningPlan:
        problem = self._problem
        found = SlopeSearch(compat=Published(tolerance=0.005)).search(problem, one["flops"] * problem.dense)
        curves = {name: layer.curve for name, layer in problem.layers.items()}
        return plan_of(self.kernels, curves, found.counts)

    def _cut(self, method: str, one: dict[str, Any]) -> nn.Module:
        return peer.cut(method, self.model, one["pruning_ratio"], self.task.objectives[0].train)


def cell(bench: Bench, method: str, speedup: float, found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One method at one target, as far as it is done after each step; what `found` has already is kept."""
    path, module = place(method, speedup), None
    if "reachable" not in found:
        started = time.monotonic()
        candidate = bench.candidate(method, speedup)
        if candidate is None:
            yield {"reachable": False, "host": host()}
            return
        module = candidate.module
        if candidate.plan is not None:
            candidate.plan.save(path.with_suffix(".plan"))
        found = {
            "reachable": True,
            "ratio": candidate.ratio,
            "parameters": sum(value.numel() for value in module.parameters()),
            **candidate.details,
            "plain": evaluate(module, bench.task)["accuracy"],
            "seconds": time.monotonic() - started,
            "epochs": bench.options.epochs,
            "host": host(),
        }
        yield found
    for seed in missing_seeds(found, bench.options.seeds, KEY):
        saved = path.with_suffix(".plan")
        module = bench.again(method, found, PruningPlan.load(saved) if saved.exists() else None)
        settings = FineTuning(epochs=bench.options.epochs, lr=bench.options.lr, seed=seed)
        fine_tune(module, bench.every_image, settings, teacher=bench.model)
        found = found | {f"{KEY}{seed}": evaluate(module, bench.task)["accuracy"]}
        yield found


def place(method: str, speedup: float) -> Path:
    """Where a cell's figures are."""
    return RESULTS / f"{speedup:g}x-{method.replace(' ', '-')}.json"


def table(seeds: list[int]) -> None:
    """Print what is there, how far joint is ahead seed by seed, and what is missing."""
    heading("target", "method", "measured", "parameters", "cut", "tuned", "joint is ahead by")
    missing = []
    for speedup in SPEEDUPS:
        joint = read(place("joint", speedup))
        for method in METHODS:
            found = read(place(method, speedup))
            if not found or missing_seeds(found, seeds, KEY):
                missing.append(f"{speedup:g}x {method} {missing_seeds(found, seeds, KEY) if found else ''}".strip())
            if not found or not found["reachable"]:
                row(f"{speedup:g}x", method, "not reachable" if found else "missing", "", "", "", "")
                continue
            tuned = [found[f"{KEY}{seed}"] for seed in seeds if f"{KEY}{seed}" in found]
            pairs = [
                100 * (joint[f"{KEY}{seed}"] - found[f"{KEY}{seed}"])
                for seed in seeds
                if method != "joint" and f"{KEY}{seed}" in found and f"{KEY}{seed}" in joint
            ]
            error = f" ± {stdev(pairs) / len(pairs) ** 0.5:.2f}" if len(pairs) > 1 else ""
            ahead = f"{mean(pairs):+.2f} points{error}" if pairs else ""
            row(
                f"{speedup:g}x",
                method,
                f"{1 / found['ratio']:.2f}x",
                f"{found['parameters']:,}",
                f"{found['plain']:.1%}",
                ", ".join(f"{value:.2%}" for value in tuned) or "-",
                ahead,
            )
    print(f"missing: {'; '.join(missing) or 'nothing'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--tile", type=int, nargs=2, default=(32, 64))
    parser.add_argument("--minutes", type=float, default=2.0, help="of profiling")
    parser.add_argument("--epochs", type=int, default=3, help="of fine-tuning")
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=50_000, help="training images; fewer for a try-out")
    parser.add_argument("--test-images", type=int, default=10_000)
    parser.add_argument("--only", action="append", choices=METHODS)
    parser.add_argument("--speedup", type=float, action="append", choices=SPEEDUPS)
    parser.add_argument("--table", action="store_true", help="only print what is there")
    options = parser.parse_args()
    if options.table:
        table(options.seeds)
        return
    if options.data is None or options.weights is None:
        parser.error("--data and --weights must be given")
    torch.set_num_threads(1)
    RESULTS.mkdir(parents=True, exist_ok=True)
    with_peer = importlib.util.find_spec("torch_pruning") is not None
    wanted = [name for name in options.only or METHODS if with_peer or name not in peer.METHODS]
    with Board.open("local") as board, tempfile.TemporaryDirectory(prefix="edgeprune-benchmark-") as folder:
        bench = Bench(options, board, Path(folder))
        print(f"dense: {evaluate(bench.model, bench.task)['accuracy']:.2%} of the test images", flush=True)
        for speedup in options.speedup or SPEEDUPS:
            for method in wanted:
                found = read(place(method, speedup))
                if found and not missing_seeds(found, options.seeds, KEY):
                    continue
                for done in cell(bench, method, speedup, found):
                    write(place(method, speedup), done)
                    print(f"{speedup:g}x {method}: { {key: done[key] for key in done if key != 'host'} }", flush=True)
    table(options.seeds)


if __name__ == "__main__":
    main()
