"""How fast is TVM without tuning? A CIFAR ResNet-20, beside ONNX Runtime and torch eager, on one thread of this machine.

All three are timed in one process, interleaved: every round times each once, in an order that changes, after a warm-up. The
figure that counts is the ratio to torch eager in the same round; milliseconds stand beside it. Outputs are compared first.
Weights are random: they do not change the time. Needs the extras ``onnxruntime`` and ``tvm``.

    PYTHONPATH=. OMP_NUM_THREADS=1 python benchmarks/tvm_untuned.py            # into benchmarks/results/tvm_untuned.json
    PYTHONPATH=. OMP_NUM_THREADS=1 python benchmarks/tvm_untuned.py --table    # only print what is there
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from predictor_networks import families

import edgeprune.boards.onboard
from edgeprune.backends import registry
from edgeprune.boards.board import Board
from edgeprune.files import write_text

RESULT = Path(__file__).parent / "results" / "tvm_untuned.json"
REFERENCE = "torch eager"


def engine_of(name: str, model: torch.nn.Module, x: torch.Tensor, folder: Path) -> tuple[Any, float, int]:
    """An engine as the board's runner loads it, seconds to compile it, and bytes of its file."""
    import engines

    backend = registry.get(name)
    path = folder / f"engine-{name}{backend.suffix}"
    started = time.perf_counter()
    backend.export(model, (x,), path)
    seconds = time.perf_counter() - started
    return engines.load({"blob": path.name}, str(folder), name, 1), seconds, path.stat().st_size


def measure(rounds: int, sample_ms: float) -> dict[str, Any]:
    """Milliseconds of each, and ratios of the same round."""
    torch.set_num_threads(1)
    model, x = families.cifar_resnet20()
    with torch.inference_mode():
        want = model(x).numpy()

    def eager(times: int) -> None:
        for _ in range(times):
            model(x)

    found: dict[str, dict[str, Any]] = {REFERENCE: {}}
    runs: dict[str, Callable[[int], None]] = {REFERENCE: eager}
    with tempfile.TemporaryDirectory(prefix="edgeprune-benchmark-") as name:
        for backend in ("onnxruntime", "tvm"):
            engine, seconds, size = engine_of(backend, model, x, Path(name))
            (have,) = engine.compute({engine.inputs[0][0]: x.numpy()}).values()
            relative = float(np.abs(have - want).max() / np.abs(want).max())
            runs[backend] = engine.run
            found[backend] = {"compile_s": round(seconds, 1), "file_bytes": size, "max_abs_of_scale": relative}
    times: dict[str, list[float]] = {key: [] for key in runs}
    with torch.inference_mode():
        for number in range(-2, rounds):
            names = list(runs)
            order = names[number % len(names) :] + names[: number % len(names)]
            for key in order:
                once = timed(runs[key], 1)
                each = timed(runs[key], max(1, int(sample_ms / once)))
                if number >= 0:
                    times[key].append(each)
    for key, values in times.items():
        ratios = [value / other for value, other in zip(values, times[REFERENCE], strict=True)]
        found[key] |= {"median_ms": round(median(values), 4), "times_eager": round(median(ratios), 4)}
    with Board.open("local") as board:
        cpu = board.probe().cpu_model
    return {
        "model": "CIFAR ResNet-20, batch 1, 32x32, fp32",
        "measured_on": f"this machine ({cpu}, {os.cpu_count()} cores, one thread used)",
        "python": platform.python_version(),
        "versions": {package: metadata.version(package) for package in ("torch", "onnxruntime", "apache-tvm")},
        "target": registry.get("tvm").target.llvm,
        "rounds": rounds,
        "found": found,
    }


def timed(run: Callable[[int], None], times: int) -> float:
    """Milliseconds of one run."""
    started = time.perf_counter()
    run(times)
    return (time.perf_counter() - started) / times * 1e3


def markdown(result: dict[str, Any]) -> str:
    """One line per runtime."""
    lines = [
        "| runtime | ms | times eager | compile, s | largest difference of the output's scale |",
        "|---|---|---|---|---|",
    ]
    for name, row in result["found"].items():
        compile_s = f"{row['compile_s']:.1f}" if "compile_s" in row else "-"
        apart = f"{row['max_abs_of_scale']:.1e}" if "max_abs_of_scale" in row else "reference"
        lines.append(f"| {name} | {row['median_ms']:.3f} | {row['times_eager']:.2f} | {compile_s} | {apart} |")
    return "\n".join([f"{result['model']}, measured on {result['measured_on']}", "", *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="only print what is there")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--sample-ms", type=float, default=100.0)
    arguments = parser.parse_args()
    if not arguments.table:
        # The runner's own code loads and calls the engines, as on a board.
        sys.path.insert(0, str(Path(edgeprune.boards.onboard.__file__).parent))
        result = measure(arguments.rounds, arguments.sample_ms)
        RESULT.parent.mkdir(parents=True, exist_ok=True)
        write_text(RESULT, json.dumps(result, indent=1) + "\n")
    print(markdown(json.loads(RESULT.read_text())))


if __name__ == "__main__":
    main()
