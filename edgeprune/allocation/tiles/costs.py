"""What a layer costs by the number of tiles that it keeps: floating-point operations, measured figures, modelled power."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from edgeprune.criteria.tiles.curves import TileCurve
from edgeprune.criteria.tiles.sums import Floats
from edgeprune.errors import ConfigError, ModelError
from edgeprune.tasks.batches import call, mode

if TYPE_CHECKING:
    from torch import nn

_ACTIVATIONS = 16
"""Rows of the activations that the power model takes to be streamed together."""


def layer_tokens(model: nn.Module, inputs: Any, weights: Mapping[str, Any]) -> dict[str, int]:
    """Rows that enter each linear layer in one forward pass, from running it.

    Args:
        model: With the layers as modules: weight ``a.b.weight`` belongs to module ``a.b``.
        inputs: As in a batch of a task, of the deployment's batch size.
        weights: Names of weights.

    Returns:
        Name of the weight to rows: batch times tokens. A layer that runs twice counts twice.

    Raises:
        ModelError: There is no such module, or it does not run.
        TaskError: The model does not run on the inputs.
    """
    counts = dict.fromkeys(weights, 0)
    modules = dict(model.named_modules())
    handles = []
    try:
        for name in counts:
            module = modules.get(name.rpartition(".")[0])
            if module is None:
                raise ModelError(f"a weight that is cut into tiles must belong to a module, found none for {name!r}.")

            def count(_: nn.Module, given: tuple[torch.Tensor, ...], name: str = name) -> None:
                counts[name] += math.prod(given[0].shape[:-1])

            handles.append(module.register_forward_pre_hook(count))
        with mode(model, training=False), torch.no_grad():
            call(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    idle = [name for name, rows in counts.items() if rows == 0]
    if idle:
        raise ModelError(f"every layer that is cut into tiles must run on the example inputs, found {idle[0]!r} idle.")
    return counts


def flops(curve: TileCurve, tokens: int, *, outputs: bool = True) -> Floats:
    """Floating-point operations of a layer, two per weight and row, and one per output and row for its bias.

    Args:
        curve: Of the layer; tiles at the edges may be smaller, so it counts which ones are kept.
        tokens: Rows that enter it.
        outputs: Whether it has a bias.

    Returns:
        By kept tiles, shape (tiles + 1,).
    """
    bias = curve.grid.row_edges[-1] if outputs else 0
    found: Floats = tokens * (2.0 * curve.weights + bias)
    return found


def modelled_power(curve: TileCurve, tokens: int, *, energy: float = 1.0) -> Floats:
    """Power of a layer without a table, *modelled*: kept tiles times tiles of 16 rows of activations that stream through them.

    Args:
        curve: Of the layer.
        tokens: Rows that enter it.
        energy: Of one product of a weight tile and an activation tile; only ratios between layers matter while it is 1.

    Returns:
        By kept tiles, shape (tiles + 1,), in the unit of `energy`.

    Source: K. Xu et al., "LPViT: Low-Power Semi-structured Pruning for Vision Transformers", ECCV 2024, the power term; with
    tokens where the official code has the size of the layer's input, and with kept tiles where it has removed ones.
    """
    found: Floats = np.arange(curve.tiles + 1, dtype=np.float64) * math.ceil(tokens / _ACTIVATIONS) * energy
    return found


def published_power(curve: TileCurve, inputs: int | None = None) -> Floats:
    """The power term as the official code of LPViT has it, *modelled*, for comparison: it rises where tiles go.

    Args:
        curve: Of the layer.
        inputs: Size of the layer's input; that of the weight when None.

    Returns:
        By kept tiles, shape (tiles + 1,).
    """
    width = curve.grid.column_edges[-1] if inputs is None else inputs
    found: Floats = np.arange(curve.tiles + 1, dtype=np.float64)[::-1] * (width // _ACTIVATIONS)
    return found


def measured(curve: TileCurve, figures: Mapping[int, float]) -> Floats:
    """A cost that was measured (or predicted from a table) at some numbers of kept tiles, straight lines between them.

    Args:
        curve: Of the layer.
        figures: Number of kept tiles to the cost, milliseconds or millijoules; it need not fall with the tiles. All tiles
            must be among them; below the smallest number, the cost stays that of the smallest.

    Returns:
        By kept tiles, shape (tiles + 1,).

    Raises:
        ConfigError: The figure of the dense layer is missing, or a figure is negative or not finite.
    """
    name = curve.grid.parameter
    outside = [count for count in figures if not 0 <= count <= curve.tiles]
    if curve.tiles not in figures or outside:
        raise ConfigError(
            f"measured costs of {name!r} must be at 0..{curve.tiles} kept tiles and at all {curve.tiles}, "
            f"found {sorted(figures)}.",
            hint="measure the dense layer too",
        )
    counts = sorted(figures)
    values = np.array([figures[count] for count in counts], dtype=np.float64)
    if not np.isfinite(values).all() or (values < 0).any():
        raise ConfigError(f"measured costs must be finite and at least 0, found others for {name!r}.")
    return np.interp(np.arange(curve.tiles + 1), counts, values)
