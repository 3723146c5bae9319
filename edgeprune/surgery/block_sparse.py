"""A linear layer of which only some tiles are left, as dense products of standard operations.

The input is split into pieces; each product reads the pieces that its outputs need, put together; the outputs of all products
are put together in their order. No runtime needs a kernel for it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from edgeprune.surgery.tile_layout import TileLayout


class BlockSparseLinear(nn.Module):
    """Stands in for ``nn.Linear``; only the weights that are kept are parameters.

    Attributes:
        layout: Which inputs and outputs belong to which product.
        weights: Weight of each product, shape [outputs, inputs].
        bias: Of all outputs, shape [out], or None.
    """

    def __init__(self, layout: TileLayout, weights: Sequence[nn.Parameter], bias: nn.Parameter | None) -> None:
        super().__init__()
        self.layout = layout
        self.in_features, self.out_features = layout.in_features, layout.out_features
        self.weights = nn.ParameterList(weights)
        self.bias = bias

    @classmethod
    def of(cls, layout: TileLayout, weight: torch.Tensor, bias: nn.Parameter | None) -> BlockSparseLinear:
        """Take the kept weights out of a dense weight, shape [out, in]."""
        parts = []
        for product in layout.products:
            rows = torch.tensor(layout.rows(product), device=weight.device)
            columns = torch.tensor(layout.columns(product), device=weight.device)
            part = weight.detach()[rows][:, columns].contiguous()
            parts.append(nn.Parameter(part, requires_grad=weight.requires_grad))
        return cls(layout, parts, bias)

    @property
    def weight(self) -> torch.Tensor:
        """The dense weight, shape [out, in], zero where nothing is kept: for code that reads it instead of calling the layer."""
        like = next((value for value in (*self.weights, self.bias) if value is not None), torch.empty(0))
        found = like.new_zeros(self.out_features, self.in_features)
        for product, weight in zip(self.layout.products, self.weights, strict=True):
            rows = torch.tensor(self.layout.rows(product), device=weight.device)
            columns = torch.tensor(self.layout.columns(product), device=weight.device)
            found = found.index_put((rows[:, None], columns[None]), weight)
        return found

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shape [..., in] to [..., out]."""
        layout = self.layout
        if layout.is_split:
            pieces = list(torch.split(x, [end - begin for begin, end in layout.pieces], dim=-1))
        else:
            pieces = [x[..., begin:end] for begin, end in layout.pieces]
        made = []
        for product, weight in zip(layout.products, self.weights, strict=True):
            read = [pieces[at] for at in product.pieces]
            whole = len(read) == len(pieces) and (layout.is_split or layout.pieces == ((0, layout.in_features),))
            y = F.linear(x if whole else read[0] if len(read) == 1 else torch.cat(read, dim=-1), weight)
            sizes = [end - begin for begin, end in product.rows]
            made.append([y] if len(sizes) == 1 else list(torch.split(y, sizes, dim=-1)))
        if layout.empty_rows:
            nothing = torch.zeros_like(x[..., :1])
            made.append([F.pad(nothing, (0, end - begin - 1)) for begin, end in layout.empty_rows])
        # The ranges of no product are the last of `made`, which is what -1 says.
        outputs = [made[at][part] for at, part in layout.order]
        found = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        return found if self.bias is None else found + self.bias

    def extra_repr(self) -> str:
        """Sizes, products, and the share of weights that is left."""
        share = self.layout.weights / max(1, self.in_features * self.out_features)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{len(self.layout.products)} products, {share:.0%} of the weights"
        )
