"""How near a budget of memory is to what ONNX Runtime really takes: the growth of a process's resident memory.

Prints a table and writes benchmarks/results/memory.json.

    python benchmarks/memory.py [NETWORK ...]

Each engine is loaded and run once in a process of its own, one thread, in which every buffer goes back to the system when it is
freed (``MALLOC_MMAP_THRESHOLD_``), once without ONNX Runtime's arena and once with it. Linux only.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from predictor_networks import families

import edgeprune
from edgeprune.allocation.memory import Memory

FAMILIES = ("resnet", "mobilenetv2", "vgg", "densenet", "vit")
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "4096", "MALLOC_TRIM_THRESHOLD_": "4096", "MALLOC_ARENA_MAX": "1"}
CHILD = """
import sys
import numpy, onnxruntime

def status(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))

options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
options.enable_cpu_mem_arena = options.enable_mem_pattern = sys.argv[3] == "arena"
onnxruntime.InferenceSession(sys.argv[2], options)
before = status("VmRSS")
session = onnxruntime.InferenceSession(sys.argv[1], options)
feed = {one.name: numpy.zeros(one.shape, numpy.float32) for one in session.get_inputs()}
loaded = status("VmRSS")
with open("/proc/self/clear_refs", "w") as stream:
    stream.write("5")
session.run(None, feed)
print(loaded - before, status("VmHWM") - loaded)
"""


def engine(name: str, folder: Path) -> tuple[Path, Memory]:
    """The dense engine of a network at 224 pixels (a transformer at its own) and what edgeprune says of it."""
    builders = {"resnet50": families.resnet50, "efficientnet": families.efficientnet}
    model, example = builders[name]() if name in builders else families.build(name)
    example = example if name == "vit" else torch.zeros(1, 3, 224, 224)
    folder.mkdir()
    lowered = edgeprune.lower(edgeprune.trace(model.eval(), example), workdir=folder)
    return lowered.dense_engine, Memory(lowered)


def taken(path: Path, first: Path, mode: str) -> tuple[int, int]:
    """Bytes by which loading and running an engine makes a process grow in which another was loaded before."""
    command = [sys.executable, "-c", CHILD, str(path), str(first), mode]
    told = subprocess.run(command, env={**os.environ, **MALLOC}, capture_output=True, text=True, check=True)
    loaded, ran = (int(word) for word in told.stdout.split())
    return loaded, ran


def main() -> None:
    names = sys.argv[1:] or ["resnet50", "efficientnet", *FAMILIES]
    print(
        "| network | weights | engine file | loaded | live activations | ran, no arena | ran, arena | all, arena / counted |"
    )
    print("|---|---|---|---|---|---|---|---|")
    found: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as scratch:
        first, _ = engine("vit", Path(scratch) / "first")
        for name in names:
            path, memory = engine(name, Path(scratch) / name)
            weights = memory.number_bytes * memory.parameters.value({})
            live = memory.value({}) - weights
            loaded, bare = taken(path, first, "bare")
            again, arena = taken(path, first, "arena")
            found[name] = {
                "weights_bytes": weights,
                "file_bytes": path.stat().st_size,
                "live_bytes": live,
                "loaded_bytes": {"bare": loaded, "arena": again},
                "ran_bytes": {"bare": bare, "arena": arena},
            }
            sizes = (weights, path.stat().st_size, loaded, live, bare, arena)
            ratio = (again + arena) / (weights + live)
            print(f"| {name} | " + " | ".join(f"{size / 1e6:.2f}" for size in sizes) + f" | {ratio:.2f} |", flush=True)
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    told = {"onnxruntime": version("onnxruntime"), "networks": found}
    (results / "memory.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
