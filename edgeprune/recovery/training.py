"""Optimizer, schedule and data of one fine-tuning: steps, epochs, and the state between them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from edgeprune.errors import TaskError
from edgeprune.recovery.averaging import WeightAverage
from edgeprune.recovery.evaluation import StepProgress
from edgeprune.recovery.generators import Generators
from edgeprune.recovery.precision import MixedPrecision
from edgeprune.recovery.teaching import Teaching
from edgeprune.tasks import ranks
from edgeprune.tasks.batches import call, device_of, loss_of, objective_batches, sharing
from edgeprune.tasks.task import Objective, Task

if TYPE_CHECKING:
    from edgeprune.recovery.fine_tuning import FineTuning


class Trainer:
    """Trains a model that is in train form.

    Attributes:
        done: Steps done.
        average: The moving average of the weights, or None.
        generators: What its data and dropout draw from.

    Raises:
        TaskError: No parameter requires gradients.
        ConfigError: The device does not train in the precision.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        settings: FineTuning,
        total: int,
        teaching: Teaching | None,
        progress: StepProgress | None,
        watch: Callable[[int, int], None] | None = None,
    ) -> None:
        self.done = 0
        self._watch = watch
        self._model, self._task, self._settings, self._total = model, task, settings, total
        self._teaching, self._progress, self._device = teaching, progress, device_of(model)
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not self._parameters:
            raise TaskError(
                "fine-tuning needs parameters that require gradients, found none.", hint="requires_grad_(True)"
            )
        self._precision = MixedPrecision(settings.precision, self._device)
        self._optimizer = _optimizer(self._parameters, settings)
        self.average = None if settings.ema is None else WeightAverage(self._parameters, settings.ema)
        self.generators = Generators.of(task, self._device)
        self._sharing = sharing(task.objectives, "train")
        self._others = [_Endless(several[0], self._device, self.generators) for several in self._sharing[1:]]

    def epoch(self, number: int) -> float:
        """One pass over the lead objective's data, or what is left of the steps.

        Args:
            number: From 0; samplers that want to know it (``set_epoch``) are told.

        Returns:
            The mean loss.
        """
        losses = []
        _tell_samplers(self._task.objectives[0].train, number)
        for lead in objective_batches(self._task.objectives[0], "train", self._device):
            if self.done == 0:
                self._require_shares(lead[0])
            losses.append(self._step([lead, *(next(other) for other in self._others)]))
            self.done += 1
            if self.average is not None:
                self.average.update(self.done)
            if self._progress is not None:
                self._progress("fine-tuning", self.done, self._total)
            if self.done >= self._total:
                break
        total, count = ranks.summed([sum(losses), len(losses)])
        return total / count

    def _step(self, batches: list[tuple[Any, Any]]) -> float:
        # A function of the step alone, so there is no state to keep.
        fall = 0.5 * (1 + math.cos(math.pi * self.done / self._total)) if self._settings.schedule == "cosine" else 1.0
        for group in self._optimizer.param_groups:
            group["lr"] = self._settings.lr * fall
        self._optimizer.zero_grad(set_to_none=True)
        value = 0.0
        share = self._settings.distillation_weight if self._teaching is not None else 0.0
        for objectives, (inputs, targets) in zip(self._sharing, batches, strict=True):
            if self._teaching is not None:
                self._teaching.begin()
            with self._precision.forward():
                outputs = call(self._model, inputs)
            outputs = self._precision.outputs(outputs)
            taught = None
            if self._teaching is not None:
                with self._precision.forward():
                    wanted = self._teaching.wanted(inputs)
                taught = share * self._teaching.loss(outputs, self._precision.outputs(wanted))
            losses = []
            for objective in objectives:
                loss = (1 - share) * loss_of(objective, outputs, targets)
                losses.append(objective.weight * (loss if taught is None else loss + taught))
            together = losses[0] if len(losses) == 1 else torch.stack(losses).sum()
            self._precision.backward(together)
            value += float(together.detach())
        ranks.average_gradients(self._parameters)
        if self._watch is not None:
            self._watch(self.done + 1, self._total)
        self._precision.step(self._optimizer, self._parameters, self._settings.max_gradient_norm)
        return value

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Everything that the next epoch depends on: tensors, and JSON values."""
        tensors = dict(self._named())
        for number, slots in self._optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{slot}": value for slot, value in slots.items() if value is not None}
        if self.average is not None:
            tensors |= {f"average.{number}": value for number, value in enumerate(self.average.values)}
        own = {"generators": self.generators.states(), "others": [other.state() for other in self._others]}
        values = {
            "done": self.done,
            "scaler": self._precision.state(),
            # Each process draws and reads on its own.
            "of processes": [
                json.loads(bytes(one.tolist()))
                for one in ranks.gathered(torch.tensor(list(json.dumps(own).encode()), dtype=torch.uint8))
            ],
        }
        return tensors, values

    def restore(self, tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        with torch.no_grad():
            for name, tensor in self._named():
                tensor.copy_(tensors[name])
        state: dict[int, dict[str, torch.Tensor]] = {}
        for name, value in tensors.items():
            kind, _, rest = name.partition(".")
            if kind == "optimizer":
                number, _, slot = rest.partition(".")
                state.setdefault(int(number), {})[slot] = value
        self._optimizer.load_state_dict({**self._optimizer.state_dict(), "state": state})
        if self.average is not None:
            self.average.restore([tensors[f"average.{number}"] for number in range(len(self.average.values))])
        self._precision.restore(values["scaler"])
        self.done = values["done"]
        own = values["of processes"][ranks.rank()]
        for other, begun in zip(self._others, own["others"], strict=True):
            other.restore(begun)
        # Last: what was read on the way has drawn from them.
        self.generators.restore(own["generators"])

    def _named(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in (*self._model.named_parameters(), *self._model.named_buffers()):
            yield f"model.{name}", tensor

    def _require_shares(self, inputs: Any) -> None:
        """Processes that all read the same would only repeat each other's work."""
        if ranks.count() == 1:
            return
        leaves = [leaf.double() for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, torch.Tensor)]
        mark = torch.stack([torch.stack([leaf.sum(), leaf.square().sum()]) for leaf in leaves]).flatten()[None]
        first, *others = ranks.gathered(mark)
        if all(first.shape == other.shape and torch.equal(first, other) for other in others):
            raise TaskError(
                f"each of the {ranks.count()} processes must read its own share of the training data, found the same first "
                "batch in all.",
                hint="DataLoader(..., sampler=torch.utils.data.DistributedSampler(dataset))",
            )
        if ranks.rank():
            torch.manual_seed(self._settings.seed + ranks.rank())  # other dropout for other data


