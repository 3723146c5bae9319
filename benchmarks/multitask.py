"""Three tasks on one trunk: limits per task, and what the ways to choose widths leave of each metric at one predicted latency.

The network of `multitask_scenes.py` is trained once per seed on rendered scenes (64x64), pruned to a share of its predicted
latency in each way, and tuned equally. Latencies are predicted with the latency table that is given; nothing is timed. Metrics
are those of test scenes that neither training nor search nor tuning saw. A cell that is done is not run again.

    python benchmarks/multitask.py --latency-table tests/data/onnxruntime_avx512_kernels.parquet --seeds 0
    python benchmarks/multitask.py --table                                             # only print what is there
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from multitask_scenes import SceneNet, scenes
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import edgeprune
from edgeprune.loop.multitask.pagcp import Pagcp
from edgeprune.loop.multitask.per_task import PerTask
from edgeprune.recovery.evaluation import evaluate
from edgeprune.recovery.fine_tuning import FineTuning, fine_tune
from edgeprune.tasks.task import Objective, Task

RESULTS = Path(__file__).parent / "results" / "multitask"
SIZE, BATCH = 64, 50
TRAIN, VALIDATION, TEST = 1_000, 200, 500
EPOCHS, RECOVERY, LEARNING_RATE = 6, 1, 3e-3
LIMIT = "25%"
"""Of every task: in PAGCP before recovery, with a curve per task as unit; the table has metrics after it."""
NAMES = ("seg", "depth", "normals")

Way = dict[str, Any]
WAYS: dict[str, Callable[[], Way]] = {
    "PAGCP": lambda: {"pagcp": Pagcp(rounds=1)},
    "PAGCP, 3 rounds with 20 steps between": lambda: {"pagcp": Pagcp(rounds=3, tuning_steps=20)},
    "exact, summed damage": dict,
    "exact, summed damage, calibrated": lambda: {"calibrate_damage": _calibration()},
    "exact, a curve per task": lambda: {"per_task": PerTask(calibration=None)},
    "exact, a curve per task, calibrated": lambda: {"per_task": PerTask()},
    "uniform": lambda: {"allocator": "uniform"},
    "exact, damage of seg alone": lambda: {"only": "seg"},
    "exact, damage of depth alone": lambda: {"only": "depth"},
    "exact, damage of normals alone": lambda: {"only": "normals"},
}


def _calibration() -> Any:
    from edgeprune.criteria.calibration import DamageCalibration

    return DamageCalibration()


def loss_of(name: str) -> Callable[[dict[str, Tensor], dict[str, Tensor]], Tensor]:
    """Cross-entropy, mean absolute depth error, or one minus the cosine."""
    losses: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "seg": F.cross_entropy,
        "depth": lambda found, wanted: 5.0 * F.l1_loss(found, wanted),
        "normals": lambda found, wanted: (1 - (found * wanted).sum(1)).mean(),
    }
    return lambda outputs, targets: losses[name](outputs[name], targets[name])


def metric_of(name: str) -> Callable[[dict[str, Tensor], dict[str, Tensor]], float]:
    """Share of the pixels of the right class, mean absolute depth error, mean cosine with the normal."""
    metrics: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "seg": lambda found, wanted: (found.argmax(1) == wanted).float().mean(),
        "depth": lambda found, wanted: (found - wanted).abs().mean(),
        "normals": lambda found, wanted: (found * wanted).sum(1).mean(),
    }
    return lambda outputs, targets: float(metrics[name](outputs[name], targets[name]))


class Named(torch.utils.data.Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """Images with their targets by name."""

    def __init__(self, count: int, seed: int) -> None:
        images, targets = scenes(count, SIZE, seed)
        self._names, self._data = tuple(targets), TensorDataset(images, *targets.values())

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        image, *targets = self._data[index]
        return image, dict(zip(self._names, targets, strict=True))


def task_of(train: Any, validation: Any) -> Task:
    """The three objectives on one loader each split."""
    return Task(
        tuple(
            Objective(name, train, validation, loss_of(name), metric_of(name), name != "depth", limit=LIMIT)
            for name in NAMES
        )
    )


def dense(seed: int, width: int, task: Task, folder: Path) -> nn.Module:
    """The trained network; its weights are kept in a folder."""
    path = folder / f"{width}-{seed}.safetensors"
    torch.manual_seed(seed)
    model = SceneNet(width)
    from safetensors.torch import load_file, save_file

    if path.is_file():
        model.load_state_dict(load_file(path))
    else:
        fine_tune(model, task, epochs=EPOCHS, lr=LEARNING_RATE, seed=seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(model.state_dict(), path)
    return model.eval()


def cell(model: nn.Module, way: str, share: float, seed: int, task: Task, test: Task, predictor: Any) -> dict[str, Any]:
    """One way and seed."""
    settings = WAYS[way]()
    only = settings.pop("only", None)
    example = torch.zeros(1, 3, SIZE, SIZE)
    tuning = FineTuning(epochs=RECOVERY, lr=LEARNING_RATE, seed=seed)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        graph = edgeprune.trace(model, example)
        kernels = edgeprune.lower(graph, model=model, device=predictor.table.target(), workdir=Path(folder))
        given: dict[str, Any] = {"graph": graph, "kernel_graph": kernels}
        budget = edgeprune.Budget(latency_ratio=share)
        if only is None:
            result = edgeprune.prune(
                model, example, budget, None, predictor, task, fine_tuning=tuning, **settings, **given
            )
            module = result.module
        else:
            # The plan sees one task; tuning sees all, as everywhere.
            lone = Task((task.objective(only),))
            result = edgeprune.prune(
                model, example, budget, None, predictor, lone, fine_tuning=FineTuning(epochs=0), **given
            )
            module = result.module
            fine_tune(module, task, tuning)
    return {
        "way": way,
        "seed": seed,
        "share": share,
        "predicted_share": result.predicted_ms / result.dense_predicted_ms,
        "parameters_share": _count(module) / _count(model),
        "dense": evaluate(model, test),
        "pruned": evaluate(module, test),
        "seconds": time.monotonic() - began,
        "notes": list(result.notes),
        "widths": result.plan.widths(),
        "search": dict(result.recovery[0].details) if result.recovery[0].step in ("pagcp", "per_task") else {},
    }


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def worst(row: dict[str, Any]) -> float:
    """The largest relative loss of a metric."""
    sign = {"seg": 1, "depth": -1, "normals": 1}
    return max(sign[name] * (row["dense"][name] - row["pruned"][name]) / abs(row["dense"][name]) for name in NAMES)


def table() -> None:
    """Print what is there."""
    rows = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    print(
        "| share | way | seed | predicted | parameters | pixels right | depth error | cosine | worst relative loss | s |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for row in sorted(rows, key=lambda one: (one["share"], list(WAYS).index(one["way"]), one["seed"])):
        figures = " | ".join(f"{row['dense'][name]:.4f} → {row['pruned'][name]:.4f}" for name in NAMES)
        print(
            f"| {row['share']:.0%} | {row['way']} | {row['seed']} | {row['predicted_share']:.1%} | "
            f"{row['parameters_share']:.0%} | {figures} | {worst(row):.1%} | {row['seconds']:.0f} |"
        )


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latency-table", type=Path, help="of the board that latencies are predicted for")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5], help="of the dense latency")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--weights", type=Path, default=Path(tempfile.gettempdir()) / "edgeprune-multitask")
    parser.add_argument("--table", action="store_true", help="only print what is there")
    arguments = parser.parse_args()
    if not arguments.table:
        torch.set_num_threads(1)
        predictor = edgeprune.fit(edgeprune.LatencyTable.load(arguments.latency_table))
        train = DataLoader(Named(TRAIN, 1), batch_size=BATCH, shuffle=True)
        validation, held = (
            DataLoader(Named(count, seed), batch_size=100) for count, seed in ((VALIDATION, 2), (TEST, 3))
        )
        task, test = task_of(train, validation), task_of(train, held)
        RESULTS.mkdir(parents=True, exist_ok=True)
        for seed in arguments.seeds:
            model = dense(seed, arguments.width, task, arguments.weights)
            print(f"seed {seed}: {evaluate(model, test)}", flush=True)
            for share in arguments.shares:
                for way in arguments.ways:
                    path = RESULTS / f"{arguments.width}-{seed}-{share:g}-{way.replace(' ', '-').replace(',', '')}.json"
                    if not path.is_file():
                        try:
                            row = cell(model, way, share, seed, task, test, predictor)
                        except edgeprune.errors.BudgetInfeasibleError as error:
                            print(f"{way} at {share:.0%}: {error}", flush=True)
                            continue
                        path.write_text(json.dumps(row, indent=1) + "\n")
                        print(way, row["pruned"], f"{row['seconds']:.0f} s", flush=True)
    table()


if __name__ == "__main__":
    main()
