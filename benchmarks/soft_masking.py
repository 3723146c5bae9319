"""Does training under masks that may change beat one cut, at equal epochs and latency? CIFAR-10 ResNet, several seeds.

All begin with the same dense checkpoint, the same training images and the same budget. One shot cuts at once (the exact
allocator on Taylor scores of 2 000 images) and tunes for all epochs; soft masking trains some of them under masks, at a constant
learning rate, then cuts, and tunes for the rest. One shot at the same rates is tuned with the learning rates of soft masking, so
that those are not what is compared. The one-shot plan is moved until its *measured* latency, as the interleaved ratio to the
dense engine, meets the target; soft masking aims at the predicted latency of that plan, and what its own plan takes is measured
and written beside it. Nobody is taught by the dense model, and batch norms are estimated anew after either cut. Accuracy is that
of the last epoch, on all test images.

A cell that is done is not run again; what is missing is printed.

    python benchmarks/soft_masking.py --data cifar10 --weights resnet20.safetensors --seeds 0 1 2
    python benchmarks/soft_masking.py --table                                        # only print what is there

Data and weights are those of `benchmarks/damage_curves.py`. Pillow must be installed.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pruning_quality
import torch
from damage_curves import accuracy, images
from equal_latency import Flipped, write
from pruning_quality import Bench
from quickstart import host
from torch.nn import functional as F

from edgeprune.boards.board import Board
from edgeprune.errors import BudgetInfeasibleError
from edgeprune.loop.planning import Planner, Proposal
from edgeprune.loop.realizing import realize
from edgeprune.loop.soft_masking import SoftMasking
from edgeprune.recovery.evaluation import evaluate
from edgeprune.recovery.fine_tuning import FineTuning, fine_tune
from edgeprune.surgery.cutting import apply
from edgeprune.tasks.task import Task

RESULTS = Path(__file__).parent / "results" / "soft_masking"
METHODS = ("one shot", "one shot same rates", "soft masking")
SEEDS = (0, 1, 2)


class Trial(Bench):
    """One network, a part of the training images, and one target."""

    def __init__(self, options: argparse.Namespace, board: Board, folder: Path) -> None:
        super().__init__(options.weights, options.data, options.minutes, board, folder)
        self.options = options

    @cached_property
    def tuning_task(self) -> Task:
        inputs, labels = images(self.data / "train.parquet", self.options.images)
        train = Flipped(inputs, labels)
        # Test images decide nothing, and 500 of them are enough to see that training goes well.
        seen = [self.task.objectives[0].validation[index] for index in range(5)]
        return Task.single(train=train, validation=seen, loss=F.cross_entropy, metric=accuracy, name="accuracy")

    @cached_property
    def first(self) -> tuple[Planner, Proposal, float]:
        """The one-shot plan that meets the target as measured, and its measured share of the dense latency."""
        planner = Planner(self.model, self.kernels, self.predictor, task=self.task)
        target = 1 / self.options.speedup
        aim_ms, best = target * planner.dense_ms, None
        for _ in range(pruning_quality.TURNS):
            try:
                proposal = planner.propose(aim_ms)
            except BudgetInfeasibleError as error:
                proposal = planner.propose(error.best_ms)
            ratio = self.ratio(apply(self.model, proposal.plan))
            if ratio <= 1.01 * target and (best is None or ratio > best[1]):
                best = (proposal, ratio)
            if abs(ratio / target - 1) <= 0.01:
                break
            aim_ms *= target / ratio
        if best is None:
            raise SystemExit(f"no plan was found that is measured to take {target:.0%} of the dense latency")
        return planner, *best

    def cell(self, method: str, seed: int) -> dict[str, Any]:
        planner, proposal, ratio = self.first
        started = time.monotonic()
        options = self.options
        tuning = FineTuning(epochs=options.epochs, lr=options.lr, seed=seed)
        planner = planner.rescored(self.model, planner.scores, criterion=planner.criterion)
        planner.task = self.tuning_task
        found: dict[str, Any] = {}
        if method == "soft masking":
            soft = SoftMasking(epochs=options.masked, every=options.every)
            searched = soft.search(planner, proposal, fine_tuning=tuning)
            planner, proposal, tuning = searched.planner, searched.proposal, soft.left(tuning, self.tuning_task)
            ratio = self.ratio(apply(planner.model, proposal.plan))
            details = dict(searched.record.details)
            details["allocations"] = len(details.pop("reallocations"))
            details.pop("epochs")
            found = details | {"masked_accuracy": searched.record.after["accuracy"]}
        elif method == "one shot same rates":
            begun = replace(tuning, epochs=options.masked, schedule="constant")
            tuning = replace(tuning, epochs=options.epochs - options.masked)
            module = realize(planner, proposal, self.example, fine_tuning=begun).module
            fine_tune(module, self.tuning_task, tuning)
        if method != "one shot same rates":
            module = realize(planner, proposal, self.example, fine_tuning=tuning).module
        return found | {
            "accuracy": evaluate(module, self.task)["accuracy"],
            "ratio": ratio,
            "predicted_ms": proposal.predicted_ms,
            "dense_predicted_ms": planner.dense_ms,
            "parameters": sum(value.numel() for value in module.parameters()),
            "widths": proposal.plan.widths(),
            "images": options.images,
            "epochs_in_all": options.epochs,
            "masked_epochs": options.masked if method == "soft masking" else 0,
            "every": options.every,
            "lr": options.lr,
            "seconds": time.monotonic() - started,
            "host": host(),
        }


def place(options: argparse.Namespace, method: str, seed: int) -> Path:
    """Where a cell's figures are."""
    size = f"{options.images}x{options.epochs}"
    masked = f"-{options.masked}of{options.epochs}" if method == "soft masking" else ""
    return RESULTS / (
        f"{options.weights.stem}-{options.speedup:g}x-{size}-{method.replace(' ', '_')}{masked}-seed{seed}.json"
    )