def _optimizer(parameters: list[nn.Parameter], settings: FineTuning) -> torch.optim.Optimizer:
    # Vectors are biases and normalization parameters; shrinking those changes what a layer computes, not how complex it is.
    decayed = [parameter for parameter in parameters if parameter.ndim > 1]
    plain = [parameter for parameter in parameters if parameter.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum, nesterov=settings.momentum > 0)
    return torch.optim.AdamW(groups, lr=settings.lr)


def _tell_samplers(loader: Any, epoch: int) -> None:
    batches = getattr(loader, "batch_sampler", None)
    for sampler in (getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None)):
        if callable(tell := getattr(sampler, "set_epoch", None)):
            tell(epoch)


class _Endless:
    """Batches of an objective, over and over, across the epochs of the one that leads."""

    def __init__(self, objective: Objective, device: torch.device, generators: Generators) -> None:
        self._objective, self._device, self._generators = objective, device, generators
        self._passes = self._read = 0
        self._begun: dict[str, Any] | None = None
        self._batches: Iterator[tuple[Any, Any]] = iter(())

    def __next__(self) -> tuple[Any, Any]:
        batch = next(self._batches, None)
        if batch is None:
            self._begin()
            batch = next(self._batches)
        self._read += 1
        return batch

    def _begin(self) -> None:
        _tell_samplers(self._objective.train, self._passes)
        self._begun, self._read = self._generators.states(), 0
        self._passes += 1
        self._batches = objective_batches(self._objective, "train", self._device)

    def state(self) -> dict[str, Any]:
        """What the generators were when this pass began, and how far it is."""
        return {"begun": self._begun, "read": self._read, "passes": self._passes}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Begin the same pass again and read up to the same batch."""
        if state["begun"] is None:
            return
        self._passes = state["passes"] - 1
        self._generators.restore(state["begun"])
        self._begin()
        for _ in range(state["read"]):
            next(self)
