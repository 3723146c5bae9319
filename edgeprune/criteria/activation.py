"""Statistics of what units hand on, over calibration batches."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch

from edgeprune.criteria._base import Criterion, Normalization
from edgeprune.criteria.readings import Reading, rectifier_readings, require, value_readings, watch
from edgeprune.criteria.slices import selected
from edgeprune.errors import ConfigError
from edgeprune.tasks.batches import device_of, objective_batches

if TYPE_CHECKING:
    from torch import nn

    from edgeprune.graph.channel_graph import ChannelGraph, ChannelGroup
    from edgeprune.tasks.task import Task


class _Activation(Criterion):
    """A mean over all values of a unit (samples, positions, its channels), equally over the places where it is seen.

    The model runs in eval form. Several objectives: the weighted sum of their scores.

    Args:
        batches: Most training batches per objective.
    """

    needs_task: ClassVar[bool] = True
    # Scales differ from layer to layer, so scores only rank the units of one group.
    normalization: ClassVar[Normalization] = "log_share"
    _needed: ClassVar[str] = "a layer that reads or makes the channels"

    def __init__(self, batches: int = 8) -> None:
        if batches < 1:
            raise ConfigError(f"the {self.name} criterion must use at least 1 batch, found batches={batches}.")
        self.batches = batches

    def score(
        self, graph: ChannelGraph, model: nn.Module, task: Task | None = None, *, groups: Sequence[str] | None = None
    ) -> dict[str, npt.NDArray[np.float64]]:
        """See `Criterion.score`; raises `TaskError` too where batches have not the shape of the example inputs."""
        task, chosen = self._required(task, "its activations"), selected(graph, groups)
        places = self._places(graph, chosen)
        require(places, chosen, self.name, self._needed)
        scores = {group.name: np.zeros(group.size) for group in chosen}
        for objective in task.objectives:
            means = _Means(self)
            watch(
                graph, model, objective_batches(objective, "train", device_of(model), self.batches), places, means.look
            )
            for name in scores:
                found = [values for (_, _, group), values in means.values().items() if group == name]
                scores[name] += objective.weight * self._score(np.mean(found, axis=0))
        return self._finite(scores, "activations")

    def _places(self, graph: ChannelGraph, groups: Sequence[ChannelGroup]) -> list[Reading]:
        """Where to look; by default where layers read the units."""
        return value_readings(graph, groups)

    @abstractmethod
    def _terms(self, values: torch.Tensor) -> torch.Tensor:
        """What is averaged, per value."""

    def _score(self, means: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """From means to scores, shape (size,)."""
        return means


class _Means:
    """Running means by place and group."""

    def __init__(self, criterion: _Activation) -> None:
        self._criterion = criterion
        self._sums: dict[tuple[str, int, str], npt.NDArray[np.float64]] = {}
        self._counts: dict[tuple[str, int, str], int] = {}

    def look(self, reading: Reading, value: torch.Tensor, _: Mapping[str, Any]) -> None:
        """Take in one value of the program."""
        rows = self._criterion._terms(value).movedim(reading.axis, 0).flatten(1)
        sums = rows.sum(1, dtype=torch.float64).cpu().numpy()
        for group, positions in reading.units.items():
            key = (reading.node, reading.axis, group)
            self._sums[key] = self._sums.get(key, 0.0) + sums[positions].sum(1)
            self._counts[key] = self._counts.get(key, 0) + rows.shape[1] * positions.shape[1]

    def values(self) -> dict[tuple[str, int, str], npt.NDArray[np.float64]]:
        """Means by node, axis and group, each of shape (size,)."""
        return {key: sums / self._counts[key] for key, sums in self._sums.items()}


class ActivationMean(_Activation):
    """``mean of |x|`` over the values of the unit that convolutions and linear layers read.

    Where no such layer reads a unit (queries and keys meet in a product), it is seen where it is made.

    Source: P. Molchanov et al., "Pruning Convolutional Neural Networks for Resource Efficient Inference", ICLR 2017, section
    2.2, "activation"; with absolute values, because not every activation has one sign.
    """

    name: ClassVar[str] = "activation_mean"

    def _terms(self, values: torch.Tensor) -> torch.Tensor:
        return values.abs()


class ActivationRms(_Activation):
    """``sqrt(mean of x * x)`` over the values of the unit that convolutions and linear layers read.

    Where no such layer reads a unit (queries and keys meet in a product), it is seen where it is made.

    Source: the activations' factor in M. Sun et al., "A Simple and Effective Pruning Approach for Large Language Models",
    ICLR 2024, eq. 1 (there the norm over all samples), for a whole unit.
    """

    name: ClassVar[str] = "activation_rms"

    def _terms(self, values: torch.Tensor) -> torch.Tensor:
        return values.double().square()

    def _score(self, means: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return np.sqrt(means)


class Apoz(_Activation):
    """``1 - average percentage of zeros`` behind the ReLUs that the unit passes through.

    It says nothing where nothing makes zeros: a group without a ReLU or ReLU6 is an error.

    Source: H. Hu et al., "Network Trimming: A Data-Driven Neuron Pruning Approach towards Efficient Deep Architectures", 2016,
    eq. 1.
    """

    name: ClassVar[str] = "apoz"
    _needed: ClassVar[str] = "a ReLU"

    def _places(self, graph: ChannelGraph, groups: Sequence[ChannelGroup]) -> list[Reading]:
        return rectifier_readings(graph, groups)

    def _terms(self, values: torch.Tensor) -> torch.Tensor:
        return values != 0
