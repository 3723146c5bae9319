"""How the kept tiles of a linear layer are computed: which inputs are read together, by one product for which outputs.

Only indices, no tensors. Block rows that read the same block columns are one product, wherever they lie.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

Range = tuple[int, int]
"""First position, and the one behind the last."""


@dataclass(frozen=True)
class TileProduct:
    """One dense product.

    Attributes:
        pieces: Numbers of the pieces of the input that it reads, ascending.
        rows: Ranges of outputs that it makes, ascending; the rows of its weight lie in this order.
    """

    pieces: tuple[int, ...]
    rows: tuple[Range, ...]

    @property
    def outputs(self) -> int:
        """How many outputs it makes."""
        return _total(self.rows)


@dataclass(frozen=True)
class TileLayout:
    """The products of one layer.

    Attributes:
        in_features: Inputs of the layer.
        out_features: Its outputs.
        pieces: Ranges of inputs that are read; those between them are read by no output.
        products: In the order of their first outputs.
    """

    in_features: int
    out_features: int
    pieces: tuple[Range, ...]
    products: tuple[TileProduct, ...]

    @property
    def is_dense(self) -> bool:
        """Whether every output reads every input."""
        return (
            len(self.products) == 1
            and self.products[0].rows == ((0, self.out_features),)
            and _total(self.pieces) == self.in_features
        )

    @property
    def is_split(self) -> bool:
        """Whether the input falls into its pieces without a rest."""
        return len(self.pieces) > 1 and _total(self.pieces) == self.in_features

    @property
    def empty_rows(self) -> tuple[Range, ...]:
        """Ranges of outputs that read nothing."""
        made = sorted(rows for product in self.products for rows in product.rows)
        edges = [0, *(edge for rows in made for edge in rows), self.out_features]
        return tuple((a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b)

    @property
    def order(self) -> tuple[tuple[int, int], ...]:
        """The outputs from first to last: (product, which of its ranges), product -1 for a range of `empty_rows`."""
        found = {
            rows[0]: (at, part) for at, product in enumerate(self.products) for part, rows in enumerate(product.rows)
        }
        found |= {rows[0]: (-1, part) for part, rows in enumerate(self.empty_rows)}
        return tuple(found[first] for first in sorted(found))

    @property
    def weights(self) -> int:
        """How many weights the products have."""
        return sum(product.outputs * len(self.columns(product)) for product in self.products)

    def columns(self, product: TileProduct) -> list[int]:
        """Inputs that a product reads."""
        return [at for piece in product.pieces for at in range(*self.pieces[piece])]

    def rows(self, product: TileProduct) -> list[int]:
        """Outputs that a product makes."""
        return [at for rows in product.rows for at in range(*rows)]


def layout_of(
    kept: npt.NDArray[np.bool_], row_blocks: npt.NDArray[np.int64], column_blocks: npt.NDArray[np.int64]
) -> TileLayout:
    """The products that compute the kept tiles; blocks may lie anywhere.

    Args:
        kept: True where a tile stays, shape [block rows, block columns].
        row_blocks: Block row of every output.
        column_blocks: Block column of every input.
    """
    reads: dict[tuple[Range, ...], list[int]] = {}
    for begin, end in _runs(row_blocks):
        columns = tuple(_runs(kept[row_blocks[begin], column_blocks], only=True))
        if columns:
            reads.setdefault(columns, []).extend(range(begin, end))
    cuts = sorted({edge for columns in reads for begin_end in columns for edge in begin_end})
    pieces = [
        piece
        for piece in pairwise(cuts)
        if any(begin <= piece[0] and piece[1] <= end for columns in reads for begin, end in columns)
    ]
    products = tuple(
        TileProduct(
            tuple(
                at
                for at, piece in enumerate(pieces)
                if any(begin <= piece[0] and piece[1] <= end for begin, end in columns)
            ),
            tuple(_ranges(rows)),
        )
        for columns, rows in reads.items()
    )
    return TileLayout(len(column_blocks), len(row_blocks), tuple(pieces), products)


def _runs(values: npt.NDArray[np.int64] | npt.NDArray[np.bool_], *, only: bool = False) -> Iterable[Range]:
    """Stretches of equal values; with `only`, those that are True."""
    edges = [0, *(np.flatnonzero(values[1:] != values[:-1]) + 1).tolist(), len(values)]
    return ((a, b) for a, b in pairwise(edges) if a < b and (not only or bool(values[a])))


def _ranges(positions: Sequence[int]) -> Iterable[Range]:
    """Ascending positions as ranges."""
    breaks = [at for at in range(1, len(positions)) if positions[at] != positions[at - 1] + 1]
    return ((positions[a], positions[b - 1] + 1) for a, b in pairwise([0, *breaks, len(positions)]))


def _total(ranges: Iterable[Range]) -> int:
    return sum(end - begin for begin, end in ranges)
