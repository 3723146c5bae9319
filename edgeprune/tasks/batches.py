"""From a task's loaders to checked numbers: unpacking batches, calling the model, finite losses and metrics."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from edgeprune.errors import TaskError
from edgeprune.tasks.task import Batches, Objective, Split, Task
from edgeprune.tasks.user_code import blamed


def device_of(model: nn.Module) -> torch.device:
    """Device of the model's first parameter or buffer; the CPU for a model without any."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def moved(tree: Any, device: torch.device) -> Any:
    """Every tensor of a nested structure on `device`; anything else as it is."""
    return pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to(device, non_blocking=True), tree)


def call(model: nn.Module, inputs: Any) -> Any:
    """Run the model on a batch's inputs: a dict as keywords, a tuple or list as positions, anything else as the one input.

    Raises:
        TaskError: If the model does not run on them.
    """
    with blamed(f"the model on a batch of the task, {_shapes(inputs)},"):
        if isinstance(inputs, Mapping):
            return model(**inputs)
        if isinstance(inputs, tuple | list):
            return model(*inputs)
        return model(inputs)


def _shapes(inputs: Any) -> str:
    shapes = [
        f"{'x'.join(map(str, leaf.shape)) or 'scalar'} {str(leaf.dtype).removeprefix('torch.')}"
        for leaf in pytree.tree_leaves(inputs)
        if isinstance(leaf, torch.Tensor)
    ]
    return ", ".join(shapes) or type(inputs).__name__


def sample_count(inputs: Any) -> int:
    """Length of axis 0 of the first tensor in a batch's inputs; 1 where there is none."""
    for leaf in pytree.tree_leaves(inputs):
        if isinstance(leaf, torch.Tensor) and leaf.ndim > 0:
            return int(leaf.shape[0])
    return 1


def batch_count(loader: Batches) -> int | None:
    """Number of batches where the loader knows it without being read (a DataLoader over a stream does not), else None."""
    try:
        return len(loader)  # type: ignore[arg-type]
    except TypeError:
        return None


def unpack(batch: Any, source: str) -> tuple[Any, Any]:
    """Split a batch into inputs and targets.

    Args:
        batch: What a loader yielded.
        source: Which loader, for the message.

    Raises:
        TaskError: If it is not a pair.
    """
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        found = f"{type(batch).__name__} of length {len(batch)}" if hasattr(batch, "__len__") else type(batch).__name__
        raise TaskError(
            f"a batch of the {source} must be a pair (inputs, targets), found {found}.",
            hint="wrap the loader so that it yields (inputs, targets); inputs may be a tensor, a tuple or a dict",
        )
    return batch[0], batch[1]


def batches(loader: Batches, source: str, device: torch.device, limit: int | None = None) -> Iterator[tuple[Any, Any]]:
    """Yield the unpacked batches of a loader on `device`, at most `limit` of them.

    Raises:
        TaskError: If the loader raises, a batch is not a pair, or there is none.
    """
    count = 0
    read = _read(loader, source)
    while limit is None or count < limit:
        try:
            batch = next(read)
        except StopIteration:
            break
        inputs, targets = unpack(batch, source)
        count += 1
        yield moved(inputs, device), moved(targets, device)
    if count == 0:
        raise TaskError(f"the {source} must yield at least one batch, found an empty loader.")


def _read(loader: Batches, source: str) -> Iterator[Any]:
    with blamed(f"the {source}"):
        iterator = iter(loader)
    while True:
        with blamed(f"the {source}"):
            try:
                batch = next(iterator)
            except StopIteration:
                return
        yield batch


def objective_batches(
    objective: Objective, split: Split, device: torch.device, limit: int | None = None
) -> Iterator[tuple[Any, Any]]:
    """`batches` of one split of an objective."""
    loader = objective.train if split == "train" else objective.validation
    return batches(loader, f"{split} data of objective {objective.name!r}", device, limit)


def labeled_batches(
    objective: Objective, split: Split, device: torch.device, limit: int | None = None
) -> Iterator[tuple[Any, Any]]:
    """`objective_batches` that have labels for the objective; those without are passed over and do not count.

    Raises:
        TaskError: No batch of the split has any, or `labeled` cannot be used.
    """
    if objective.labeled is None:
        yield from objective_batches(objective, split, device, limit)
        return
    count = 0
    for inputs, targets in objective_batches(objective, split, device):
        if labeled_samples(objective, (), targets)[2]:
            yield inputs, targets
            count += 1
            if count == limit:
                return
    if count == 0:
        raise TaskError(
            f"the {split} data of objective {objective.name!r} must have labels for it in one batch at least, found none."
        )


