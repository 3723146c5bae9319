"""Hidden units between two linear layers that tiles leave without a maker or a reader, and the order of the others.

A unit that no kept tile of the second layer reads can go. A unit that no kept tile of the first makes is ``act(bias)`` for every
input, so it can go, too, once the second layer's bias holds what came of it. And as nobody else sees the units, they may lie in
any order: those that are made from the same inputs lie together, and within these those that the same outputs read. So the
outputs of the first layer's products need no sorting, and the second layer's input falls into fewer pieces.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgeprune.errors import PlanError
from edgeprune.surgery.kept_tiles import KeptTiles
from edgeprune.surgery.tile_layout import TileLayout, layout_of
from edgeprune.surgery.tiles import TileGrid

if TYPE_CHECKING:
    from edgeprune.surgery.plan import PruningPlan


@dataclass(frozen=True)
class Moved:
    """Constants that go into the bias of a layer.

    Attributes:
        producer: Weight of the layer whose bias they are made from.
        positions: Of the units, among those that the cut of channels leaves.
        operations: What lies between, as in a plan.
    """

    producer: str
    positions: tuple[int, ...]
    operations: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class TiledLinear:
    """What becomes of one linear layer.

    Attributes:
        layout: Its products, in the order of its new outputs and inputs.
        rows: Its outputs, as rows of the weight that the cut of channels leaves.
        columns: Its inputs, as columns of that weight.
        kept: Which entries of that weight stay, shape [rows, columns], before any of them are reordered.
        moved: What goes into its bias, or None.
    """

    layout: TileLayout
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    kept: npt.NDArray[np.bool_]
    moved: Moved | None = None


@dataclass
class _Weight:
    """Tiles of one weight after a cut of channels.

    Attributes:
        kept: True where a tile stays, shape [block rows, block columns].
        blocks: Block row of every row, and block column of every column.
        order: Rows and columns that are left, in their new order.
        moved: What goes into its bias.
    """

    kept: npt.NDArray[np.bool_]
    blocks: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]
    order: list[npt.NDArray[np.int64]]
    moved: Moved | None = None

    def support(self, axis: int) -> npt.NDArray[np.bool_]:
        """Per row (column) which block columns (rows) that are still there it has a tile in."""
        present = np.unique(self.blocks[1 - axis])
        kept = self.kept if axis == 0 else self.kept.T
        return kept[self.blocks[axis]][:, present]

    def finished(self) -> TiledLinear:
        rows, columns = self.order
        layout = layout_of(self.kept, self.blocks[0][rows], self.blocks[1][columns])
        whole = self.kept[np.ix_(*self.blocks)]
        return TiledLinear(layout, tuple(rows.tolist()), tuple(columns.tolist()), whole, self.moved)


def tiled_layers(plan: PruningPlan) -> dict[str, TiledLinear]:
    """Every linear layer that kept tiles change, by the name of its weight: those that have some, and those beside them."""
    weights = {name: _weight(plan, name, tiles) for name, tiles in plan.kept_tiles.items()}
    for fold in plan.folds:
        names, shapes = (fold["producer"], fold["consumer"]), fold["shapes"]
        one, other = (
            weights.get(name) or _weight(plan, name, _whole(name, shape))
            for name, shape in zip(names, shapes, strict=True)
        )
        made, read = one.support(0), other.support(1)
        left = np.flatnonzero(made.any(axis=1) & read.any(axis=1))
        if not len(left):
            # A layer without inputs is none that a runtime knows.
            continue
        order = left[np.lexsort((_ranks(read[left]), _ranks(made[left])))]
        constant = np.flatnonzero(~made.any(axis=1) & read.any(axis=1))
        one.order[0] = other.order[1] = order
        if len(constant):
            other.moved = Moved(names[0], tuple(constant.tolist()), tuple(fold["operations"]))
        weights |= {names[0]: one, names[1]: other}
    return {name: weight.finished() for name, weight in weights.items()}


def check_fold(fold: Any, tiles: Mapping[str, KeptTiles]) -> None:
    """A fold of a plan file must be one of two layers, one of which has kept tiles.

    Raises:
        PlanError: If it is not.
    """
    if (
        not isinstance(fold, dict)
        or fold.keys() != {"producer", "consumer", "shapes", "operations"}
        or not all(isinstance(fold[name], str) for name in ("producer", "consumer"))
        or not (fold["producer"] in tiles or fold["consumer"] in tiles)
        or not isinstance(fold["shapes"], list)
        or len(fold["shapes"]) != 2
        or not all(
            isinstance(shape, list) and len(shape) == 2 and all(type(size) is int and size > 0 for size in shape)
            for shape in fold["shapes"]
        )
        or fold["shapes"][0][0] != fold["shapes"][1][1]
    ):
        raise PlanError(
            "a fold of a plan must name a 'producer' and a 'consumer', one of them with kept tiles, and their 'shapes', "
            f"found {fold!r} (rule: fold)."
        )
    for name, shape in zip((fold["producer"], fold["consumer"]), fold["shapes"], strict=True):
        if name in tiles and list(tiles[name].grid.size) != shape:
            raise PlanError(
                f"a fold must have the shape of {name!r}, {tiles[name].grid.size}, found {shape} (rule: fold)."
            )
    if not isinstance(fold["operations"], list) or not all(
        isinstance(item, dict)
        and item.keys() == {"op", "reads", "args"}
        and isinstance(item["op"], str)
        and isinstance(item["reads"], str)
        and isinstance(item["args"], dict)
        for item in fold["operations"]
    ):
        raise PlanError(
            f"operations of a fold must have 'op', 'reads' and 'args', found {fold['operations']!r} (rule: fold)."
        )


def _weight(plan: PruningPlan, name: str, tiles: KeptTiles) -> _Weight:
    kept = plan.kept.get(name, {})
    blocks = []
    for axis, edges in enumerate((tiles.grid.row_edges, tiles.grid.column_edges)):
        stays = np.array(kept.get(axis, range(edges[-1])), dtype=np.int64)
        blocks.append(np.searchsorted(np.array(edges), stays, side="right") - 1)
    return _Weight(tiles.array(), (blocks[0], blocks[1]), [np.arange(len(axis)) for axis in blocks])


def _whole(name: str, shape: list[int]) -> KeptTiles:
    """All of a weight, as one tile."""
    return KeptTiles(TileGrid(name, (0, shape[0]), (0, shape[1])), ((0,),))


def _ranks(support: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """The same number for rows with the same entries, ascending in the order in which they first appear."""
    _, first, which = np.unique(support, axis=0, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[which.ravel()]
