"""Fine-tuning on the user's task, optionally with the dense model as teacher, in one process or in several."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import nn

from edgeprune.errors import ConfigError, TaskError
from edgeprune.recovery import checkpoint as checkpoints
from edgeprune.recovery.batch_norm import reestimate_batch_norm
from edgeprune.recovery.evaluation import RecoveryRecord, StepProgress, evaluate
from edgeprune.recovery.precision import PRECISIONS, Precision
from edgeprune.recovery.snapshot import consistent
from edgeprune.recovery.teaching import Distillations, Teaching, made
from edgeprune.recovery.training import Trainer
from edgeprune.recovery.watching import Tap
from edgeprune.tasks import ranks
from edgeprune.tasks.batches import batch_count, device_of, mode
from edgeprune.tasks.task import Objective, Task

AVERAGED_BATCHES = 64
"""Most training batches for the batch-norm statistics of averaged weights."""

Watch = Callable[[int, int], None]
"""Called with (number of this step, steps in all)."""


class Companion(Protocol):
    """What goes on beside a training, step by step (`Watch`), and must be where it was when the training goes on."""

    def state(self) -> Any:
        """Where it is, as JSON values; asked for after each epoch."""
        ...

    def restore(self, state: Any) -> None:
        """Be where it was."""
        ...


_log = logging.getLogger("edgeprune.recovery")


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
        temperature: Of the distillations that soften by one.
        ema: Decay in [0, 1) of a moving average of the weights (`edgeprune.recovery.averaging`), which is what is kept then,
            with batch-norm statistics estimated for it; None keeps the weights as trained.
        precision: ``"float32"``; or ``"bfloat16"`` (CPU and CUDA) or ``"float16"`` (CUDA alone, with gradient scaling) for the
            forward, where weights, losses and optimizer stay float32.
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
    ema: float | None = None
    precision: Precision = "float32"
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
        if self.ema is not None and not 0 <= self.ema < 1:
            raise ConfigError(f"the decay of the weight average must lie in [0, 1), found {self.ema}.")
        if self.precision not in PRECISIONS:
            raise ConfigError(
                f"the training precision must be one of {', '.join(PRECISIONS)}, found {self.precision!r}."
            )


def fine_tune(
    model: nn.Module,
    task: Task,
    settings: FineTuning | None = None,
    *,
    teacher: nn.Module | None = None,
    distillation: Distillations = "logits",
    taps: Sequence[Tap] = (),
    checkpoint: Path | str | None = None,
    progress: StepProgress | None = None,
    watch: Watch | None = None,
    companion: Companion | None = None,
    **changes: Any,
) -> RecoveryRecord:
    """Train all parameters that require gradients, in place.

    If it is interrupted or fails, the model holds the weights of the last finished epoch (at first the ones that it came
    with), is in the form (train or eval) that it came in, and the exception goes on. With a `checkpoint`, the same call on the
    same starting weights then goes on from that epoch, to the weights that it would have come to without the interruption.

    Where ``torch.distributed`` is initialized (``torchrun``), every process calls this with its own share of the data:
    gradients, losses, metrics and batch-norm statistics are averaged over the processes, which start from the weights of the
    first; only that one writes. Each must have equally many training batches.

    Args:
        model: Changed in place, on the device where it is.
        task: Training data and losses; the weighted losses of several objectives are added, one batch of each per step (the
            first sets the length of an epoch, shorter ones start over, longer ones go on in the next epoch). Objectives that
            were given the same loader share the batch and the forward.
        settings: How; defaults when None.
        teacher: The dense model: what it computes on the same inputs is a second target.
        distillation: Losses against the teacher, by name or as objects; several are added.
        taps: Where features are compared, see `edgeprune.recovery.taps.find_taps`.
        checkpoint: File that is written after each epoch, and gone on from where it is there. It stays when all is done: the
            same call then gives the same result at once.
        progress: Told the steps done.
        watch: Called in every step when its gradients are there and nothing was done with them yet; those of float16 are scaled.
        companion: What is kept in the checkpoint too, and told where it was when the training goes on.
        changes: Single settings, e.g. ``epochs=5``.

    Returns:
        A record with the metrics before and after; its details hold ``epochs`` (loss and metrics of each, with a weight average
        also its metrics as ``averaged``), ``steps``, ``kept_epoch`` (0 for the weights at the start), and ``kept_weights``:
        ``"given"``, ``"trained"`` or ``"averaged"``.

    Raises:
        TaskError: Empty data, a loss or metric that is not finite, or processes with unequal or the same data.
        ConfigError: Settings that cannot be used, or a checkpoint of another training.
    """
    try:
        chosen = replace(settings or FineTuning(), **changes)
    except TypeError as error:
        known = ", ".join(FineTuning.__dataclass_fields__)
        raise ConfigError(f"settings of fine-tuning must be among {known}, found {', '.join(changes)}.") from error
    distillations = made(distillation, chosen.temperature)
    teaching = None
    if teacher is not None and chosen.distillation_weight > 0:
        teaching = Teaching(teacher, model, distillations, taps)
    devices = [device_of(model)] if device_of(model).type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(chosen.seed)
        path = None if checkpoint is None else Path(checkpoint)
        run = _Run(model, task, chosen, teaching, path, progress, watch, companion)
        return run.go()


class _Run:
    """One fine-tuning, from its start or from a checkpoint."""

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        settings: FineTuning,
        teaching: Teaching | None,
        path: Path | None,
        progress: StepProgress | None,
        watch: Watch | None,
        companion: Companion | None,
    ) -> None:
        self.model, self.task, self.settings = model, task, settings
        self.teaching, self.path, self.progress, self.watch = teaching, path, progress, watch
        self.companion = companion
        self.lead = task.objectives[0]
        self.before: dict[str, float] = {}
        self.history: list[dict[str, Any]] = []
        self.kept_epoch, self.kept_weights, self.best = 0, "given", math.nan

    def go(self) -> RecoveryRecord:
        total = steps_in_all(self.lead, self.settings)
        if total == 0:
            self.before = evaluate(self.model, self.task)
            return self._record(0)
        ranks.shared([*self.model.parameters(), *self.model.buffers()])
        with ExitStack() as stack:
            self.snapshot = stack.enter_context(consistent(self.model))
            stack.enter_context(mode(self.model, training=True))
            if self.teaching is not None:
                stack.enter_context(self.teaching.attached())
            trainer = Trainer(self.model, self.task, self.settings, total, self.teaching, self.progress, self.watch)
            identity = self._identity(total) if self.path is not None else {}
            if not self._resumed(trainer, identity):
                self.before = evaluate(self.model, self.task)
                self.best = self.before[self.lead.name]
            while trainer.done < total:
                self._epoch(trainer)
                self._save(trainer, identity)
        return self._record(trainer.done)

    def _epoch(self, trainer: Trainer) -> None:
        loss = trainer.epoch(len(self.history))
        # Each process has seen other batches; from here on all have the same statistics.
        ranks.average(list(self.model.buffers()))
        entry: dict[str, Any] = {"loss": loss, "metrics": evaluate(self.model, self.task)}
        self.history.append(entry)
        self._consider("trained", entry["metrics"])
        if trainer.average is not None:
            # The training itself is to be the same with and without an average, whatever its data draw from.
            with trainer.average.in_place(self.model), trainer.generators.kept():
                reestimate_batch_norm(self.model, self.lead.train, batches=AVERAGED_BATCHES)
                entry["averaged"] = evaluate(self.model, self.task)
                self._consider("averaged", entry["averaged"])
        _log.info("epoch %d: %s", len(self.history), entry)

    def _consider(self, weights: str, metrics: dict[str, float]) -> None:
        """Keep the weights that the model has now, if they are the ones to keep."""
        value = metrics[self.lead.name]
        better = value > self.best if self.lead.higher_is_better else value < self.best
        meant = "trained" if self.settings.ema is None else "averaged"
        if better if self.settings.select_best else weights == meant:
            self.best, self.kept_epoch, self.kept_weights = value, len(self.history), weights
            self.snapshot.take()

    def _record(self, steps: int) -> RecoveryRecord:
        after = self.before
        if self.kept_epoch:
            metrics = {"trained": "metrics", "averaged": "averaged"}[self.kept_weights]
            after = self.history[self.kept_epoch - 1][metrics]
        details = {
            "epochs": self.history,
            "steps": steps,
            "kept_epoch": self.kept_epoch,
            "kept_weights": self.kept_weights,
        }
        return RecoveryRecord("fine_tuning", self.before, after, details)

    def _identity(self, total: int) -> dict[str, Any]:
        named = [*self.model.named_parameters(), *self.model.named_buffers()]
        return {
            "settings": asdict(self.settings),
            "teaching": None if self.teaching is None else self.teaching.described(),
            "objectives": [[one.name, one.weight, one.higher_is_better, one.pooled] for one in self.task.objectives],
            "steps in all": total,
            "processes": ranks.count(),
            "device": device_of(self.model).type,
            "starting weights": checkpoints.weights_hash(named),
        }

    def _save(self, trainer: Trainer, identity: dict[str, Any]) -> None:
        if self.path is None:
            return
        tensors, values = trainer.state()
        if self.companion is not None:
            values["companion"] = self.companion.state()
        # Where the weights of now are the ones to keep, they are there already.
        if (self.kept_epoch, self.kept_weights) != (len(self.history), "trained"):
            tensors |= {f"kept.{number}": value for number, value in enumerate(self.snapshot.values)}
        values |= {
            "before": self.before,
            "history": self.history,
            "kept": [self.kept_epoch, self.kept_weights, self.best],
        }
        if ranks.rank() == 0:
            checkpoints.write(self.path, identity, tensors, values)

    def _resumed(self, trainer: Trainer, identity: dict[str, Any]) -> bool:
        found = None if self.path is None else checkpoints.read(self.path, identity)
        # Processes without a common file system must not part ways.
        there = int(ranks.summed([float(found is not None)])[0])
        if there not in (0, ranks.count()):
            raise ConfigError(
                f"all {ranks.count()} processes must see the checkpoint {self.path}, found {there} that do."
            )
        if found is None:
            return False
        tensors, values = found
        trainer.restore(tensors, values)
        if self.companion is not None:
            self.companion.restore(values["companion"])
        self.before, self.history = values["before"], values["history"]
        self.kept_epoch, self.kept_weights, self.best = values["kept"]
        kept = [tensors[name] for name in (f"kept.{n}" for n in range(len(self.snapshot.values))) if name in tensors]
        if kept:
            self.snapshot.set(kept)
        else:
            self.snapshot.take()
        _log.info("going on from epoch %d of %s", len(self.history), self.path)
        return True


def steps_in_all(lead: Objective, settings: FineTuning) -> int:
    """Optimizer steps that these settings come to on an objective's training data; a stream is counted by reading it once.

    Raises:
        TaskError: The training data are empty, or processes have unequally many batches.
    """
    if settings.epochs == 0 or settings.steps == 0:
        return 0
    per_epoch = batch_count(lead.train)
    if per_epoch is None:
        per_epoch = sum(1 for _ in lead.train)
    counts = [int(one) for one in ranks.gathered(torch.tensor([per_epoch]))]
    if len(set(counts)) > 1:
        raise TaskError(
            f"all processes must have equally many training batches, found {', '.join(map(str, counts))}.",
            hint="torch.utils.data.DistributedSampler, which fills up the shares",
        )
    if per_epoch == 0:
        raise TaskError(
            f"the train data of objective {lead.name!r} must yield at least one batch, found an empty loader."
        )
    total = settings.epochs * per_epoch
    return total if settings.steps is None else min(total, settings.steps)
