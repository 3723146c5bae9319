"""Metrics of a model on its task, and the before/after record that every recovery step leaves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from edgeprune.errors import TaskError
from edgeprune.tasks import ranks
from edgeprune.tasks.batches import (
    call,
    device_of,
    labeled_samples,
    metric_of,
    mode,
    objective_batches,
    sample_count,
    sharing,
)
from edgeprune.tasks.task import Objective, Split, Task

StepProgress = Callable[[str, int, int], None]
"""Called with (what is being done, steps done, steps in all)."""


@dataclass(frozen=True)
class RecoveryRecord:
    """What one recovery step did.

    Attributes:
        step: Name of the step.
        before: Validation metric by objective before it; empty without a task.
        after: The same after it.
        details: What else is worth keeping (epochs, losses, batches), JSON-ready.
    """

    step: str
    before: Mapping[str, float] = field(default_factory=dict)
    after: Mapping[str, float] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)


def evaluate(
    model: nn.Module, task: Task, *, split: Split = "validation", batches: int | None = None
) -> dict[str, float]:
    """Metric of each objective, in eval form without gradients; the model is left as it was.

    Where ``torch.distributed`` is initialized, all processes must call it, each with its share of the data, and all get the
    metric of all data. (A `DistributedSampler` fills up the shares with a few samples that are then counted twice.)

    Args:
        model: Called on the batches' inputs, on the device where it is.
        task: Data and metrics.
        split: Which data.
        batches: Most batches per objective; None means all.

    Returns:
        Objective name to its metric: averaged over samples, or for a pooled objective that of all batches together.

    Raises:
        TaskError: Empty data, data without labels, a batch that is not a pair, or a metric that is not a finite number.
    """
    device = device_of(model)
    found: dict[str, float] = {}
    with mode(model, training=False), torch.no_grad():
        for together in sharing(task.objectives, split):
            sums = {one.name: _Pool(one) if one.pooled else _Mean(one) for one in together}
            for inputs, targets in objective_batches(together[0], split, device, batches):
                outputs, count = call(model, inputs), sample_count(inputs)
                for one in together:
                    labeled = labeled_samples(one, outputs, targets, count)
                    if labeled[2]:
                        sums[one.name].add(*labeled)
            found |= {name: total.value(split) for name, total in sums.items()}
    return {objective.name: found[objective.name] for objective in task.objectives}


class _Mean:
    """The mean over samples of a metric that is called per batch."""

    def __init__(self, objective: Objective) -> None:
        self.objective, self.total, self.samples = objective, 0.0, 0.0

    def add(self, outputs: Any, targets: Any, count: int) -> None:
        self.total += count * metric_of(self.objective, outputs, targets)
        self.samples += count

    def value(self, split: Split) -> float:
        total, samples = ranks.summed([self.total, self.samples])
        _require_labels(self.objective, split, samples)
        return total / samples


class _Pool:
    """A metric of all batches together."""

    def __init__(self, objective: Objective) -> None:
        self.objective, self.collected = objective, list[tuple[Any, Any]]()

    def add(self, outputs: Any, targets: Any, count: int) -> None:
        self.collected.append((_on_cpu(outputs), _on_cpu(targets)))

    def value(self, split: Split) -> float:
        # A process without any could not take part in the gathering.
        everywhere = ranks.summed([float(bool(self.collected))])[0] == ranks.count()
        _require_labels(self.objective, split, float(everywhere))
        outputs, targets = _of_all_ranks(_concatenated(self.collected))
        return metric_of(self.objective, outputs, targets)


def _require_labels(objective: Objective, split: Split, count: float) -> None:
    if not count:
        raise TaskError(
            f"the {split} data of objective {objective.name!r} must have labels for it in at least one batch, found none."
        )


def _of_all_ranks(tree: Any) -> Any:
    """The tensors of all processes, joined along axis 0."""
    if ranks.count() == 1:
        return tree
    if not all(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(tree)):
        raise TaskError("outputs and targets of a pooled metric must be tensors to be gathered from several processes.")
    return pytree.tree_map(lambda leaf: torch.cat(ranks.gathered(leaf)), tree)


def _on_cpu(tree: Any) -> Any:
    return pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.cpu(), tree)


def _concatenated(trees: list[Any]) -> Any:
    """Structures of equal form, leaf by leaf: tensors joined along axis 0, anything else gathered in a list."""
    leaves = [pytree.tree_leaves(tree) for tree in trees]
    _, form = pytree.tree_flatten(trees[0])
    joined = [
        torch.cat([value if value.ndim else value[None] for value in values])
        if all(isinstance(value, torch.Tensor) for value in values)
        else list(values)
        for values in zip(*leaves, strict=True)
    ]
    return pytree.tree_unflatten(joined, form)
