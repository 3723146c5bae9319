"""What all scores and damages of tiles are made of: sums over each tile, of weights and of their gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from edgeprune.criteria.gates import differentiable
from edgeprune.errors import ConfigError, ModelError, TaskError
from edgeprune.surgery.tiles import TileGrid
from edgeprune.tasks.batches import call, device_of, labeled_batches, loss_of, mode

if TYPE_CHECKING:
    from torch import nn

    from edgeprune.tasks.task import Objective, Task

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Grids = Mapping[str, TileGrid]
"""Name of a weight to how it is cut."""
Kept = tuple[Bools, Bools]
"""Which outputs and which inputs of a weight count, shapes [outputs] and [inputs]."""


@dataclass(frozen=True)
class TileSums:
    """Sums over the tiles of one weight `w`, each of shape [block rows, block columns].

    Attributes:
        grid: How the weight is cut.
        magnitudes: Of ``abs(w)``.
        norms: Of ``w ** 2``.
        products: Of ``abs(w * g)``, with `g` the mean gradient; None without data.
        squares: Of ``(w * g) ** 2``; None without data.
        mean_gate: Of ``w * g``: the derivative of the loss by a gate on the tile; None without data.
        gates: The same per batch, scaled so that the sum over batches of their squares is the mean over batches (of several
            objectives: the weighted sum of the means), shape [batches, block rows, block columns]; None without data.
    """

    grid: TileGrid
    magnitudes: Floats
    norms: Floats
    products: Floats | None = None
    squares: Floats | None = None
    mean_gate: Floats | None = None
    gates: Floats | None = None

    @property
    def weights(self) -> Floats:
        """How many weights each tile holds."""
        return self.grid.weights().astype(np.float64)


def over_tiles(grid: TileGrid, values: Floats) -> Floats:
    """Sum of each tile.

    Args:
        grid: How the array is cut.
        values: Shape [outputs, inputs].

    Returns:
        Shape [block rows, block columns].
    """
    rows = np.add.reduceat(values, grid.row_edges[:-1], axis=0)
    found: Floats = np.add.reduceat(rows, grid.column_edges[:-1], axis=1)
    return found


def over_kept(grid: TileGrid, values: Floats, rows: Bools, columns: Bools) -> Floats:
    """Sum of each tile over some rows and columns of the weight alone; 0 where a tile has none of them.

    Args:
        grid: How the array is cut.
        values: Shape [outputs, inputs].
        rows: Which outputs count, shape [outputs].
        columns: Which inputs count, shape [inputs].

    Returns:
        Shape [block rows, block columns].
    """
    one = _members(grid.row_edges, rows) @ values
    found: Floats = one @ _members(grid.column_edges, columns).T
    return found


def _members(edges: Sequence[int], counting: Bools) -> Floats:
    """1 where a position counts and lies in a block, shape [blocks, positions]."""
    found = np.zeros((len(edges) - 1, edges[-1]))
    for block, (begin, end) in enumerate(pairwise(edges)):
        found[block, begin:end] = counting[begin:end]
    return found


def over_weights(grid: TileGrid, tiles: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """The mask of a weight, shape [outputs, inputs], from one of its tiles, shape [block rows, block columns].

    Raises:
        ConfigError: The array is not one bool per tile.
    """
    if tiles.shape != grid.shape or tiles.dtype != np.bool_:
        raise ConfigError(
            f"kept tiles of {grid.parameter!r} must be a bool array of shape {grid.shape}, "
            f"found {tiles.dtype} of shape {tiles.shape}."
        )
    found: npt.NDArray[np.bool_] = tiles.repeat(np.diff(grid.row_edges), 0).repeat(np.diff(grid.column_edges), 1)
    return found


def tiled_weights(model: nn.Module, grids: Grids) -> dict[str, nn.Parameter]:
    """The parameters that are cut into tiles, by name.

    Raises:
        ModelError: There are none, one is not in the model, or its grid does not cover it.
    """
    if not grids:
        raise ModelError(
            "a model must have linear layers that are cut into tiles, found none.",
            hint="edgeprune.surgery.tiles.tile_grids says which layers are left alone, and why",
        )
    known = dict(model.named_parameters(remove_duplicate=False))
    for name, grid in grids.items():
        if name not in known:
            raise ModelError(f"a grid of tiles must be of a parameter of the model, found none named {name!r}.")
        if tuple(known[name].shape) != (size := (grid.row_edges[-1], grid.column_edges[-1])):
            raise ModelError(f"the tiles of {name!r} must cover its shape {tuple(known[name].shape)}, found {size}.")
    return {name: known[name] for name in grids}


def weight_sums(model: nn.Module, grids: Grids) -> dict[str, TileSums]:
    """Sums that need no data.

    Raises:
        ModelError: As `tiled_weights`, or a weight is NaN or infinite.
    """
    found = {}
    for name, parameter in tiled_weights(model, grids).items():
        values = parameter.detach().double().cpu().numpy()
        if not np.isfinite(values).all():
            raise ModelError(f"weights must be finite to be scored, found NaN or infinity in {name!r}.")
        found[name] = TileSums(grids[name], over_tiles(grids[name], np.abs(values)), over_tiles(grids[name], values**2))
    return found


def gradient_sums(model: nn.Module, grids: Grids, task: Task, *, batches: int = 64) -> dict[str, TileSums]:
    """Sums over tiles of the weights and of their gradients, which are those of the training loss in eval form.

    One forward and one backward pass per batch; in memory is one float64 copy of the tiled weights, and one number per batch
    and tile. The model is left as it was.

    Args:
        model: The dense model.
        grids: How its weights are cut.
        task: Data and loss; the loss may ignore the targets (`edgeprune.criteria.tiles.losses`).
        batches: Most training batches per objective.

    Raises:
        ConfigError: There are to be no batches.
        ModelError: As `weight_sums`.
        TaskError: The loss has no gradient, gradients are not finite, or the task cannot be used.
    """
    whole = {name: (_whole(grid),) for name, grid in grids.items()}
    return {name: several[0] for name, several in narrow_sums(model, grids, task, whole, batches=batches).items()}


def narrow_sums(
    model: nn.Module, grids: Grids, task: Task, kept: Mapping[str, Sequence[Kept]], *, batches: int = 64
) -> dict[str, tuple[TileSums, ...]]:
    """`gradient_sums` over parts of the weights: what of each tile is left when channels go, at the dense model's gradients.

    All parts of all weights come from the same passes.

    Args:
        model: The dense model.
        grids: How its weights are cut.
        task: Data and loss.
        kept: Per weight any number of pairs: which outputs and which inputs count, shapes [outputs] and [inputs].
        batches: Most training batches per objective.

    Returns:
        Per weight the sums of each of its pairs, in order.

    Raises:
        ConfigError: There are to be no batches.
        ModelError: As `weight_sums`.
        TaskError: As `gradient_sums`.
    """
    if batches < 1:
        raise ConfigError(f"tiles must be scored on at least 1 batch, found batches={batches}.")
    plain, parameters = weight_sums(model, grids), tiled_weights(model, grids)
    folds = {name: [_fold(grids[name], rows, columns) for rows, columns in pairs] for name, pairs in kept.items()}

    def folded(name: str, product: Floats) -> list[Floats]:
        return [fold(product) for fold in folds[name]]

    means = {name: torch.zeros(parameter.shape, dtype=torch.float64) for name, parameter in parameters.items()}
    gates: dict[str, list[list[Floats]]] = {name: [] for name in grids}
    for objective in task.objectives:
        own, totals = _passes(model, objective, parameters, folded, batches)
        count = max(1, len(next(iter(own.values()))))
        for name in grids:
            means[name] += totals[name] * (objective.weight / count)
            gates[name] += [[part * np.sqrt(objective.weight / count) for part in parts] for parts in own[name]]
    found = {}
    for name, sums in plain.items():
        weight = parameters[name].detach().double().cpu()
        product = (means[name] * weight).numpy()
        every = [np.stack([parts[at] for parts in gates[name]]) for at in range(len(folds[name]))]
        if not (all(np.isfinite(one).all() for one in every) and np.isfinite(product).all()):
            raise TaskError(f"gradients must be finite for the damage of tiles, found NaN or infinity in {name!r}.")
        found[name] = tuple(
            replace(
                sums,
                magnitudes=fold(np.abs(weight.numpy())),
                norms=fold(weight.numpy() ** 2),
                products=fold(np.abs(product)),
                squares=fold(product**2),
                mean_gate=fold(product),
                gates=one,
            )
            for fold, one in zip(folds[name], every, strict=True)
        )
    return found


def _whole(grid: TileGrid) -> Kept:
    return np.ones(grid.size[0], dtype=bool), np.ones(grid.size[1], dtype=bool)


def _fold(grid: TileGrid, rows: Bools, columns: Bools) -> Callable[[Floats], Floats]:
    if rows.all() and columns.all():
        return lambda values: over_tiles(grid, values)
    return lambda values: over_kept(grid, values, rows, columns)


def _passes(
    model: nn.Module,
    objective: Objective,
    parameters: Mapping[str, nn.Parameter],
    folded: Callable[[str, Floats], list[Floats]],
    batches: int,
) -> tuple[dict[str, list[list[Floats]]], dict[str, torch.Tensor]]:
    """Per weight the derivatives by gates of each batch, and the sum of its gradients over the batches."""
    gates: dict[str, list[list[Floats]]] = {name: [] for name in parameters}
    totals = {name: torch.zeros(parameter.shape, dtype=torch.float64) for name, parameter in parameters.items()}
    for inputs, targets in labeled_batches(objective, "train", device_of(model), batches):
        with mode(model, training=False), differentiable(parameters), torch.enable_grad():
            loss = loss_of(objective, call(model, inputs), targets)
            if not loss.requires_grad:
                raise TaskError(
                    f"the loss of objective {objective.name!r} must be differentiable, found one without a gradient."
                )
            found: Sequence[torch.Tensor | None] = torch.autograd.grad(
                loss, list(parameters.values()), allow_unused=True
            )
        for (name, parameter), gradient in zip(parameters.items(), found, strict=True):
            if gradient is None:  # the loss does not depend on this weight
                gates[name].append(folded(name, np.zeros(tuple(parameter.shape))))
                continue
            exact = gradient.double().cpu()
            totals[name] += exact
            product = exact * parameter.detach().double().cpu()
            gates[name].append(folded(name, product.numpy()))
    return gates, totals
