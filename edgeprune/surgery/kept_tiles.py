"""Which tiles of a plan's weights stay: their JSON form, and the rules that they must obey."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgeprune.errors import PlanError
from edgeprune.surgery.tiles import TileGrid

if TYPE_CHECKING:
    from edgeprune.graph.channel_graph import ChannelGraph


@dataclass(frozen=True)
class KeptTiles:
    """Which tiles of one weight stay.

    Attributes:
        grid: How the weight is cut.
        kept: Per block row the block columns that stay, ascending.

    Raises:
        PlanError: If there is not one entry per block row, or a tile is out of range, or named twice.
    """

    grid: TileGrid
    kept: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        name, (rows, columns) = self.grid.parameter, self.grid.shape
        if len(self.kept) != rows:
            raise PlanError(
                f"kept tiles of {name!r} must be given for its {rows} block rows, found {len(self.kept)} "
                "(rule: grid covers the weight)."
            )
        for row, kept in enumerate(self.kept):
            outside = [column for column in kept if not 0 <= column < columns]
            if outside:
                raise PlanError(
                    f"kept tiles of {name!r} must lie in its {rows} x {columns} grid, found ({row}, {outside[0]}) "
                    "(rule: tile out of range)."
                )
            if any(b <= a for a, b in pairwise(kept)):
                raise PlanError(
                    f"kept tiles of block row {row} of {name!r} must be ascending and named once, found {list(kept)} "
                    "(rule: duplicate tile)."
                )

    @classmethod
    def of(cls, grid: TileGrid, kept: npt.NDArray[np.bool_]) -> KeptTiles:
        """From an array, True where a tile stays, shape [block rows, block columns].

        Raises:
            PlanError: If the array is not of the grid's shape, or not boolean.
        """
        kept = np.asarray(kept)
        if kept.dtype != np.bool_ or kept.shape != grid.shape:
            raise PlanError(
                f"kept tiles of {grid.parameter!r} must be a boolean array of shape {grid.shape}, found {kept.dtype} "
                f"of shape {kept.shape} (rule: grid covers the weight)."
            )
        return cls(grid, tuple(tuple(np.flatnonzero(row).tolist()) for row in kept))

    def array(self) -> npt.NDArray[np.bool_]:
        """True where a tile stays, shape [block rows, block columns]."""
        found = np.zeros(self.grid.shape, dtype=bool)
        for row, kept in enumerate(self.kept):
            found[row, list(kept)] = True
        return found

    @property
    def weights(self) -> int:
        """How many weights stay."""
        return int(self.grid.weights()[self.array()].sum())

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "row_edges": list(self.grid.row_edges),
            "column_edges": list(self.grid.column_edges),
            "kept": [list(row) for row in self.kept],
        }

    @classmethod
    def from_json(cls, name: str, values: Any) -> KeptTiles:
        """From JSON values of the weight of that name.

        Raises:
            PlanError: If they are not those of kept tiles, or break a rule.
        """
        if not isinstance(values, dict) or values.keys() != {"row_edges", "column_edges", "kept"}:
            raise PlanError(
                f"kept tiles of {name!r} must have 'row_edges', 'column_edges' and 'kept', found {values!r}."
            )
        lists = [values["row_edges"], values["column_edges"], *_list(values["kept"])]
        if not isinstance(values["kept"], list) or not all(
            isinstance(item, list) and all(isinstance(at, int) and not isinstance(at, bool) for at in item)
            for item in lists
        ):
            raise PlanError(f"kept tiles of {name!r} must be lists of whole numbers, found {values!r}.")
        grid = TileGrid(name, tuple(values["row_edges"]), tuple(values["column_edges"]))
        return cls(grid, tuple(tuple(row) for row in values["kept"]))


def checked_tiles(graph: ChannelGraph, kept: Mapping[str, KeptTiles], gone: Collection[str]) -> dict[str, KeptTiles]:
    """The kept tiles of a plan, without weights that keep all of theirs, or that go with a residual branch.

    Args:
        graph: The traced model.
        kept: Name of the weight to what stays of it; tiles count the rows and columns of the dense weight, also those that
            the plan removes.
        gone: Parameters that go.

    Raises:
        PlanError: If a weight is unknown or can have no tiles, or its grid does not cover it.
    """
    from edgeprune.graph.channel_graph import near_names
    from edgeprune.graph.linear_layers import linear_layers

    if not kept:
        return {}
    layers = linear_layers(graph.model, graph)
    shapes = {name: tuple(tensor.shape) for name, tensor in graph.model.named_parameters(remove_duplicate=False)}
    found = {}
    for name, tiles in kept.items():
        if name not in shapes:
            raise PlanError(
                f"kept tiles must be those of a parameter of the model, found {name!r} (rule: parameter).",
                hint=near_names(name, layers.replaceable),
            )
        if name not in layers.replaceable:
            why = layers.others.get(name, "it is not the weight of an nn.Linear")
            raise PlanError(f"kept tiles must be those of a linear layer, found {name!r}: {why} (rule: parameter).")
        if tiles.grid.parameter != name or tiles.grid.size != shapes[name]:
            raise PlanError(
                f"the grid of {name!r} must cover its shape {shapes[name]}, found that of {tiles.grid.parameter!r} with "
                f"{tiles.grid.size} (rule: grid covers the weight)."
            )
        if name not in gone and not tiles.array().all():
            found[name] = tiles
    return found


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
