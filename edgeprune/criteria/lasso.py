"""Channel selection by l1-regularized reconstruction of what the next layers compute."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch

from edgeprune.criteria._base import Criterion, Normalization
from edgeprune.criteria.patches import patches
from edgeprune.criteria.readings import Reading, layer_readings, require, watch
from edgeprune.criteria.slices import selected
from edgeprune.errors import ConfigError
from edgeprune.tasks.batches import device_of, objective_batches

if TYPE_CHECKING:
    from torch import nn

    from edgeprune.graph.channel_graph import ChannelGraph
    from edgeprune.tasks.task import Task

Array = npt.NDArray[np.float64]
_CONSTANT = 1e-12
"""Share of a mean square up to which a variance is rounding."""


class Lasso(Criterion):
    """``largest penalty at which the unit is still used`` to reconstruct the outputs of the layers that read it.

    With ``Z_u`` what unit `u` adds to such a layer's output ``Y = sum of Z_u`` (bias aside), the LASSO is::

        minimize over b:  1/2 * ||Y - sum of b_u * Z_u|| ** 2 / ||Y|| ** 2  +  penalty * sum of |b_u|

    with `Y` and `Z` centered over the rows, because a bias can be refitted. From the largest penalty downward units enter one
    by one; a score is the penalty at which that happens, found exactly by least angle regression. So the best `w` units are
    those that the paper's search for a penalty with `w` of them left ends at (but for units that leave again on the way).

    The coefficients are only used to choose; weights are refitted by a recovery step. Where several layers read a unit, each
    has the same weight, and `b` is common to them.

    Only second moments are kept, one matrix of (units, units) per group and layer. Several objectives: the weighted sum of
    their scores.

    Source: Y. He et al., "Channel Pruning for Accelerating Very Deep Neural Networks", ICCV 2017, section 3.1. As in its
    code, contributions are taken as large as they are; the paper's text scales the weights that read a unit to norm 1.

    Args:
        batches: Most training batches per objective.
        positions: Random output positions per image and layer, as many as in the paper; None means all.
        seed: Of their choice.
    """

    name: ClassVar[str] = "lasso"
    needs_task: ClassVar[bool] = True
    # Penalties rank the units of one group by when they are needed; their sum has no meaning of its own.
    normalization: ClassVar[Normalization] = "log_share"

    def __init__(self, batches: int = 8, positions: int | None = 10, seed: int = 0) -> None:
        if batches < 1 or (positions is not None and positions < 1):
            raise ConfigError(
                "the lasso criterion must use at least 1 batch and 1 position, "
                f"found batches={batches} and positions={positions}."
            )
        self.batches, self.positions, self.seed = batches, positions, seed

    def score(
        self, graph: ChannelGraph, model: nn.Module, task: Task | None = None, *, groups: Sequence[str] | None = None
    ) -> dict[str, npt.NDArray[np.float64]]:
        """See `Criterion.score`; raises `TaskError` too where batches have not the shape of the example inputs."""
        task, chosen = self._required(task, "its activations"), selected(graph, groups)
        places = layer_readings(graph, chosen)
        require(places, chosen, self.name, "a layer that reads the channels")
        scores = {group.name: np.zeros(group.size) for group in chosen}
        for objective in task.objectives:
            outputs = _Outputs(self.positions, self.seed)
            watch(
                graph,
                model,
                objective_batches(objective, "train", device_of(model), self.batches),
                places,
                outputs.look,
            )
            for name, moments in outputs.of_group.items():
                self._finite(
                    {name: np.concatenate([moment.gram().ravel() for moment in moments.values()])}, "activations"
                )
                scores[name] += objective.weight * entry_penalties(list(moments.values()))
        return scores


class Moments:
    """Second moments of what the units of one group add to one layer's output, over rows taken in batch by batch."""

    def __init__(self, units: int) -> None:
        self._units, self._rows = units, 0
        self._products = np.zeros((units, units))
        self._sums: dict[int, torch.Tensor] = {}
        self._weights: dict[int, torch.Tensor] = {}

    def add(self, rows: torch.Tensor, weight: torch.Tensor, positions: npt.NDArray[np.int64]) -> None:
        """Take in rows of a layer's input.

        Args:
            rows: As `patches` gives them.
            weight: The same.
            positions: Channels of each unit, shape (units, channels of a unit).
        """
        channels = rows.shape[2]
        for conv_group in range(rows.shape[1]):
            inside = positions[positions // channels == conv_group] % channels
            if not inside.size:
                continue
            own = torch.from_numpy(inside).to(rows.device)
            read = rows[:, conv_group, own].double().flatten(1)
            by = weight[conv_group][:, own].double().flatten(1)
            # Z_u . Z_v is the sum over pairs of channels of the moments of both sides: Z itself is never formed.
            products = (read.T @ read) * (by.T @ by)
            of_a_unit = read.shape[1] // self._units
            blocks = products.reshape(self._units, of_a_unit, self._units, of_a_unit)
            self._products += blocks.sum((1, 3)).cpu().numpy()
            self._weights[conv_group] = by
            sums = read.sum(0)
            self._sums[conv_group] = self._sums[conv_group] + sums if conv_group in self._sums else sums
        self._rows += rows.shape[0]

    def gram(self) -> Array:
        """Mean over the rows of ``Z_u . Z_v``, `Z` centered, shape (units, units); 0 for a unit that is constant."""
        found = self._products / self._rows
        least = _CONSTANT * np.diag(found)
        for conv_group, sums in self._sums.items():
            of_a_unit = len(sums) // self._units
            terms = self._weights[conv_group] * (sums / self._rows)
            means = terms.reshape(-1, self._units, of_a_unit).sum(2)
            found = found - (means.T @ means).cpu().numpy()
        constant = np.diag(found) <= least
        found[constant] = found[:, constant] = 0.0
        return found


class _Outputs:
    """Moments by group and layer."""

    def __init__(self, positions: int | None, seed: int) -> None:
        self._positions, self._seed = positions, seed
        self._generators: dict[str, torch.Generator] = {}
        self.of_group: dict[str, dict[str, Moments]] = {}

    def look(self, reading: Reading, value: torch.Tensor, named: Mapping[str, Any]) -> None:
        """Take in what a layer reads."""
        if reading.node not in self._generators:
            # A generator for each layer: which groups are scored must not change what a layer sees.
            seed = zlib.crc32(reading.node.encode()) + self._seed
            self._generators[reading.node] = torch.Generator().manual_seed(seed)
        rows, weight = patches(value, named, self._positions, self._generators[reading.node])
        for group, positions in reading.units.items():
            moments = self.of_group.setdefault(group, {}).setdefault(reading.node, Moments(len(positions)))
            moments.add(rows, weight, positions)


def entry_penalties(moments: Sequence[Moments]) -> Array:
    """The penalty at which each unit enters, for layers of equal weight; 0 for those that add nothing.

    Returns:
        Shape (units,).
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import lars_path_gram

    grams = [moment.gram() for moment in moments]
    energies = [float(gram.sum()) for gram in grams]
    seen = [index for index, energy in enumerate(energies) if energy > 0]
    scores = np.zeros(len(grams[0]))
    if not seen:
        return scores
    gram = np.mean([grams[index] / energies[index] for index in seen], axis=0)
    # What is constant on all rows is replaced by the bias.
    alive = np.diag(gram) > 0
    used_gram, target = gram[np.ix_(alive, alive)], gram[alive].sum(1)
    with warnings.catch_warnings():
        # Units that others replace exactly are dropped by it with a warning, and rightly score 0.
        warnings.simplefilter("ignore", ConvergenceWarning)
        knots, _, path = lars_path_gram(target, used_gram, n_samples=1, method="lasso")
    used = path != 0
    entered = used.any(axis=1)
    # Nonzero from the knot after the one at which it enters.
    entry = np.where(entered, knots[np.maximum(used.argmax(axis=1) - 1, 0)], 0.0)
    scores[alive] = entry
    return scores
