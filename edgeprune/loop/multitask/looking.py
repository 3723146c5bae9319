"""Losses and metrics of cut models, per objective, on training batches that are read once.

The batches are in two parts: a search compares losses on the first, and asks for metrics on the second, which the losses have not
been fitted to. The validation data decide nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from edgeprune.criteria.batch_statistics import by_batch
from edgeprune.errors import TaskError
from edgeprune.recovery.evaluation import evaluate
from edgeprune.surgery.cutting import cut_program
from edgeprune.surgery.plan import make_plan
from edgeprune.tasks.batches import (
    call,
    device_of,
    labeled_samples,
    loss_of,
    mode,
    objective_batches,
    sample_count,
    sharing,
)
from edgeprune.tasks.task import Objective, Task

if TYPE_CHECKING:
    from torch import nn

    from edgeprune.graph.channel_graph import ChannelGraph
    from edgeprune.surgery.plan import PruningPlan
    from edgeprune.surgery.program_module import ProgramModule

Kept = Mapping[str, tuple[int, ...]]
"""Group name to the units that stay, for every group."""


class CalibrationData:
    """A few training batches of each objective, in two parts.

    Args:
        task: The objectives; those that were given the same training data share batches here too.
        device: Where the batches are kept.
        losses: Most batches of each objective for losses.
        metrics: Most batches of each objective for metrics, others than those.
        seed: Of the order in which a loader shuffles.

    Attributes:
        losses: Task whose training data are the first part.
        metrics: Task whose validation data are the second part.

    Raises:
        TaskError: An objective has no two batches.
    """

    def __init__(self, task: Task, device: torch.device, losses: int, metrics: int, seed: int) -> None:
        first: dict[str, Objective] = {}
        second: dict[str, Objective] = {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for together in sharing(task.objectives, "train"):
                read = list(objective_batches(together[0], "train", device, losses + metrics))
                if len(read) == 1:
                    raise TaskError(
                        f"a search under limits needs at least two training batches of objective {together[0].name!r}, one for "
                        "losses and one for metrics, found one.",
                        hint="a smaller batch size",
                    )
                cut = max(1, len(read) * losses // (losses + metrics))
                # The same lists for all that share them: so they share the forward too.
                parts = read[:cut], read[cut:]
                for one in together:
                    first[one.name] = replace(one, train=parts[0])
                    second[one.name] = replace(one, validation=parts[1])
        self.losses = Task(tuple(first[one.name] for one in task.objectives))
        self.metrics = Task(tuple(second[one.name] for one in task.objectives))


class Looking:
    """Looks at a model with some units cut.

    Args:
        model: Its weights; they may change between looks.
        graph: Its channel groups.
        data: The batches.
        batch_statistics: Whether batch norms normalize by the batch, as if their statistics had been estimated anew after each
            cut; running ones describe what is no longer there.

    Attributes:
        looks: How many cut models were looked at.
    """

    def __init__(self, model: nn.Module, graph: ChannelGraph, data: CalibrationData, *, batch_statistics: bool) -> None:
        self._model, self._graph, self._data, self._by_batch = model, graph, data, batch_statistics
        self.looks = 0

    def plan(self, kept: Kept) -> PruningPlan:
        """The plan that keeps these units."""
        dense = self._graph.widths()
        return make_plan(
            self._graph, {name: units for name, units in kept.items() if len(units) < dense[name]}, allow_empty=True
        )

    def cut(self, kept: Kept) -> ProgramModule:
        """The model with only these units, in eval form.

        Raises:
            SurgeryError: The cut program cannot be written down.
        """
        return cut_program(self._model, self.plan(kept)).eval()

    def losses(self, kept: Kept, objectives: Iterable[str] | None = None) -> dict[str, float]:
        """Loss per objective on the first part, averaged over samples with labels.

        Args:
            kept: The units that stay.
            objectives: Of which; all when None.

        Raises:
            TaskError: A loss cannot be used, or no sample has labels.
        """
        self.looks += 1
        return self.losses_of(self.cut(kept), objectives)

    def losses_of(self, module: nn.Module, objectives: Iterable[str] | None = None) -> dict[str, float]:
        """As `losses`, of a model that is cut already."""
        wanted = None if objectives is None else set(objectives)
        chosen = [one for one in self._data.losses.objectives if wanted is None or one.name in wanted]
        return self._losses(module, chosen)

    def metrics(self, module: nn.Module) -> dict[str, float]:
        """Metric per objective of a cut model on the second part."""
        with self._norms(module):
            return evaluate(module, self._data.metrics)

    def first_metrics(self, module: nn.Module) -> dict[str, float]:
        """The same on the first part."""
        first = Task(tuple(replace(one, validation=one.train) for one in self._data.losses.objectives))
        with self._norms(module):
            return evaluate(module, first)

    def pairs(self, kept: Kept) -> tuple[dict[str, float], dict[str, float]]:
        """Loss and metric per objective, both on the first part: how they go together."""
        self.looks += 1
        module = self.cut(kept)
        return self.losses_of(module), self.first_metrics(module)

    def _losses(self, module: nn.Module, objectives: Sequence[Objective]) -> dict[str, float]:
        sums = {one.name: 0.0 for one in objectives}
        counts = {one.name: 0 for one in objectives}
        with mode(module, training=False), torch.no_grad(), self._norms(module):
            for together in sharing(objectives, "train"):
                for inputs, targets in objective_batches(together[0], "train", device_of(module)):
                    outputs, count = call(module, inputs), sample_count(inputs)
                    for one in together:
                        own = labeled_samples(one, outputs, targets, count)[2]
                        if own:
                            sums[one.name] += own * float(loss_of(one, outputs, targets))
                            counts[one.name] += own
        for name, count in counts.items():
            if not count:
                raise TaskError(
                    f"the training batches that a search reads must have labels for objective {name!r}, found none.",
                    hint="more batches: Pagcp(batches=...)",
                )
        return {name: total / counts[name] for name, total in sums.items()}

    def _norms(self, module: nn.Module) -> Any:
        return by_batch(module) if self._by_batch else nullcontext()
