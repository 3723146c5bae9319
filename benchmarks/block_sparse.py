"""How much faster are linear layers of which half of the tiles are left? ONNX Runtime, interleaved with the dense layer.

Layers of DeiT-S and DeiT-B at 197 tokens, alone and as the pair around a GELU, and the whole of DeiT-S (`deit.py`, of random
weights), with tiles of 64 x 128 of which half is left in each layer, a random half: ten seeds. With ``--masks`` it is the half
that the pruner keeps of the layers of a trained model (`block_quality.py --masks`), where that has layers of the size. For each
the ratio of the latencies (dense over sparse, so that 2 is the most that half of the tiles can give) with its interval, and
beside it what else a board has to bear: seconds to create a session, bytes of the file, memory of a process that runs it, and
the nodes of the graph, each beside the dense model's. Outputs are compared with the masked model's first.

    PYTHONPATH=. OMP_NUM_THREADS=1 python benchmarks/block_sparse.py            # what is missing, then the tables
    PYTHONPATH=. python benchmarks/block_sparse.py --threads 0 --batch 4       # all threads, four images
    PYTHONPATH=. python benchmarks/block_sparse.py --table                     # only print what is there

Every layer and seed is a file in benchmarks/results/block_sparse, so an interrupted run goes on where it was. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from deit import PIXELS, DeitSmall
from torch import nn

import edgeprune
from edgeprune.backends import registry
from edgeprune.boards.board import Board
from edgeprune.files import write_text
from edgeprune.profiling.comparing import compare
from edgeprune.surgery.kept_tiles import KeptTiles
from edgeprune.surgery.plan import make_plan
from edgeprune.surgery.tile_folds import tiled_layers
from edgeprune.surgery.tiles import tile_grids

RESULTS = Path(__file__).parent / "results" / "block_sparse"
TOKENS, TILE, KEPT = 197, (64, 128), 0.5
CASES: dict[str, tuple[int, ...]] = {
    "384 to 1536": (384, 1536),
    "1536 to 384": (1536, 384),
    "768 to 3072": (768, 3072),
    "3072 to 768": (3072, 768),
    "384 to 1536 and back": (384, 1536, 384),
    "768 to 3072 and back": (768, 3072, 768),
    "DeiT-S": (),
}
"""Widths of a layer, or of two with a GELU between them; none of a whole transformer."""
Masks = dict[tuple[int, int], list[np.ndarray]]
"""Size of a weight, outputs and inputs, to which of its tiles trained layers of that size keep."""
CHILD = """
import sys
import numpy, onnxruntime

options = onnxruntime.SessionOptions()
options.intra_op_num_threads = int(sys.argv[2])
session = onnxruntime.InferenceSession(sys.argv[1], options)
feed = {one.name: numpy.zeros(one.shape, numpy.float32) for one in session.get_inputs()}
for _ in range(3):
    session.run(None, feed)
