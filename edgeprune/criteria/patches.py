"""What a convolution or linear layer reads, as a matrix product: sampled rows of its input, and its weight."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F


def patches(
    x: torch.Tensor, named: Mapping[str, Any], positions: int | None, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Input patches of a layer at random output positions, the same ones for all samples of the batch.

    Without its bias the layer's output at row `n` of conv group `g` is ``einsum("nck,ock->no", rows[:, g], weight[g])``.

    Args:
        x: The layer's input.
        named: Arguments of its ATen operation by name: of a convolution of any rank, transposed or not, of a linear layer,
            or of ``addmm``.
        positions: Most output positions per sample; None means all.
        generator: For the choice.

    Returns:
        Rows, shape (samples * positions, conv groups, channels of a conv group, kernel elements), and the weight, shape
        (conv groups, outputs of a conv group, channels of a conv group, kernel elements).
    """
    weight = named["weight"] if "weight" in named else named["mat2"].T
    if "stride" not in named:
        rows = x.reshape(x.shape[0], -1, x.shape[-1])
        rows = rows[:, _chosen(rows.shape[1], positions, generator).to(x.device)]
        return rows.reshape(-1, 1, x.shape[-1], 1), weight[None, :, :, None]
    rank, conv_groups = weight.ndim - 2, int(named["groups"])
    x = x if x.ndim == weight.ndim else x[None]
    stride, dilation = (_per_axis(named[name], rank) for name in ("stride", "dilation"))
    kernel = list(weight.shape[2:])
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    padding = (
        [(before, before) for before in _per_axis(named["padding"], rank)]
        if named["padding"] != "same"
        else [(r // 2, r - r // 2) for r in reach]
    )
    if "output_padding" in named:
        # A transposed convolution is one over its input with zeros between, by the mirrored kernel.
        after = _per_axis(named["output_padding"], rank)
        padding = [(r - p, r - p + a) for r, (p, _), a in zip(reach, padding, after, strict=True)]
        x, stride = _spread(x, stride), [1] * rank
        weight = weight.flip(list(range(2, 2 + rank)))
        weight = weight.reshape(conv_groups, -1, *weight.shape[1:]).transpose(1, 2)
    else:
        weight = weight.reshape(conv_groups, -1, *weight.shape[1:])
    x = F.pad(x, [amount for pair in reversed(padding) for amount in pair])
    out = [(size - r - 1) // s + 1 for size, r, s in zip(x.shape[2:], reach, stride, strict=True)]
    chosen = _chosen(math.prod(out), positions, generator)
    flat = torch.zeros(len(chosen), math.prod(kernel), dtype=torch.long)
    corners = np.unravel_index(chosen.numpy(), out)
    offsets = np.unravel_index(np.arange(math.prod(kernel)), kernel)
    for axis in range(rank):
        inside = corners[axis][:, None] * stride[axis] + offsets[axis][None, :] * dilation[axis]
        flat += torch.from_numpy(inside) * math.prod(x.shape[3 + axis :])
    # [samples, channels, positions, kernel elements]
    rows = x.flatten(2)[:, :, flat.to(x.device)]
    rows = rows.transpose(1, 2).flatten(0, 1)
    return rows.reshape(len(rows), conv_groups, -1, rows.shape[-1]), weight.flatten(3)


def _chosen(count: int, positions: int | None, generator: torch.Generator) -> torch.Tensor:
    if positions is None or positions >= count:
        return torch.arange(count)
    return torch.randperm(count, generator=generator)[:positions]


def _per_axis(value: Any, rank: int) -> list[int]:
    """A size argument as one number per spatial axis; ``"valid"`` is no padding."""
    if value == "valid":
        return [0] * rank
    values = list(value) if isinstance(value, list | tuple) else [value]
    return [int(item) for item in (values * rank if len(values) == 1 else values)]


def _spread(x: torch.Tensor, stride: list[int]) -> torch.Tensor:
    """With ``stride - 1`` zeros between neighbors."""
    sizes = [(size - 1) * step + 1 for size, step in zip(x.shape[2:], stride, strict=True)]
    found = x.new_zeros(*x.shape[:2], *sizes)
    every = (slice(None), slice(None), *(slice(None, None, step) for step in stride))
    found[every] = x
    return found
