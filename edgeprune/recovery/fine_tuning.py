"""Fine-tuning on the user's task, optionally with the dense model as teacher."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from edgeprune.errors import ConfigError, TaskError
from edgeprune.recovery.distillation import Distillation, logit_distillation
from edgeprune.recovery.evaluation import RecoveryRecord, StepProgress, evaluate
from edgeprune.tasks.batches import batch_count, call, device_of, loss_of, mode, objective_batches
from edgeprune.tasks.task import Objective, Task

_log = logging.getLogger("edgeprune.recovery")

Watch = Callable[[int, int], None]
"""Called with (number of this step, steps in all)."""


@dataclass(frozen=True)
class FineTuning:
    """How to fine-tune.

    Attributes:
        epochs: Passes over the training data of the first objective; 0 does nothing.
        steps: Most optimizer steps in all; None means as many as the epochs have.
        lr: Learning rate at the start.
        schedule: ``"cosine"``: the learning rate falls to 0 along a cosine; ``"constant"``: it stays.
        optimizer: ``"adamw"``, or ``"sgd"`` with Nesterov momentum.
        weight_decay: Decoupled for AdamW; not applied to biases and normalization parameters.
        momentum: Of SGD.
        max_gradient_norm: Gradients are scaled down to this norm; None leaves them.
        distillation_weight: Share of the teacher's loss in [0, 1]; the task's loss has the rest. Without a teacher unused.
        temperature: Of the logit distillation.
        select_best: Keep the epoch with the best validation metric of the first objective instead of the last one. The
            validation figure is then a maximum of several looks: report the accuracy on other data.
        seed: Of everything random in training (order of a DataLoader, dropout); the caller's generator is not moved.
    """

    epochs: int = 3
    steps: int | None = None
    lr: float = 1e-3
    schedule: Literal["cosine", "constant"] = "cosine"
    optimizer: Literal["adamw", "sgd"] = "adamw"
    weight_decay: float = 1e-2
    momentum: float = 0.9
    max_gradient_norm: float | None = 5.0
    distillation_weight: float = 0.5
    temperature: float = 4.0
    select_best: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 0 or (self.steps is not None and self.steps < 0):
            raise ConfigError(f"epochs and steps must be at least 0, found {self.epochs} and {self.steps}.")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ConfigError(f"the learning rate must be above 0, found {self.lr}.")
        if self.schedule not in ("cosine", "constant"):
            raise ConfigError(f"the schedule must be 'cosine' or 'constant', found {self.schedule!r}.")
        if self.optimizer not in ("adamw", "sgd"):
            raise ConfigError(f"the optimizer must be 'adamw' or 'sgd', found {self.optimizer!r}.")
        if not 0 <= self.distillation_weight <= 1:
            raise ConfigError(f"distillation_weight must lie in [0, 1], found {self.distillation_weight}.")


def fine_tune(
    model: nn.Module,
    task: Task,
    settings: FineTuning | None = None,
    *,
    teacher: nn.Module | None = None,
    distillation: Distillation | None = None,
    progress: StepProgress | None = None,
    watch: Watch | None = None,
    **changes: Any,
) -> RecoveryRecord:
    """Train all parameters that require gradients, in place.

    If it is interrupted or fails, the model holds the weights of the last finished epoch (at first the ones that it came
    with), is in the form (train or eval) that it came in, and the exception goes on.

    Args:
        model: Changed in place, on the device where it is.
        task: Training data and losses; the weighted losses of several objectives are added, one batch of each per step (the
            first sets the length of an epoch, shorter ones start over).
        settings: How; defaults when None.
        teacher: The dense model: its outputs on the same inputs are a second target.
        distillation: Loss against the teacher's outputs; logits when None.
        progress: Told the steps done.
        watch: Called in every step when its gradients are there and nothing was done with them yet.
        changes: Single settings, e.g. ``epochs=5``.

    Returns:
        A record with the metrics before and after; its details hold ``epochs`` (loss and metrics of each), ``steps`` and
        ``kept_epoch``.

    Raises:
        TaskError: Empty data, or a loss or metric that is not finite.
        ConfigError: Settings that cannot be used.
    """
    try:
        chosen = replace(settings or FineTuning(), **changes)
    except TypeError as error:
        known = ", ".join(FineTuning.__dataclass_fields__)
        raise ConfigError(f"settings of fine-tuning must be among {known}, found {', '.join(changes)}.") from error
    devices = [device_of(model)] if device_of(model).type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(chosen.seed)
        return _fine_tune(model, task, chosen, teacher, distillation, progress, watch)


def _fine_tune(
    model: nn.Module,
    task: Task,
    chosen: FineTuning,
    teacher: nn.Module | None,
    distillation: Distillation | None,
    progress: StepProgress | None,
    watch: Watch | None,
) -> RecoveryRecord:
    before = evaluate(model, task)
    lead = task.objectives[0]
    total = steps_in_all(lead, chosen)
    if total == 0:
        return RecoveryRecord("fine_tuning", before, before, {"epochs": [], "steps": 0, "kept_epoch": 0})
    with _consistent(model) as snapshot, mode(model, training=True):
        trainer = _Trainer(model, task, chosen, total, teacher, distillation, progress, watch)
        best = before[lead.name]
        history: list[dict[str, Any]] = []
        kept = 0
        while trainer.done < total:
            loss = trainer.epoch()
            metrics = evaluate(model, task)
            history.append({"loss": loss, "metrics": metrics})
            _log.info("epoch %d: loss %.4f, %s", len(history), loss, metrics)
            better = metrics[lead.name] > best if lead.higher_is_better else metrics[lead.name] < best
            if not chosen.select_best or better:
                best, kept = metrics[lead.name], len(history)
                snapshot.take()
    after = history[kept - 1]["metrics"] if kept else before
    return RecoveryRecord("fine_tuning", before, after, {"epochs": history, "steps": trainer.done, "kept_epoch": kept})


class _Trainer:
    """Optimizer, schedule and data of one fine-tuning."""

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        settings: FineTuning,
        total: int,
        teacher: nn.Module | None,
        distillation: Distillation | None,
        progress: StepProgress | None,
        watch: Watch | None,
    ) -> None:
        self.model, self.task, self.settings, self.total, self.progress = model, task, settings, total, progress
        self.watch = watch
        self.teacher = teacher if settings.distillation_weight > 0 else None
        self.distillation = distillation or logit_distillation(settings.temperature)
        self.device = device_of(model)
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not self.parameters:
            raise TaskError(
                "fine-tuning needs parameters that require gradients, found none.", hint="requires_grad_(True)"
            )
        self.optimizer = _optimizer(self.parameters, settings)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda step: (
                0.5 * (1 + math.cos(math.pi * min(step, total) / total)) if settings.schedule == "cosine" else 1.0
            ),
        )
        self.others = [_endless(objective, self.device) for objective in task.objectives[1:]]
        self.done = 0

    def epoch(self) -> float:
        """One pass over the lead objective's data, or what is left of the steps.

        Returns:
            The mean loss.
        """
        losses = []
        for lead in objective_batches(self.task.objectives[0], "train", self.device):
            losses.append(self._step([lead, *(next(other) for other in self.others)]))
            self.done += 1
            if self.progress is not None:
                self.progress("fine-tuning", self.done, self.total)
            if self.done >= self.total:
                break
        return sum(losses) / len(losses)

    def _step(self, batches: list[tuple[Any, Any]]) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        value = 0.0
        share = self.settings.distillation_weight if self.teacher is not None else 0.0
        for objective, (inputs, targets) in zip(self.task.objectives, batches, strict=True):
            outputs = call(self.model, inputs)
            loss = (1 - share) * loss_of(objective, outputs, targets)
            if self.teacher is not None:
                with torch.no_grad(), mode(self.teacher, training=False):
                    wanted = call(self.teacher, inputs)
                loss = loss + share * self.distillation(outputs, wanted)
            loss = objective.weight * loss
            loss.backward()  # type: ignore[no-untyped-call]
            value += float(loss.detach())
        if self.watch is not None:
            self.watch(self.done + 1, self.total)
        if self.settings.max_gradient_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.settings.max_gradient_norm)
        self.optimizer.step()
        self.schedule.step()
        return value


def _optimizer(parameters: list[nn.Parameter], settings: FineTuning) -> torch.optim.Optimizer:
    # Vectors are biases and normalization parameters; shrinking those changes what a layer computes, not how complex it is.
    decayed = [parameter for parameter in parameters if parameter.ndim > 1]
    plain = [parameter for parameter in parameters if parameter.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum, nesterov=settings.momentum > 0)
    return torch.optim.AdamW(groups, lr=settings.lr)


def _endless(objective: Objective, device: torch.device) -> Iterator[tuple[Any, Any]]:
    while True:
        yield from objective_batches(objective, "train", device)


def steps_in_all(lead: Objective, settings: FineTuning) -> int:
    """Optimizer steps that these settings come to on an objective's training data; a stream is counted by reading it once.

    Raises:
        TaskError: The training data are empty.
    """
    if settings.epochs == 0 or settings.steps == 0:
        return 0
    per_epoch = batch_count(lead.train)
    if per_epoch is None:
        per_epoch = sum(1 for _ in lead.train)
    if per_epoch == 0:
        raise TaskError(
            f"the train data of objective {lead.name!r} must yield at least one batch, found an empty loader."
        )
    total = settings.epochs * per_epoch
    return total if settings.steps is None else min(total, settings.steps)


class _Snapshot:
    """The weights and buffers to come back to."""

    def __init__(self, model: nn.Module) -> None:
        self._tensors = [*model.parameters(), *model.buffers()]
        self.take()

    def take(self) -> None:
        """Remember the values of now."""
        self._values = [tensor.detach().clone() for tensor in self._tensors]

    def restore(self) -> None:
        """Put the remembered values back."""
        with torch.no_grad():
            for tensor, value in zip(self._tensors, self._values, strict=True):
                tensor.copy_(value)


@contextmanager
def _consistent(model: nn.Module) -> Iterator[_Snapshot]:
    """Whatever ends the block, the model holds what was last remembered, and no gradients are left behind."""
    snapshot = _Snapshot(model)
    try:
        yield snapshot
    finally:
        snapshot.restore()
        model.zero_grad(set_to_none=True)