def table() -> None:
    """Print what is there, per setting the mean over the seeds, and what has fewer seeds than a figure is made of."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(RESULTS.glob("*-seed*.json")):
        rows.setdefault(path.stem.rpartition("-seed")[0], []).append(json.loads(path.read_text()))
    print(
        "| network, target, images x epochs, method | measured | parameters | accuracy by seed | mean | came back | kept |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, cells in rows.items():
        figures = [cell["accuracy"] for cell in cells]
        measured = ", ".join(f"{1 / cell['ratio']:.2f}x" for cell in cells)
        parameters = ", ".join(f"{cell['parameters']:,}" for cell in cells)
        returned = ", ".join(str(cell.get("returned", "-")) for cell in cells)
        stayed = ", ".join(str(cell.get("masked_before_and_kept", "-")) for cell in cells)
        each = ", ".join(f"{figure:.2%}" for figure in figures)
        mean = sum(figures) / len(figures)
        print(f"| {name} | {measured} | {parameters} | {each} | {mean:.2%} | {returned} | {stayed} |")
    few = [f"{name} ({len(cells)} of {len(SEEDS)} seeds)" for name, cells in rows.items() if len(cells) < len(SEEDS)]
    print(f"missing: {', '.join(few) or 'nothing of the settings that were begun'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--minutes", type=float, default=1.0, help="of profiling")
    parser.add_argument("--speedup", type=float, default=2.0)
    parser.add_argument("--images", type=int, default=50_000, help="training images of an epoch")
    parser.add_argument("--epochs", type=int, default=6, help="in all")
    parser.add_argument("--masked", type=int, default=3, help="of them under masks")
    parser.add_argument("--every", type=int, default=20, help="steps between allocations")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--method", action="append", choices=METHODS)
    parser.add_argument("--table", action="store_true", help="only print what is there")
    options = parser.parse_args()
    if options.table:
        table()
        return
    if options.data is None or options.weights is None:
        parser.error("--data and --weights must be given")
    torch.set_num_threads(1)
    RESULTS.mkdir(parents=True, exist_ok=True)
    pruning_quality.RESULTS.mkdir(parents=True, exist_ok=True)
    cells = [(method, seed) for seed in options.seeds for method in options.method or METHODS]
    missing = [cell for cell in cells if not place(options, *cell).exists()]
    if missing:
        print("missing:", ", ".join(place(options, *cell).stem for cell in missing), flush=True)
        with Board.open("local") as board, tempfile.TemporaryDirectory(prefix="edgeprune-benchmark-") as folder:
            trial = Trial(options, board, Path(folder))
            for method, seed in missing:
                done = trial.cell(method, seed)
                write(place(options, method, seed), done)
                print(
                    f"{place(options, method, seed).stem}: {done['accuracy']:.2%}, {1 / done['ratio']:.3f}x", flush=True
                )
    table()


if __name__ == "__main__":
    main()