print(next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def network(case: str, batch: int) -> tuple[nn.Module, torch.Tensor]:
    """One linear layer, or two with a GELU between them, or a whole transformer; and inputs for it."""
    torch.manual_seed(0)
    widths = CASES[case]
    if not widths:
        return DeitSmall().eval(), torch.randn(batch, 3, PIXELS, PIXELS)
    layers = [nn.Linear(a, b) for a, b in pairwise(widths)]
    model = nn.Sequential(*(layers if len(layers) == 1 else [layers[0], nn.GELU(), layers[1]])).eval()
    return model, torch.randn(batch, TOKENS, widths[0])


def random_half(shape: tuple[int, int], dice: np.random.Generator) -> np.ndarray:
    """True for a random half of the tiles."""
    kept = np.zeros(shape[0] * shape[1], dtype=bool)
    kept[dice.permutation(len(kept))[: round(KEPT * len(kept))]] = True
    return kept.reshape(shape)


def read_masks(path: Path) -> Masks:
    """What `block_quality.py --masks` wrote."""
    found: Masks = {}
    for one in json.loads(path.read_text()).values():
        found.setdefault(tuple(one["size"]), []).append(np.array(one["kept"], dtype=bool))
    return found


def engines(case: str, seed: int, batch: int, folder: Path, masks: Masks) -> dict[str, Any]:
    """Write the dense and the sparse engine; how far the sparse one is from the masked layer, and its shape.

    Raises:
        SystemExit: If the sparse engine computes something else.
    """
    model, x = network(case, batch)
    graph = edgeprune.trace(model, x)
    dice = np.random.default_rng(seed)
    grids = tile_grids(model, graph, TILE, classifiers=bool(CASES[case]))
    tiles = {}
    for name, grid in grids.items():
        trained = masks.get(grid.size, [])
        kept = trained[seed % len(trained)] if trained else random_half(grid.shape, dice)
        tiles[name] = KeptTiles.of(grid, kept)
    plan = make_plan(graph, {}, kept_tiles=tiles)
    cut = edgeprune.apply(model, plan)
    backend = registry.get("onnxruntime")
    backend.export(model, (x,), folder / "dense.onnx")
    backend.export(cut, (x,), folder / "sparse.onnx")

    session = _session(folder / "sparse.onnx", 1)
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    apart = edgeprune.check(model, plan, x)
    with torch.no_grad():
        apart = max(apart, float(np.abs(found - cut(x).numpy()).max()))
    if apart > 1e-4:
        sys.exit(f"{case}, seed {seed}: the engine is {apart:g} from the masked layer")
    return {
        "max_abs": apart,
        "kept": sum(tile.weights for tile in tiles.values())
        / sum(int(grid.weights().sum()) for grid in grids.values()),
        "masks": "trained" if masks and all(grid.size in masks for grid in grids.values()) else "random",
        "weights_bytes": 4 * sum(parameter.numel() for parameter in model.parameters()),
        "products": {name: len(layer.layout.products) for name, layer in tiled_layers(plan).items()},
        "file_bytes": {name: (folder / f"{name}.onnx").stat().st_size for name in ("dense", "sparse")},
        "nodes": {name: _nodes(folder / f"{name}.onnx") for name in ("dense", "sparse")},
    }


def _session(path: Path, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _nodes(path: Path) -> int:
    import onnx

    return len(onnx.load(path).graph.node)


def creation_ms(folder: Path, threads: int, times: int) -> dict[str, float]:
    """Median milliseconds to create a session, interleaved."""
    found: dict[str, list[float]] = {"dense": [], "sparse": []}
    for number in range(-1, times):
        for name in sorted(found, reverse=bool(number % 2)):
            started = time.perf_counter()
            _session(folder / f"{name}.onnx", threads)
            if number >= 0:
                found[name].append((time.perf_counter() - started) * 1e3)
    return {name: median(values) for name, values in found.items()}


def peak_bytes(path: Path, threads: int) -> int:
    """Largest resident memory of a process that does nothing but run an engine."""
    told = subprocess.run(
        [sys.executable, "-c", CHILD, str(path), str(threads)], capture_output=True, text=True, check=True
    )
    return int(told.stdout)


def measure(case: str, seed: int, threads: int, batch: int, rounds: int, board: Board, masks: Masks) -> dict[str, Any]:
    """Everything about one layer and one choice of tiles."""
    count = threads or (os.cpu_count() or 1)
    with tempfile.TemporaryDirectory(prefix="edgeprune-benchmark-") as name:
        folder = Path(name)
        result = engines(case, seed, batch, folder, masks)
        timed = compare(
            board,
            {key: folder / f"{key}.onnx" for key in ("dense", "sparse")},
            "sparse",
            threads=count,
            rounds=rounds,
        )
        ratio = timed.ratios["dense"]
        result |= {
            "speedup": {"ratio": ratio.ratio, "low": ratio.low, "high": ratio.high},
            "ms": {key: found.median_ms for key, found in timed.measurements.items()},
            "creation_ms": creation_ms(folder, count, 7),
            "peak_bytes": {key: peak_bytes(folder / f"{key}.onnx", count) for key in ("dense", "sparse")},
        }
    return {"case": case, "seed": seed, "threads": count, "batch": batch, "rounds": rounds, **result}


def table(results: list[dict[str, Any]]) -> str:
    """Per case the median over the seeds, the worst seed, and the largest of what may not be large."""
    lines = [
        "| layer | masks | threads | batch | seeds | dense / sparse, median | least | most | ms dense | creation | "
        "file of weights | memory | nodes |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    of: dict[tuple[str, str, int, int], list[dict[str, Any]]] = {}
    for row in results:
        of.setdefault((row["case"], row.get("masks", "random"), row["threads"], row["batch"]), []).append(row)
    for key in sorted(of, key=lambda key: (key[2:], list(CASES).index(key[0]), key[1])):
        rows = of[key]
        case, masks, threads, batch = key
        speedups = [row["speedup"]["ratio"] for row in rows]
        creation = max(row["creation_ms"]["sparse"] / row["creation_ms"]["dense"] for row in rows)
        size = max(row["file_bytes"]["sparse"] / row["weights_bytes"] for row in rows)
        memory = max(row["peak_bytes"]["sparse"] / row["peak_bytes"]["dense"] for row in rows)
        nodes = f"{max(row['nodes']['sparse'] for row in rows)} ({rows[0]['nodes']['dense']})"
        lines.append(
            f"| {case} | {masks} | {threads} | {batch} | {len(rows)} | {median(speedups):.2f} | {min(speedups):.2f} | "
            f"{max(speedups):.2f} | {median(row['ms']['dense'] for row in rows):.3f} | {creation:.1f} | {size:.2f} | "
            f"{memory:.2f} | {nodes} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="only print what is there")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--threads", type=int, default=1, help="0 is all of them")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--only", nargs="*", choices=list(CASES), help="these layers")
    parser.add_argument("--masks", type=Path, help="of trained layers, instead of random ones")
    arguments = parser.parse_args()
    count = arguments.threads or (os.cpu_count() or 1)
    masks = {} if arguments.masks is None else read_masks(arguments.masks)

    def path(case: str, seed: int) -> Path:
        trained = "_trained" if masks else ""
        return arguments.results / f"{case.replace(' ', '-')}_t{count}_b{arguments.batch}_s{seed}{trained}.json"

    def has_masks(case: str) -> bool:
        return not masks or (all((b, a) in masks for a, b in pairwise(CASES[case])) and bool(CASES[case]))

    cases = [case for case in arguments.only or CASES if has_masks(case)]
    wanted = [(case, seed) for case in cases for seed in range(arguments.seeds)]
    missing = [(case, seed) for case, seed in wanted if not path(case, seed).exists()]
    if arguments.table:
        print(f"missing: {len(missing)} of {len(wanted)}", file=sys.stderr)
    elif missing:
        arguments.results.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        with Board.open("local") as board:
            cpu = board.probe().cpu_model
            for done, (case, seed) in enumerate(missing):
                left_s = (time.monotonic() - began) / done * (len(missing) - done) if done else float("nan")
                print(f"{done}/{len(missing)}, {left_s:.0f} s left: {case}, seed {seed}", file=sys.stderr, flush=True)
                result = measure(case, seed, arguments.threads, arguments.batch, arguments.rounds, board, masks)
                result |= {
                    "measured_on": f"this machine ({cpu}, {os.cpu_count()} cores)",
                    "python": platform.python_version(),
                    "versions": {package: version(package) for package in ("torch", "onnxruntime")},
                }
                write_text(path(case, seed), json.dumps(result, indent=1) + "\n")
    found = [json.loads(file.read_text()) for file in sorted(arguments.results.glob("*.json"))]
    print(table(found) if found else "nothing is measured yet")


if __name__ == "__main__":
    main()