def sharing(objectives: Sequence[Objective], split: Split) -> tuple[tuple[Objective, ...], ...]:
    """Objectives by the loader of a split: those that were given the same object share its batches. In order."""
    found: dict[int, list[Objective]] = {}
    for objective in objectives:
        found.setdefault(id(objective.train if split == "train" else objective.validation), []).append(objective)
    return tuple(tuple(several) for several in found.values())


def labeled_samples(objective: Objective, outputs: Any, targets: Any, count: int | None = None) -> tuple[Any, Any, int]:
    """The samples of a batch that have labels for an objective.

    Args:
        objective: Whose labels.
        outputs: What the model returned for the batch.
        targets: Of the batch.
        count: Samples of the batch, where the caller knows it.

    Returns:
        Outputs, targets and the number of those samples; where it is 0, outputs and targets as they came.

    Raises:
        TaskError: `labeled` raises, or returns something else than a bool per sample, or one.
    """
    whole = 1 if count is None else count
    if objective.labeled is None:
        return outputs, targets, whole
    with blamed(f"labeled of objective {objective.name!r}"):
        mask = torch.as_tensor(objective.labeled(targets)).cpu()
    if mask.dtype != torch.bool or mask.ndim > 1 or (mask.ndim and count not in (None, len(mask))):
        raise TaskError(
            f"labeled of objective {objective.name!r} must give one bool per sample{f', {count}' if count else ''}, or one for "
            f"all, found {str(mask.dtype).removeprefix('torch.')} of shape {tuple(mask.shape)}."
        )
    if mask.ndim == 0:
        return outputs, targets, whole if bool(mask) else 0
    there = int(mask.sum())
    if there in (0, len(mask)):
        return outputs, targets, there

    def only(leaf: torch.Tensor) -> torch.Tensor:
        return leaf[mask.to(leaf.device)] if leaf.ndim and len(leaf) == len(mask) else leaf

    own, wanted = (pytree.tree_map_only(torch.Tensor, only, tree) for tree in (outputs, targets))
    return own, wanted, there


def loss_of(objective: Objective, outputs: Any, targets: Any) -> torch.Tensor:
    """The objective's loss on the samples that have labels for it, checked.

    Returns:
        A finite scalar tensor; 0, with a gradient of 0, where no sample has labels.

    Raises:
        TaskError: If it raises, is not a tensor with one element, or not finite.
    """
    if objective.labeled is not None:
        outputs, targets, count = labeled_samples(objective, outputs, targets)
        if count == 0:
            leaves = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]
            # Of one element each: the gradient is 0, and it is there.
            return torch.stack([0.0 * leaf.flatten()[:1].sum() for leaf in leaves if leaf.is_floating_point()]).sum()
    with blamed(f"the loss of objective {objective.name!r}"):
        loss = objective.loss(outputs, targets)
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        found = f"shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else type(loss).__name__
        raise TaskError(f"the loss of objective {objective.name!r} must be a scalar tensor, found {found}.")
    value = float(loss.detach())
    if not math.isfinite(value):
        raise TaskError(
            f"the loss of objective {objective.name!r} must be finite, found {value}.",
            hint="a lower learning rate, or look for broken samples in the loader",
        )
    return loss.reshape(())


def metric_of(objective: Objective, outputs: Any, targets: Any) -> float:
    """The objective's metric, checked, on outputs and targets that all have labels.

    Raises:
        TaskError: If it raises, or is not one finite number.
    """
    with blamed(f"the metric of objective {objective.name!r}"):
        value = objective.metric(outputs, targets)
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TaskError(
            f"the metric of objective {objective.name!r} must be a number, found {type(value).__name__}."
        ) from error
    if not math.isfinite(number):
        raise TaskError(f"the metric of objective {objective.name!r} must be finite, found {number}.")
    return number


@contextmanager
def mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Put the model in train or eval form for a block; each module's own form comes back afterwards, whatever happens."""
    before = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, was_training in before:
            module.training = was_training


def validate(task: Task, model: nn.Module) -> None:
    """Try one batch of every loader: outputs, loss with a gradient, metric. Leaves the model as it was.

    Raises:
        TaskError: With the first thing that cannot be used.
    """
    device = device_of(model)
    with mode(model, training=False):
        for objective in task.objectives:
            inputs, targets = next(objective_batches(objective, "train", device, 1))
            with torch.enable_grad():
                loss = loss_of(objective, call(model, inputs), targets)
            learns = any(parameter.requires_grad for parameter in model.parameters())
            if learns and not loss.requires_grad:
                raise TaskError(
                    f"the loss of objective {objective.name!r} must be differentiable, found one without a gradient.",
                    hint="keep detach(), argmax() and NumPy out of the loss",
                )
            with torch.no_grad():
                inputs, targets = next(objective_batches(objective, "validation", device, 1))
                outputs, targets, count = labeled_samples(objective, call(model, inputs), targets, sample_count(inputs))
                if count:
                    metric_of(objective, outputs, targets)
