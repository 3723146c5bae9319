"""What does the dense model bring as a teacher? A trained CIFAR-10 ResNet, uniformly cut, tuned for a short time, on test images.

Every way begins with the same cut model whose batch norms were re-estimated, and takes the same steps on the same images. A cell
that is done is not run again; what is missing is run.

    python benchmarks/distillation.py --data cifar10 --weights resnet20.safetensors --seeds 0 1
    python benchmarks/distillation.py --table                                          # only print what is there

Data and weights are those of `benchmarks/damage_curves.py`. Pillow must be installed.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from damage_curves import accuracy, images, load_model
from equal_latency import write
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import edgeprune
from edgeprune.recovery.batch_norm import reestimate_batch_norm
from edgeprune.recovery.fine_tuning import fine_tune
from edgeprune.recovery.taps import find_taps
from edgeprune.tasks.task import Task

RESULTS = Path(__file__).parent / "results" / "distillation"
WAYS: dict[str, dict[str, Any]] = {
    "no teacher": {},
    "no teacher, --ema 0.99": {"ema": 0.99},
    "logits": {"distillation": ("logits",)},
    "features": {"distillation": ("features",)},
    "channelwise": {"distillation": ("channelwise",)},
    "attention": {"distillation": ("attention",)},
    "logits and features": {"distillation": ("logits", "features")},
}
RATIO = 0.4
"""Of the channels of every group, which are removed by L2 norm."""
TRAIN_IMAGES, TEST_IMAGES, BATCH, EPOCHS, LEARNING_RATE = 4_000, 2_000, 100, 2, 2e-3


def cell(weights: Path, way: str, seed: int, task: Task) -> dict[str, Any]:
    """One network, way and seed."""
    model = load_model(weights)
    graph = edgeprune.trace(model, torch.zeros(1, 3, 32, 32))
    plan = edgeprune.uniform_plan(graph, RATIO)
    module = edgeprune.apply(model, plan)
    torch.manual_seed(0)
    reestimate_batch_norm(module, task.objectives[0].train)
    settings = copy.copy(WAYS[way])
    if "distillation" in settings:
        settings |= {"teacher": model, "taps": find_taps(graph, plan, module)}
    record = fine_tune(module, task, epochs=EPOCHS, lr=LEARNING_RATE, seed=seed, **settings)
    return {
        "weights": weights.stem,
        "way": way,
        "seed": seed,
        "before": record.before["accuracy"],
        "after": record.after["accuracy"],
        "taps": [tap.name for tap in settings.get("taps", ())],
        "details": dict(record.details),
    }


def place(network: str, way: str, seed: int) -> Path:
    """Where the figures of a cell are."""
    return RESULTS / f"{network}-{way.replace(' ', '_').replace(',', '')}-{seed}.json"


def table(wanted: Iterable[tuple[str, int]] = ()) -> None:
    """Print what is there, and what is missing of these networks and seeds and of all that something is there of."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for path in sorted(RESULTS.glob("*.json")):
        row = json.loads(path.read_text())
        found[row["weights"], row["way"]].append(row)
    print("| network | way | before | after, by seed | mean |")
    print("|---|---|---|---|---|")
    for (weights, way), rows in sorted(found.items(), key=lambda item: (item[0][0], list(WAYS).index(item[0][1]))):
        after = [row["after"] for row in rows]
        figures = ", ".join(f"{one:.1%}" for one in after)
        print(f"| {weights} | {way} | {rows[0]['before']:.1%} | {figures} | {sum(after) / len(after):.1%} |")
    cells = sorted({*wanted, *((row["weights"], row["seed"]) for rows in found.values() for row in rows)})
    paths = [place(network, way, seed) for network, seed in cells for way in WAYS]
    print(f"missing: {', '.join(path.stem for path in paths if not path.exists()) or 'nothing'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--weights", type=Path, nargs="+", default=[])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
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
        TensorDataset(*images(arguments.data / f"{split}.parquet", count))
        for split, count in (("train", TRAIN_IMAGES), ("test", TEST_IMAGES))
    )
    task = Task.single(
        train=DataLoader(train, BATCH, shuffle=True),
        validation=DataLoader(test, 500),
        loss=F.cross_entropy,
        metric=accuracy,
        name="accuracy",
    )
    for weights in arguments.weights:
        for seed in arguments.seeds:
            for way in WAYS:
                path = place(weights.stem, way, seed)
                if not path.exists():
                    found = cell(weights, way, seed, task)
                    write(path, found)
                    print({name: value for name, value in found.items() if name != "details"}, flush=True)
    table((weights.stem, seed) for weights in arguments.weights for seed in arguments.seeds)


if __name__ == "__main__":
    main()
