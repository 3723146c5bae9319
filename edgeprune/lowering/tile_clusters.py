"""Block rows with similar support get one support, and so one product, where the model is predicted to be faster for it.

Many small products cost more than their share of the operations: each has its own Concat and its own start. Rows that read the
same columns are one product already, wherever they lie (`edgeprune.surgery.tile_layout`); here tiles are swapped so that more of
them do. Which columns a merged product reads is told by the damage of its tiles.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from edgeprune.lowering.tile_choice import LatencyModel, without_tiles
from edgeprune.surgery.kept_tiles import KeptTiles

if TYPE_CHECKING:
    from edgeprune.lowering.kernel_graph import KernelGraph
    from edgeprune.surgery.plan import PruningPlan

_PRICED = 3
"""Pairs of products whose merging is priced, in either way, before one is chosen."""

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class TileClusters:
    """What became of a plan's tiles.

    Attributes:
        plan: With other tiles in some layers.
        latency_ms: Predicted, of that plan.
        damage: What the change costs, as the sum over tiles; below 0 where tiles came back.
        merged: Weight to products before and after, where they are fewer.
    """

    plan: PruningPlan
    latency_ms: float
    damage: float
    merged: dict[str, tuple[int, int]]


def clustered_tiles(
    kernel_graph: KernelGraph, latency: LatencyModel, plan: PruningPlan, damages: Mapping[str, Floats], price: float
) -> TileClusters:
    """Merge products of layers, two at a time, as long as what that saves is worth more than what it costs.

    Two products become one that reads either what both read together, or the columns whose tiles cost most if removed, with no
    more weights than the two had. Of the pairs with the least damage the best few are priced, in the whole network; the best is
    taken while ``damage + price * milliseconds`` falls.

    Args:
        kernel_graph: The lowered model.
        latency: For the device, at the batch and thread count of the deployment.
        plan: With tiles.
        damages: Weight to the damage of removing each tile alone, shape [block rows, block columns]; weights that are left out
            stay as they are.
        price: Damage that a millisecond is worth.

    Raises:
        UnsupportedKernelError: A kernel cannot be priced; names it.
    """
    now_ms = latency.network_ms(kernel_graph.of_plan(plan))
    damage, merged = 0.0, dict[str, tuple[int, int]]()
    for name in [name for name in plan.kept_tiles if name in damages]:
        tiles = plan.kept_tiles[name]
        before = len(_supports(tiles.array()))
        while True:
            best: tuple[float, float, float, PruningPlan] | None = None
            weights = tiles.grid.weights().astype(np.float64)
            for cost, kept in _proposals(tiles.array(), damages[name], weights):
                changed = _with(plan, name, KeptTiles.of(tiles.grid, kept))
                ms = latency.network_ms(kernel_graph.of_plan(changed))
                gain = cost + price * (ms - now_ms)
                if ms < now_ms and gain < 0 and (best is None or gain < best[0]):
                    best = (gain, cost, ms, changed)
            if best is None:
                break
            damage, now_ms, plan = damage + best[1], best[2], best[3]
            if name not in plan.kept_tiles:
                break
            tiles = plan.kept_tiles[name]
        after = len(_supports(tiles.array())) if name in plan.kept_tiles else 1
        if after < before:
            merged[name] = (before, after)
    return TileClusters(plan, now_ms, damage, merged)


def _with(plan: PruningPlan, name: str, tiles: KeptTiles) -> PruningPlan:
    if tiles.array().all():
        return without_tiles(plan, name)
    return replace(plan, kept_tiles={**plan.kept_tiles, name: tiles})


def _supports(kept: Bools) -> list[npt.NDArray[np.intp]]:
    """Block rows that read the same columns; those that read none are no product."""
    found: dict[bytes, list[int]] = {}
    for row in np.flatnonzero(kept.any(axis=1)):
        found.setdefault(kept[row].tobytes(), []).append(int(row))
    return [np.array(rows, dtype=np.intp) for rows in found.values()]


def _proposals(kept: Bools, damages: Floats, weights: Floats) -> Iterator[tuple[float, Bools]]:
    """(damage, kept tiles) with two products merged: of either way to merge those with the least damage."""
    every: tuple[list[tuple[float, Bools]], ...] = ([], [])
    for one, other in itertools.combinations(_supports(kept), 2):
        rows = np.concatenate([one, other])
        for found, support in zip(every, _common(kept[rows], damages[rows], weights[rows]), strict=True):
            changed = kept.copy()
            changed[rows] = support
            gone, back = kept & ~changed, changed & ~kept
            found.append((float(damages[gone].sum() - damages[back].sum()), changed))
    for found in every:
        yield from sorted(found, key=lambda pair: pair[0])[:_PRICED]


def _common(kept: Bools, damages: Floats, weights: Floats) -> Iterator[Bools]:
    """Columns that some rows could read together: all that any of them reads, or the most important ones."""
    either: Bools = np.any(kept, axis=0)
    yield either
    sizes, worth = weights.sum(axis=0), damages.sum(axis=0)
    # The most damage per weight first, as long as there are no more weights than before.
    order = np.argsort(-worth / sizes, kind="stable")
    fits = np.cumsum(sizes[order]) <= weights[kept].sum() + 1e-9
    best = np.zeros(kept.shape[1], dtype=bool)
    best[order[: max(1, int(fits.sum()))]] = True
    yield best
