"""The kept tiles of linear layers by least squares: what the dense layer computed, from the inputs that its kept tiles read.

Needs no labels and no gradients. Only sums over rows are kept in memory, so calibration data may be as long as one likes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from edgeprune.criteria.tiles.sums import over_weights, tiled_weights
from edgeprune.errors import ConfigError, ReconstructionError
from edgeprune.recovery.evaluation import StepProgress
from edgeprune.surgery.tiles import TileGrid
from edgeprune.tasks.batches import batches as unpacked
from edgeprune.tasks.batches import call, device_of, mode

if TYPE_CHECKING:
    from edgeprune.tasks.task import Batches

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
RIDGE = 1e-3
"""Where there are too few batches to hold one back."""
_HELD_BACK = 4
Tiles = Mapping[str, tuple[TileGrid, npt.NDArray[np.bool_]]]
"""Name of a weight to how it is cut, and which tiles stay, shape [block rows, block columns]."""


def mask_tiles(model: nn.Module, tiles: Tiles) -> nn.Module:
    """A copy of a model whose removed tiles are zero.

    Raises:
        ModelError: A weight is not in the model, or its grid does not cover it.
        ConfigError: An array of kept tiles does not fit its grid.
    """
    masked = copy.deepcopy(model)
    weights = tiled_weights(masked, {name: grid for name, (grid, _) in tiles.items()})
    with torch.no_grad():
        for name, (grid, kept) in tiles.items():
            mask = torch.from_numpy(over_weights(grid, kept)).to(weights[name].device)
            weights[name].mul_(mask.to(weights[name].dtype))
    return masked


@dataclass(frozen=True)
class LayerFit:
    """How well one layer does, on the calibration data.

    Attributes:
        before: Squared error of its outputs with tiles removed, over the variance of the dense outputs, its inputs being
            those of the layers refitted before it.
        after: The same after it was refitted; never above `before`.
        rows: Rows of data that it was fitted on.
        ridge: What the weights were drawn with; infinite where they stayed as they were.
    """

    before: float
    after: float
    rows: int
    ridge: float


def reconstruct_tiles(
    dense: nn.Module,
    tiles: Tiles,
    loader: Batches,
    *,
    ridge: float | None = None,
    batches: int | None = None,
    progress: StepProgress | None = None,
) -> tuple[nn.Module, dict[str, LayerFit]]:
    """Refit the kept tiles of each layer, in the order in which they run, to the outputs of the dense model.

    A layer ``y = W x + b`` is solved, each block row by itself, with ``x'`` what it reads behind the layers refitted before it,
    and ``W'`` zero outside the kept tiles::

        minimize over W', b':  sum over rows of |y - W' x' - b'| ** 2  +  ridge * mean(x' ** 2) * rows * |W' - W| ** 2

    Where the data are few for the columns that a block row reads, a weak ridge fits their noise. So without a given one it is
    chosen per layer: every fourth batch is held back from all fits, and of the `RIDGES` the one with the least error on those
    batches is taken; where none makes that error smaller, the weights stay.

    From Gram matrices of the inputs alone; a bias is refitted with them, where there is one. Layers that read the very same
    tensor (queries, keys and values) share a pass over the data: one forward pass of both models, up to that layer.

    Args:
        dense: The dense model; stays as it is. Weight ``a.b.weight`` belongs to the module ``a.b``, an `nn.Linear`.
        tiles: Which tiles stay.
        loader: Batches of training data; targets are not used.
        ridge: How strongly weights are drawn towards those that they had; chosen per layer when None.
        batches: Most batches; all when None.
        progress: Told the layers done.

    Returns:
        A copy of the model with the refitted weights, removed tiles zero; and per weight how well it does.

    Raises:
        ConfigError: The ridge is negative or not finite, or kept tiles do not fit their grid.
        ModelError: A weight is not in the model, or its grid does not cover it.
        ReconstructionError: A layer is none that can be refitted, does not run, or its inputs are not finite.
        TaskError: The loader is empty, or the model does not run on its batches.

    Source: Y. He et al., "Channel Pruning for Accelerating Very Deep Neural Networks", ICCV 2017, section 3.1 (refit after the
    selection, on the inputs that the refitted layers before give); with tiles as the support.
    """
    if ridge is not None and not (np.isfinite(ridge) and ridge >= 0):
        raise ConfigError(f"reconstruction needs a finite ridge of at least 0, found {ridge}.")
    refitted = mask_tiles(dense, tiles)
    layers = {name: _Pair(_linear(dense, name), _linear(refitted, name), *tiles[name]) for name in tiles}
    fits: dict[str, LayerFit] = {}
    with mode(dense, training=False), mode(refitted, training=False), torch.no_grad():
        first = next(iter(unpacked(loader, "calibration data", device_of(dense), 1)))[0]
        for stage in _stages(dense, {name: pair.dense for name, pair in layers.items()}, first):
            sums = {name: _Moments(layers[name]) for name in stage}
            checks = {name: _Moments(layers[name]) for name in stage}
            for place, (inputs, _) in enumerate(unpacked(loader, "calibration data", device_of(dense), batches)):
                wanted = _read(dense, {name: layers[name].dense for name in stage}, inputs)
                given = _read(refitted, {name: layers[name].refitted for name in stage}, inputs)
                held_back = ridge is None and place % _HELD_BACK == _HELD_BACK - 1
                for name in stage:
                    (checks if held_back else sums)[name].add(given[name], wanted[name])
            for name in stage:
                fits[name] = sums[name].refit(ridge, name, checks[name])
                if progress is not None:
                    progress("reconstructing", len(fits), len(layers))
    return refitted, {name: fits[name] for name in tiles}


@dataclass(frozen=True)
class _Pair:
    dense: nn.Linear
    refitted: nn.Linear
    grid: TileGrid
    kept: npt.NDArray[np.bool_]


class _Moments:
    """Second moments of a layer's inputs in the pruned model, and of those with the outputs of the dense one."""

    def __init__(self, pair: _Pair) -> None:
        self._pair = pair
        outputs, inputs = pair.grid.row_edges[-1], pair.grid.column_edges[-1]
        # One row and column more for the intercept.
        self._gram = torch.zeros(inputs + 1, inputs + 1, dtype=torch.float64)
        self._cross = torch.zeros(outputs, inputs + 1, dtype=torch.float64)
        self._squares = torch.zeros(outputs, dtype=torch.float64)
        self._rows = 0

    def add(self, given: torch.Tensor, wanted: torch.Tensor) -> None:
        """Take in the inputs of one batch, of the pruned and of the dense model, shapes [..., inputs]."""
        target = nn.functional.linear(wanted, self._pair.dense.weight, self._pair.dense.bias)
        target = target.flatten(0, -2).double().cpu()
        rows = given.flatten(0, -2).double().cpu()
        rows = torch.cat([rows, torch.ones(len(rows), 1, dtype=torch.float64)], 1)
        self._gram += rows.T @ rows
        self._cross += target.T @ rows
        self._squares += (target**2).sum(0)
        self._rows += len(rows)

    def refit(self, ridge: float | None, name: str, checks: _Moments) -> LayerFit:
        """Solve each block row, and put the result into the pruned model; without a ridge, with the best for other data."""
        for one in (self, checks):
            if not (torch.isfinite(one._gram).all() and torch.isfinite(one._cross).all()):
                raise ReconstructionError(f"inputs of a layer must be finite to refit it, found others at {name!r}.")
        layer = self._pair.refitted
        weight = torch.zeros_like(self._cross)
        weight[:, :-1] = layer.weight.double().cpu()
        if layer.bias is not None:
            weight[:, -1] = layer.bias.double().cpu()
        if ridge is None and checks._rows:
            found = [(float("inf"), weight), *((one, self._solved(weight, one)) for one in RIDGES)]
            ridge, new = min(found, key=lambda pair: checks._error(pair[1]))
        else:
            ridge = RIDGE if ridge is None else ridge
            new = self._solved(weight, ridge)
        before, after = self._error(weight), self._error(new)
        if after > before:  # nothing was to be gained but rounding
            new, after = weight, before
        layer.weight.copy_(new[:, :-1].to(layer.weight))
        if layer.bias is not None:
            layer.bias.copy_(new[:, -1].to(layer.bias))
        return LayerFit(before, after, self._rows, ridge)

    def _solved(self, weight: torch.Tensor, ridge: float) -> torch.Tensor:
        """Weights and intercept, shape [outputs, inputs + 1]."""
        grid, free = self._pair.grid, self._pair.refitted.bias is not None
        inputs = grid.column_edges[-1]
        pull = torch.full((inputs + 1,), ridge * float(self._gram.diagonal()[:-1].mean()), dtype=torch.float64)
        pull[-1] = 0.0
        new = weight.clone()
        for support, rows in self._by_support():
            columns = np.repeat(support, np.diff(grid.column_edges))
            place = torch.from_numpy(np.flatnonzero(np.append(columns, free)))
            if not len(place):
                continue
            gram, drawn = self._gram[place][:, place], pull[place]
            right = self._cross[rows][:, place] + weight[rows][:, place] * drawn
            new[rows[:, None], place] = _least_squares(gram + torch.diag(drawn), right)
        return new

    def _by_support(self) -> Iterator[tuple[npt.NDArray[np.bool_], torch.Tensor]]:
        """Block columns that are read, and the rows that read just those: one solve serves them all."""
        found: dict[bytes, list[int]] = {}
        kept = self._pair.kept
        for row, (begin, end) in enumerate(pairwise(self._pair.grid.row_edges)):
            found.setdefault(kept[row].tobytes(), []).extend(range(begin, end))
        for support, rows in found.items():
            yield np.frombuffer(support, dtype=bool), torch.tensor(rows)

    def _error(self, weight: torch.Tensor) -> float:
        """Squared error over the variance of the target."""
        squares = self._squares - 2 * (weight * self._cross).sum(1) + ((weight @ self._gram) * weight).sum(1)
        spread = (self._squares - self._cross[:, -1] ** 2 / self._rows).sum()
        return max(0.0, float(squares.sum())) / max(float(spread), 1e-300)


