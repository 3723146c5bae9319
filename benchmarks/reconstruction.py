"""What does least-squares reconstruction bring before any training? Trained CIFAR-10 ResNets, uniformly cut, on test images.

For each network, share of channels kept and criterion: accuracy of the cut model as it is, after batch-norm re-estimation, after
reconstruction, and after both; all from the same training images, without labels (the scores of some criteria use them). A cell
that is done is not run again; what is missing is printed.

    python benchmarks/reconstruction.py --data cifar10 --weights resnet20.safetensors resnet56.safetensors
    python benchmarks/reconstruction.py --table                                        # only print what is there

Data and weights are those of `benchmarks/damage_curves.py`. Pillow must be installed.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from damage_curves import accuracy, images, load_model
from equal_latency import write
from torch.nn import functional as F

import edgeprune
from edgeprune.criteria import registry
from edgeprune.criteria.damage import best_units
from edgeprune.recovery.batch_norm import reestimate_batch_norm
from edgeprune.recovery.evaluation import evaluate
from edgeprune.recovery.reconstruction import reconstruct
from edgeprune.surgery.plan import make_plan
from edgeprune.tasks.task import Task

RESULTS = Path(__file__).parent / "results" / "reconstruction"
CRITERIA = ("l2", "taylor", "lasso")
SHARES = (0.75, 0.6, 0.5)
"""Of the channels of every group, which are kept."""
TRAIN_IMAGES, TEST_IMAGES, BATCH = 2_000, 2_000, 100


def cell(weights: Path, criterion: str, share: float, task: Task) -> dict[str, Any]:
    """One network, criterion and share."""
    model = load_model(weights)
    example = torch.zeros(1, 3, 32, 32)
    graph = edgeprune.trace(model, example)
    scores = registry.get(criterion).score(graph, model, task)
    kept = {name: best_units(values, max(1, round(share * len(values)))) for name, values in scores.items()}
    plan = make_plan(graph, kept)
    loader = task.objectives[0].train
    found: dict[str, Any] = {"weights": weights.stem, "criterion": criterion, "share": share}
    found["dense"] = evaluate(model, task)["accuracy"]
    cut = edgeprune.apply(model, plan)
    found["plain"] = evaluate(cut, task)["accuracy"]
    normed = copy.deepcopy(cut)
    reestimate_batch_norm(normed, loader)
    found["batch_norm"] = evaluate(normed, task)["accuracy"]
    started = time.monotonic()
    record = reconstruct(cut, graph, plan, example, loader, samples=TRAIN_IMAGES)
    found["seconds"] = time.monotonic() - started
    found["reconstruction"] = evaluate(cut, task)["accuracy"]
    found["errors"] = dict(record.details)
    reestimate_batch_norm(cut, loader)
    found["both"] = evaluate(cut, task)["accuracy"]
    return found


def place(network: str, share: float, criterion: str) -> Path:
    """Where the figures of a cell are."""
    return RESULTS / f"{network}-{share:.2f}-{criterion}.json"


def table(networks: Sequence[str] = ()) -> None:
    """Print what is there, and what is missing of these networks and of all that something is there of."""
    rows = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json")) if path.stem[:7] != "layers-"]
    wanted = sorted({*networks, *(row["weights"] for row in rows)})
    print("| network | kept | criterion | dense | cut | batch norm | reconstruction | both | seconds |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        figures = [f"{row[name]:.1%}" for name in ("dense", "plain", "batch_norm", "reconstruction", "both")]
        print(
            f"| {row['weights']} | {row['share']:.0%} | {row['criterion']} | {' | '.join(figures)} | {row['seconds']:.0f} |"
        )
    cells = [place(*one) for one in itertools.product(wanted, SHARES, CRITERIA)]
    print(f"missing: {', '.join(path.stem for path in cells if not path.exists()) or 'nothing'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--weights", type=Path, nargs="+", default=[])
    parser.add_argument("--table", action="store_true", help="only print the table")
    arguments = parser.parse_args()
    if arguments.table:
        table()
        return
    if arguments.data is None or not arguments.weights:
        parser.error("--data and --weights are needed, or --table")
    torch.set_num_threads(1)
    RESULTS.mkdir(parents=True, exist_ok=True)
    train, test = (
        list(
            zip(*(torch.split(part, BATCH) for part in images(arguments.data / f"{split}.parquet", count)), strict=True)
        )
        for split, count in (("train", TRAIN_IMAGES), ("test", TEST_IMAGES))
    )
    task = Task.single(train=train, validation=test, loss=F.cross_entropy, metric=accuracy, name="accuracy")
    for weights in arguments.weights:
        for share in SHARES:
            for criterion in CRITERIA:
                path = place(weights.stem, share, criterion)
                if not path.exists():
                    found = cell(weights, criterion, share, task)
                    write(path, found)
                    print({name: value for name, value in found.items() if name != "errors"}, flush=True)
    table([weights.stem for weights in arguments.weights])


if __name__ == "__main__":
    main()
