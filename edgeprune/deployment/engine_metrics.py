"""What a task says of an engine: its data as inputs of an engine, and its metrics of the engine beside those of the module."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

from edgeprune.backends._base import Session
from edgeprune.errors import InputError, ParityError
from edgeprune.recovery.evaluation import evaluate
from edgeprune.surgery.program_module import ProgramModule
from edgeprune.tasks.batches import objective_batches
from edgeprune.tasks.limits import Tolerance
from edgeprune.tasks.task import Task

QUANTIZATION_LOSS = Tolerance(0.01)
"""How much worse than the module's a metric of an int8 engine may be, where nothing else is said: 1 % of it."""


@dataclass(frozen=True)
class EngineMetric:
    """A metric of a task's objective on its validation data.

    Attributes:
        module: Of the module, in float32.
        engine: Of the engine, on this host.
        worst: The worst value that was acceptable.
    """

    module: float
    engine: float
    worst: float


def samples_of(task: Task, module: nn.Module, count: int) -> tuple[np.ndarray[Any, Any], ...]:
    """The first `count` samples of a task's training data, an array per positional input of the module.

    Raises:
        InputError: The batches' inputs are not what the module takes.
        TaskError: The data are empty or no batches.
    """
    columns: list[list[np.ndarray[Any, Any]]] = []
    found = 0
    for inputs, _ in objective_batches(task.objectives[0], "train", torch.device("cpu")):
        arrays = [tensor.detach().numpy() for tensor in _positional(module, inputs)]
        columns = columns or [[] for _ in arrays]
        for column, array in zip(columns, arrays, strict=True):
            column.append(array)
        found += len(arrays[0])
        if found >= count:
            break
    return tuple(np.concatenate(column)[:count] for column in columns)


def engine_metrics(
    module: nn.Module,
    example: Sequence[torch.Tensor],
    session: Session,
    task: Task,
    loss: Tolerance | None = None,
    name: str = "engine",
) -> dict[str, EngineMetric]:
    """The metrics of an engine on a task's validation data, beside those of the module that it was made from.

    Args:
        module: The module, in float32 on the CPU.
        example: Positional inputs at the engine's batch; batches of the task are cut into such, the last is filled up.
        session: Runs the engine.
        task: Whose validation data and metrics.
        loss: How much worse than the module's a metric may be; `QUANTIZATION_LOSS` by default.
        name: What errors call the engine.

    Raises:
        ParityError: A metric is worse than that.
        TaskError: As `edgeprune.recovery.evaluation.evaluate`.
    """
    loss = loss or QUANTIZATION_LOSS
    exact = evaluate(module, task)
    found = evaluate(_EngineModule(module, example, session), task)
    metrics = {}
    for objective in task.objectives:
        value, engine = exact[objective.name], found[objective.name]
        worst = loss.worst(value, objective.higher_is_better, objective.name)
        if engine < worst if objective.higher_is_better else engine > worst:
            raise ParityError(
                f"{objective.name} of the {name} must be no more than {loss} worse than the module's {value:.4g}, found "
                f"{engine:.4g}.",
                hint="--snr 30 (or more) keeps more layers in float; --metric-loss allows more",
            )
        metrics[objective.name] = EngineMetric(value, engine, worst)
    return metrics


def _positional(module: nn.Module, inputs: Any) -> list[torch.Tensor]:
    """A batch's inputs in the order of ``forward``."""
    values: Sequence[Any]
    if isinstance(inputs, Mapping) and isinstance(module, ProgramModule):
        values = module.in_order(inputs)
    elif isinstance(inputs, Mapping):
        values = inspect.signature(module.forward).bind(**inputs).args
    else:
        values = inputs if isinstance(inputs, tuple | list) else (inputs,)
    for value in values:
        if not isinstance(value, torch.Tensor) or value.ndim == 0:
            raise InputError(f"a task's inputs must be batches of tensors, found {type(value).__name__}.")
    return list(values)


class _EngineModule(nn.Module):
    """An engine with the module's signature: batches of any size in, the module's structure of outputs out."""

    def __init__(self, module: nn.Module, example: Sequence[torch.Tensor], session: Session) -> None:
        super().__init__()
        # Not registered: what is evaluated has no parameters.
        self._of = (module,)
        self._session = session
        self._types = [tensor.detach().cpu().numpy().dtype for tensor in example]
        self._batch = int(example[0].shape[0])
        with torch.no_grad():
            leaves, self._structure = pytree.tree_flatten(module.eval()(*example))
        self._leaves = leaves

    def forward(self, *inputs: Any, **named: Any) -> Any:
        arrays = [
            array.detach().cpu().numpy().astype(dtype)
            for array, dtype in zip(_positional(self._of[0], named or inputs), self._types, strict=True)
        ]
        count = len(arrays[0])
        parts = []
        for start in range(0, count, self._batch):
            taken = [array[start : start + self._batch] for array in arrays]
            missing = self._batch - len(taken[0])
            full = [np.concatenate([array, np.repeat(array[-1:], missing, axis=0)]) for array in taken]
            parts.append(self._session(full))
        outputs = iter(torch.from_numpy(np.concatenate(column)[:count]) for column in zip(*parts, strict=True))
        # What is no tensor (None, a flag) is as in the module; the engine's outputs are its tensors in order.
        leaves = [next(outputs) if isinstance(leaf, torch.Tensor) else leaf for leaf in self._leaves]
        return pytree.tree_unflatten(leaves, self._structure)