def _least_squares(gram: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Rows `w` of least squares: ``w gram = right``; the shortest of them where the matrix is singular."""
    factor, failed = torch.linalg.cholesky_ex(gram)
    scale = float(gram.diagonal().mean())
    if int(failed) == 0 and float(factor.diagonal().min()) ** 2 > 1e-12 * scale:
        found: torch.Tensor = torch.cholesky_solve(right.T, factor).T
        return found
    shortest: torch.Tensor = (torch.linalg.pinv(gram, rtol=1e-12, hermitian=True) @ right.T).T
    return shortest


def _linear(model: nn.Module, name: str) -> nn.Linear:
    modules = dict(model.named_modules())
    module = modules.get(name.rpartition(".")[0])
    if not isinstance(module, nn.Linear) or name.rpartition(".")[2] != "weight":
        raise ReconstructionError(f"kept tiles must be those of an nn.Linear to be refitted, found {name!r}.")
    return module


class _Reached(BaseException):
    """Ends a forward pass of which nothing more is needed; no error, so nothing on the way takes it for one."""


def _read(model: nn.Module, layers: Mapping[str, nn.Linear], inputs: Any) -> dict[str, torch.Tensor]:
    """What some layers read in one forward pass, which ends as soon as all of them have run."""
    found: dict[str, torch.Tensor] = {}
    handles = []

    def hook(name: str) -> Any:
        def look(_: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
            found[name] = given[0]
            if len(found) == len(layers):
                raise _Reached

        return look

    try:
        handles += [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
        call(model, inputs)
    except _Reached:
        return found
    finally:
        for handle in handles:
            handle.remove()
    missing = sorted(layers.keys() - found.keys())
    raise ReconstructionError(
        f"every layer that is to be refitted must run in a forward pass, {missing[0]!r} does not."
    )


def _stages(model: nn.Module, layers: Mapping[str, nn.Linear], inputs: Any) -> Sequence[Sequence[str]]:
    """The layers in the order in which they run; neighbors that read the very same tensor together."""
    order: list[tuple[str, torch.Tensor]] = []
    handles = []

    def hook(name: str) -> Any:
        def look(_: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
            order.append((name, given[0]))

        return look

    try:
        handles += [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
        call(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    names = [name for name, _ in order]
    if bad := sorted(name for name in layers if names.count(name) != 1):
        raise ReconstructionError(
            f"a layer must run once in a forward pass to be refitted, {bad[0]!r} runs {names.count(bad[0])} times."
        )
    stages: list[list[str]] = []
    last: torch.Tensor | None = None
    for name, tensor in order:
        if tensor is last:
            stages[-1].append(name)
        else:
            stages.append([name])
        last = tensor
    return stages
