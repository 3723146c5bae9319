"""What does int8 cost and bring? Trained CIFAR-10 ResNets, dense and cut to half of their channels, on this machine as a board.

Per network and share of channels kept: the int8 engine is calibrated with training images; accuracy of the float and of the int8
engine on the 10 000 test images, layers that stay in float, size of the file, and the latency of int8 over float, timed in the
same rounds. A cell that is done is not run again; what is missing is printed. Use a machine that does nothing else meanwhile.

    python benchmarks/int8.py --data cifar10 --weights resnet20.safetensors resnet56.safetensors
    python benchmarks/int8.py --table                                        # only print what is there

Data and weights are those of `benchmarks/damage_curves.py`. Pillow must be installed, and ONNX Runtime.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from damage_curves import accuracy, images, load_model
from quickstart import host
from torch.nn import functional as F

import edgeprune
from edgeprune.files import write_text
from edgeprune.profiling.comparing import compare
from edgeprune.recovery.batch_norm import reestimate_batch_norm
from edgeprune.recovery.reconstruction import reconstruct
from edgeprune.surgery.constraints import Constraints
from edgeprune.tasks.limits import Tolerance
from edgeprune.tasks.task import Task

RESULTS = Path(__file__).parent / "results" / "int8"
SHARES = (1.0, 0.5)
TRAIN_IMAGES, TEST_IMAGES, BATCH, ROUNDS = 2_000, 10_000, 100, 24


def cell(weights: Path, share: float, task: Task) -> dict[str, Any]:
    """One network, dense or uniformly cut and reconstructed."""
    model, example = load_model(weights).eval(), torch.zeros(1, 3, 32, 32)
    if share < 1:
        graph = edgeprune.trace(model, example)
        plan = edgeprune.uniform_plan(graph, ratio=1 - share, constraints=Constraints(multiple_of={"*": 4}))
        model = edgeprune.apply(model, plan)
        reconstruct(model, graph, plan, example, task.objectives[0].train, samples=TRAIN_IMAGES)
        reestimate_batch_norm(model, task.objectives[0].train)
    with tempfile.TemporaryDirectory(prefix="edgeprune-benchmark-") as folder, edgeprune.Board.open("local") as board:
        exact = edgeprune.compile(model, example, Path(folder) / "fp32", task=task, board=board)
        int8 = edgeprune.compile(
            model,
            example,
            Path(folder) / "int8",
            precision="int8",
            task=task,
            metric_loss=Tolerance(1.0),
            board=board,
        )
        engines = {name: one.folder / one.manifest.engine for name, one in (("fp32", exact), ("int8", int8))}
        with board.hold("benchmark"):
            ratio = compare(board, dict(engines), "fp32", rounds=ROUNDS).ratios["int8"]
        sizes = {name: engine.stat().st_size for name, engine in engines.items()}
    return {
        "weights": weights.stem,
        "share": share,
        "quantization": int8.manifest.quantization,
        **int8.manifest.metrics["accuracy"],
        "ratio": [ratio.low, ratio.ratio, ratio.high],
        "bytes": sizes,
        "host": host(),
    }


def table() -> None:
    """Print what is there."""
    print("| network | channels kept | layers in int8 | accuracy fp32 | int8 | latency int8 / fp32 | file |")
    print("|---|---|---|---|---|---|---|")
    for path in sorted(RESULTS.glob("*.json")):
        row = json.loads(path.read_text())
        told, (low, ratio, high) = row["quantization"], row["ratio"]
        print(
            f"| {row['weights']} | {row['share']:.0%} | {told['layers'] - len(told['kept'])} of {told['layers']} "
            f"| {row['module']:.2%} | {row['engine']:.2%} | {ratio:.2f} ({low:.2f} to {high:.2f}) "
            f"| {row['bytes']['int8'] / row['bytes']['fp32']:.2f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with the images")
    parser.add_argument("--weights", type=Path, nargs="*", default=[], help="checkpoints")
    parser.add_argument("--table", action="store_true", help="only print what is there")
    arguments = parser.parse_args()
    if not arguments.table:
        if arguments.data is None or not arguments.weights:
            parser.error("--data and --weights are needed, or --table")
        torch.set_num_threads(1)
        train, test = (
            list(zip(*(part.split(BATCH) for part in images(arguments.data / f"{split}.parquet", count)), strict=True))
            for split, count in (("train", TRAIN_IMAGES), ("test", TEST_IMAGES))
        )
        task = Task.single(train=train, validation=test, loss=F.cross_entropy, metric=accuracy, name="accuracy")
        for weights in arguments.weights:
            for share in SHARES:
                path = RESULTS / f"{weights.stem}-{share:.2f}.json"
                if not path.exists():
                    path.parent.mkdir(parents=True, exist_ok=True)
                    write_text(path, json.dumps(cell(weights, share, task), indent=1) + "\n")
                    print(f"{path.stem}: done", flush=True)
    table()
    missing = [
        f"{weights.stem}-{share:.2f}"
        for weights in arguments.weights
        for share in SHARES
        if not (RESULTS / f"{weights.stem}-{share:.2f}.json").exists()
    ]
    print(f"missing: {', '.join(missing) or 'nothing'}")


if __name__ == "__main__":
    main()
