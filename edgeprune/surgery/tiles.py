"""Tiles: blocks of a linear layer's weight that are kept or removed as a whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from edgeprune.errors import ConfigError, PlanError

if TYPE_CHECKING:
    from torch import nn

    from edgeprune.graph.channel_graph import ChannelGraph

TILE = (64, 128)
"""Rows and columns of a tile, where nobody says otherwise."""


@dataclass(frozen=True)
class TileGrid:
    """How the weight of one linear layer, shape [out, in], is cut into tiles.

    The last tile of an axis may be smaller. No tile crosses the border between the queries, keys and values of an attention;
    along an axis of heads a tile is a whole number of heads, or divides one.

    Attributes:
        parameter: Name of the weight, as in ``model.named_parameters()``.
        row_edges: Where block rows begin and end along the outputs: 0, ascending, the number of outputs.
        column_edges: The same along the inputs.

    Raises:
        PlanError: If the edges do not start at 0, or do not ascend.
    """

    parameter: str
    row_edges: tuple[int, ...]
    column_edges: tuple[int, ...]

    def __post_init__(self) -> None:
        for what, edges in (("row", self.row_edges), ("column", self.column_edges)):
            if len(edges) < 2 or edges[0] != 0 or any(b <= a for a, b in pairwise(edges)):
                raise PlanError(
                    f"{what} edges of the tiles of {self.parameter!r} must ascend from 0 to the size of the axis, "
                    f"found {list(edges)} (rule: tile edges)."
                )

    @property
    def shape(self) -> tuple[int, int]:
        """Block rows and block columns."""
        return len(self.row_edges) - 1, len(self.column_edges) - 1

    @property
    def size(self) -> tuple[int, int]:
        """Outputs and inputs."""
        return self.row_edges[-1], self.column_edges[-1]

    def weights(self) -> npt.NDArray[np.int64]:
        """How many weights each tile holds, shape [block rows, block columns]."""
        return np.outer(np.diff(self.row_edges), np.diff(self.column_edges)).astype(np.int64)


def tile_grids(
    model: nn.Module,
    graph: ChannelGraph,
    tile: tuple[int, int] = TILE,
    *,
    sizes: Mapping[str, tuple[int, int]] | None = None,
    classifiers: bool = False,
) -> dict[str, TileGrid]:
    """Cut every linear layer of a transformer that is a module of its own into tiles.

    Where a tile size does not divide an axis the last tile is smaller; a layer narrower than a tile is one tile.

    Args:
        model: The traced model.
        graph: Its trace, which knows heads, queries, keys and values.
        tile: Rows and columns of a tile.
        sizes: Weights with tiles of another size.
        classifiers: Whether layers whose output is an output of the model are cut, too.

    Returns:
        Name of the weight to its grid, in program order.

    Raises:
        ConfigError: If a tile has no rows or columns, `sizes` names what is not cut, or there is nothing to cut.
    """
    from edgeprune.graph.linear_layers import linear_layers

    own = dict(sizes or {})
    for rows, columns in (tile, *own.values()):
        if rows < 1 or columns < 1:
            raise ConfigError(f"a tile must have at least one row and one column, found {rows} x {columns}.")
    layers = linear_layers(model, graph)
    names = [name for name in layers.replaceable if classifiers or name not in layers.classifiers]
    if not names:
        why = next((f" ({name}: {reason})" for name, reason in layers.others.items()), "")
        raise ConfigError(
            f"a model must have a linear layer besides its classifier to be cut into tiles, found none{why}.",
            hint="plans of channels (edgeprune.uniform_plan) fit models of convolutions",
        )
    unknown = sorted(own.keys() - set(names))
    if unknown:
        reason = layers.others.get(unknown[0], "it is a classifier" if unknown[0] in layers.classifiers else "")
        raise ConfigError(
            f"sizes must name weights that are cut into tiles, found {unknown[0]!r}{f': {reason}' if reason else ''}.",
            hint=f"among {', '.join(map(repr, names[:4]))}",
        )
    parameters = dict(model.named_parameters(remove_duplicate=False))
    kinds = _kinds(graph)
    found = {}
    for name in names:
        edges = [
            tuple(_edges(_pieces(graph, kinds, name, axis, size), wanted))
            for axis, (size, wanted) in enumerate(zip(parameters[name].shape, own.get(name, tile), strict=True))
        ]
        found[name] = TileGrid(name, edges[0], edges[1])
    return found


def untiled(model: nn.Module, graph: ChannelGraph) -> dict[str, str]:
    """Weights of linear layers that `tile_grids` leaves alone, with the reason."""
    from edgeprune.graph.linear_layers import linear_layers

    layers = linear_layers(model, graph)
    return {**layers.others, **dict.fromkeys(sorted(layers.classifiers), "its output is an output of the model")}


def _kinds(graph: ChannelGraph) -> npt.NDArray[np.int64]:
    """Per unit code 2 where it is a head, 1 a head dimension, else 0; the last, for no unit, is 0."""
    found = np.zeros(sum(group.size for group in graph.groups) + 1, dtype=np.int64)
    for group in graph.groups:
        kind = {"head": 2, "head dimension": 1}.get(group.unit, 0)
        found[graph.offset_of[group.name] :][: group.size] = kind
    return found


def _pieces(
    graph: ChannelGraph, kinds: npt.NDArray[np.int64], parameter: str, axis: int, size: int
) -> list[tuple[int, int]]:
    """An axis as stretches that no tile may leave: (number of heads, size of one), (1, size) where there are no heads."""
    codes = graph.unit_of[parameter][axis] if parameter in graph.unit_of else np.full((1, size), -1)
    if not kinds[codes].any():
        return [(1, size)]
    groups = np.searchsorted(np.array([*graph.offset_of.values()]), codes, side="right")
    pieces: list[tuple[int, int]] = []
    cells = list(_cells(codes, kinds, groups))
    seen: set[tuple[int, ...]] = set()
    last: tuple[int, ...] | None = None
    for at, (begin, end, head, group) in enumerate(cells):
        # Queries and keys of one head beside each other; also the halves of one that a rotation pairs, which looks the same.
        part = any(cells[other][2:] == (head, group) for other in (at - 1, at + 1) if 0 <= other < len(cells))
        # The same head again: from queries to keys, say. Other groups: from keys to values.
        if not part and group == last and head not in seen and pieces[-1][1] == end - begin:
            pieces[-1] = (pieces[-1][0] + 1, end - begin)
        else:
            pieces.append((1, end - begin))
            seen = set()
        seen.add(head)
        last = None if part else group
    return pieces


def _cells(
    codes: npt.NDArray[np.int64], kinds: npt.NDArray[np.int64], groups: npt.NDArray[np.int64]
) -> Iterator[tuple[int, int, tuple[int, ...], tuple[int, ...]]]:
    """Stretches of one head: begin, end, which head, and of which groups its units are."""
    size, begin = codes.shape[1], 0
    heads = [tuple(sorted(codes[kinds[codes[:, at]] == 2, at].tolist())) for at in range(size)]
    dimensions = [max(codes[kinds[codes[:, at]] == 1, at].tolist(), default=-1) for at in range(size)]
    of = [tuple(sorted(groups[codes[:, at] >= 0, at].tolist())) for at in range(size)]
    for at in range(1, size + 1):
        if at == size or heads[at] != heads[begin] or of[at] != of[begin] or dimensions[at] < dimensions[at - 1]:
            yield begin, at, heads[begin], of[begin]
            begin = at


def _edges(pieces: Sequence[tuple[int, int]], tile: int) -> Iterator[int]:
    """Where tiles of about a size begin and end."""
    yield 0
    at = 0
    heads_of_axis = pieces != [(1, sum(count * size for count, size in pieces))]
    for count, size in pieces:
        end = at + count * size
        step = tile
        if heads_of_axis or count > 1:
            step = tile // size * size or max(part for part in range(1, tile + 1) if size % part == 0)
        yield from range(at + step, end, step)
        yield end
        at = end
