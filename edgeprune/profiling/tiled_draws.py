"""What a model runs without some of the tiles of its linear layers, as far as drawn plans show it.

Which tiles a pruner will remove is not known while a board is profiled, so they are drawn: some layers keep all, others a share;
which ones lies between tiles that have nothing to do with each other and whole block rows and columns that go, as masks of
trained networks do.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgeprune.errors import ConfigError
from edgeprune.surgery.kept_tiles import KeptTiles
from edgeprune.surgery.plan import make_plan
from edgeprune.surgery.tiles import tile_grids

if TYPE_CHECKING:
    from edgeprune.lowering.kernel_graph import KernelGraph
    from edgeprune.surgery.plan import PruningPlan

Tile = tuple[int, int]
"""Outputs and inputs of a tile."""

SHARES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
"""Shares of the tiles that stay in the plans whose kernels are looked at."""
NETWORK_SHARES = (0.5, 0.3, 0.7)
"""Of the plans that are timed as whole networks, the first ones first."""
MOST_NETWORKS = 6

_WHOLE, _LINE = 0.15, 0.25
_SPREAD = 0.3


@dataclass(frozen=True)
class TiledDraw:
    """A plan with random tiles, by what it is drawn from.

    Attributes:
        tile: Outputs and inputs of a tile.
        share: About which share of the tiles stays.
        seed: Of the draw.
    """

    tile: Tile
    share: float
    seed: int

    def record(self) -> dict[str, Any]:
        """As JSON values."""
        return {"tile": list(self.tile), "share": self.share, "seed": self.seed}

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> TiledDraw:
        """From JSON values."""
        rows, columns = record["tile"]
        return cls((int(rows), int(columns)), float(record["share"]), int(record["seed"]))


def draws(tiles: Sequence[Tile], *, seed: int) -> list[TiledDraw]:
    """Plans whose kernels show what a pruner can reach, for each size of tile."""
    return [TiledDraw(tile, share, seed) for tile in tiles for share in SHARES]


def networks(tiles: Sequence[Tile], *, seed: int) -> list[TiledDraw]:
    """Plans to be timed as whole networks: of every size of tile one before any has a second."""
    every = [TiledDraw(tile, share, seed + 1) for share in NETWORK_SHARES for tile in tiles]
    return every[: max(MOST_NETWORKS, len(tiles))]


class TiledPlans:
    """Makes the plans of draws for one model; what takes long is done once per size of tile.

    Args:
        kernel_graph: The lowered model.
    """

    def __init__(self, kernel_graph: KernelGraph) -> None:
        self._kernel_graph = kernel_graph
        self._bases: dict[Tile, PruningPlan] = {}

    def of(self, draw: TiledDraw) -> PruningPlan:
        """The plan of a draw.

        Raises:
            ConfigError: The model has no linear layer besides its classifier, or none that is larger than a tile.
        """
        if draw.tile not in self._bases:
            self._bases[draw.tile] = self._base(draw.tile)
        base = self._bases[draw.tile]
        dice = np.random.default_rng(zlib.crc32(f"tiles/{draw.tile}/{draw.share}/{draw.seed}".encode()))
        tiles = {}
        for name, whole in base.kept_tiles.items():
            kept = _drawn(whole.grid.shape, draw.share, dice)
            if not kept.all():
                tiles[name] = KeptTiles.of(whole.grid, kept)
        folds = tuple(fold for fold in base.folds if fold["producer"] in tiles or fold["consumer"] in tiles)
        return replace(base, kept_tiles=tiles, folds=folds)

    def _base(self, tile: Tile) -> PruningPlan:
        """A plan in which every layer of more than one tile lacks one."""
        graph = self._kernel_graph.graph
        tiles = {}
        for name, grid in tile_grids(graph.model, graph, tile).items():
            kept = np.ones(grid.shape, dtype=bool)
            kept[0, 0] = False
            if kept.size > 1:
                tiles[name] = KeptTiles.of(grid, kept)
        if not tiles:
            raise ConfigError(
                f"tiles must be smaller than a linear layer of the model to be measured, found none larger than "
                f"{tile[0]}x{tile[1]}.",
                hint=f"--tiles {max(1, tile[0] // 4)}x{max(1, tile[1] // 4)}",
            )
        return make_plan(graph, {}, kept_tiles=tiles)


def _drawn(shape: tuple[int, int], share: float, dice: np.random.Generator) -> npt.NDArray[np.bool_]:
    """Which tiles of a layer stay, shape [block rows, block columns]; at least one does."""
    rows, columns = shape
    whole, common = dice.random() < _WHOLE, dice.random()
    lines = (dice.random(rows)[:, None] + dice.random(columns)[None, :]) / 2
    scores = common * lines + (1 - common) * dice.random(shape)
    own = share * dice.uniform(1 - _SPREAD, 1 + _SPREAD)
    count = rows * columns if whole else min(rows * columns, max(1, round(own * rows * columns)))
    flat = np.zeros(rows * columns, dtype=bool)
    flat[np.argsort(-scores, axis=None, kind="stable")[:count]] = True
    kept = flat.reshape(shape)
    for axis, size in enumerate(shape):
        # Inputs that nobody reads, outputs that nobody makes: these have operations of their own.
        line, gone = int(dice.integers(size)), dice.random() < _LINE
        left = np.delete(kept, line, axis)
        if gone and not whole and left.any():
            kept[(slice(None),) * axis + (line,)] = False
    return kept
