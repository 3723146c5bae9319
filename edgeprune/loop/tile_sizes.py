"""Sizes of tiles layer by layer: those that lose least at what a board's latency table says that they take.

Large tiles are few large products, which run fast; small ones leave more of what matters. Which size is worth its time
differs from layer to layer, and from board to board.

Source: the paper fixes one size for a model and reports the best of several (K. Xu et al., "LPViT: Low-Power Semi-structured
Pruning for Vision Transformers", ECCV 2024); here each layer's is chosen with the price that its budget comes to.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from edgeprune.allocation.tiles.problem import TileProblem
from edgeprune.allocation.tiles.slope import at_price

Tile = tuple[int, int]
"""Outputs and inputs of a tile."""
Auto = Literal["auto"]

SIZES: tuple[Tile, ...] = ((32, 64), (64, 64), (64, 128), (128, 128))
"""Sizes that are compared where a table does not say of which it holds kernels."""

_EXPONENTS = (-60.0, 60.0)
_HALVINGS = 60


def sizes_in(header: Mapping[str, Any], signature: str) -> tuple[Tile, ...]:
    """Sizes of tiles whose kernels a table was profiled with: for a model, where it was among those that were profiled.

    Args:
        header: Of a latency table.
        signature: Of the model.

    Returns:
        Without any, `SIZES`.
    """
    models = [entry for entry in header.get("models", ()) if entry.get("tiles")]
    own = [entry for entry in models if entry.get("signature") == signature] or models
    found = dict.fromkeys((int(rows), int(columns)) for entry in own for rows, columns in entry["tiles"])
    return tuple(found) or SIZES


def chosen_sizes(problems: Mapping[Tile, TileProblem], budget: float) -> dict[str, Tile]:
    """The size of each layer's tiles, by one price of the cost for all layers.

    At a price a layer takes the size of which some number of tiles has the least ``damage + price * cost``. Prices are halved in
    on the budget; of the mixes of sizes on the way the one that loses least within the budget is taken, and where none can be
    within it the fastest one.

    Args:
        problems: Of each size the layers' damage and cost; all have the same layers, and all cost the same with all tiles.
        budget: Upper bound of the total cost.

    Returns:
        Name of the weight to its size; of equal sizes the first.
    """
    low, high = _EXPONENTS
    fastest, _ = _at(problems, float(np.exp2(high)))
    mixes = {tuple(fastest.values()): fastest}
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        found, cost = _at(problems, float(np.exp2(middle)))
        mixes.setdefault(tuple(found.values()), found)
        low, high = (low, middle) if cost <= budget else (middle, high)
    best, least = fastest, math.inf
    for sizes in mixes.values():
        problem = mixed(problems, sizes)
        if problem.smallest <= budget:
            worth = problem.objective(at_price(problem, budget)[0])
            best, least = (sizes, worth) if worth < least else (best, least)
    return best


def mixed(problems: Mapping[Tile, TileProblem], sizes: Mapping[str, Tile]) -> TileProblem:
    """The problem in which each layer has tiles of its own size."""
    first = next(iter(problems.values()))
    layers = {name: problems[tile].layers[name] for name, tile in sizes.items()}
    # Of each size the cost of a layer counts from its own least one: what is fixed is the rest of the dense cost.
    fixed = max(0.0, first.dense - sum(float(layer.cost[-1]) for layer in layers.values()))
    return replace(first, layers=layers, fixed=fixed)


def _at(problems: Mapping[Tile, TileProblem], price: float) -> tuple[dict[str, Tile], float]:
    """Size of each layer at a price, and what the layers then cost in all."""
    first = next(iter(problems.values()))
    sizes: dict[str, Tile] = {}
    total = first.dense
    for place, name in enumerate(first.layers):
        options = []
        for number, (tile, problem) in enumerate(problems.items()):
            layer = problem.layers[name]
            # Costs of two sizes are told from different ends: what they share is the dense layer.
            saved = (layer.cost - layer.cost[-1])[layer.least :]
            worth = problem.objectives[place][layer.least :] + price * saved
            best = int(np.argmin(worth[::-1]))
            options.append((float(worth[::-1][best]), number, tile, float(saved[::-1][best])))
        _, _, sizes[name], change = min(options)
        total += change
    return sizes, total


def sizes_note(sizes: Mapping[str, Tile], compared: Collection[Tile]) -> str:
    """Which layers have which size, one sentence."""
    of: dict[Tile, list[str]] = {}
    for name, tile in sizes.items():
        of.setdefault(tile, []).append(name)
    said = "; ".join(f"{rows}x{columns}: {', '.join(of[rows, columns])}" for rows, columns in sorted(of))
    among = ", ".join(f"{rows}x{columns}" for rows, columns in compared)
    return f"Sizes of tiles as they lose least at their predicted latency, among {among}: {said}."
