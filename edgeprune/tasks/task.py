"""What a model is for: one or more named objectives, each with data, a loss and a metric.

A *batch* is a pair ``(inputs, targets)``. The inputs are a tensor (one positional argument of the model), a tuple or list
(several), or a dict (keyword arguments); the targets are whatever the loss and the metric understand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from edgeprune.errors import TaskError

if TYPE_CHECKING:
    import torch

Batches = Iterable[Any]
"""Something that can be iterated again and again and yields batches: a `torch.utils.data.DataLoader`, a list."""
Loss = Callable[[Any, Any], "torch.Tensor"]
Metric = Callable[[Any, Any], float]


@dataclass(frozen=True)
class Objective:
    """One thing that the model must do well.

    Attributes:
        name: What a person calls it, e.g. ``"top-1"``; unique in its task.
        train: Batches for gradients (criteria, fine-tuning) and calibration.
        validation: Batches on which the metric is reported. Not the test split: a choice made by this metric would make
            the test figure look better than it is.
        loss: ``loss(outputs, targets)``: a scalar tensor that can be differentiated.
        metric: ``metric(outputs, targets)``: a finite number.
        higher_is_better: Direction of the metric.
        limit: Worst acceptable value of the metric, or None.
        weight: Weight of this objective's loss where several are added.
        pooled: False: the metric is called per batch and averaged over samples (exact for accuracy). True: it is called
            once on the concatenated outputs and targets of all batches (needed for AUC, mean IoU, correlation).
    """

    name: str
    train: Batches
    validation: Batches
    loss: Loss
    metric: Metric
    higher_is_better: bool = True
    limit: float | None = None
    weight: float = 1.0
    pooled: bool = False

    def __post_init__(self) -> None:
        for split in ("train", "validation"):
            loader = getattr(self, split)
            if not isinstance(loader, Iterable):
                raise TaskError(
                    f"the {split} data of objective {self.name!r} must be iterable, found {type(loader).__name__}."
                )
            if isinstance(loader, Iterator):
                raise TaskError(
                    f"the {split} data of objective {self.name!r} must be iterable more than once, "
                    f"found a one-shot {type(loader).__name__}.",
                    hint="give a DataLoader or a list of batches",
                )
        for part in ("loss", "metric"):
            if not callable(getattr(self, part)):
                raise TaskError(
                    f"the {part} of objective {self.name!r} must be callable as {part}(outputs, targets), "
                    f"found {type(getattr(self, part)).__name__}."
                )
        if not self.weight >= 0:
            raise TaskError(f"the weight of objective {self.name!r} must be at least 0, found {self.weight}.")

    def meets_limit(self, value: float) -> bool:
        """Whether a value of the metric is acceptable; always true without a limit."""
        if self.limit is None:
            return True
        return value >= self.limit if self.higher_is_better else value <= self.limit


@dataclass(frozen=True)
class Task:
    """Named objectives; one task is the case of one.

    Attributes:
        objectives: At least one, names unique.
    """

    objectives: tuple[Objective, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "objectives", tuple(self.objectives))
        if not self.objectives:
            raise TaskError("a task must have at least one objective, found none.", hint="Task.single(...)")
        names = [objective.name for objective in self.objectives]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise TaskError(f"objectives of a task must have unique names, found {', '.join(repeated)} more than once.")

    @classmethod
    def single(
        cls,
        *,
        train: Batches,
        validation: Batches,
        loss: Loss,
        metric: Metric,
        name: str | None = None,
        higher_is_better: bool = True,
        limit: float | None = None,
        pooled: bool = False,
    ) -> Task:
        """A task with one objective; see `Objective` for the arguments.

        Args:
            train: See `Objective`.
            validation: See `Objective`.
            loss: See `Objective`.
            metric: See `Objective`.
            name: What results and reports call the metric; by default the metric's own function name, or ``"metric"`` where
                it has none (a lambda).
            higher_is_better: See `Objective`.
            limit: See `Objective`.
            pooled: See `Objective`.

        Raises:
            TaskError: If a loader is not iterable more than once, or loss or metric is not callable.
        """
        return cls(
            (
                Objective(
                    name=_metric_name(metric) if name is None else name,
                    train=train,
                    validation=validation,
                    loss=loss,
                    metric=metric,
                    higher_is_better=higher_is_better,
                    limit=limit,
                    pooled=pooled,
                ),
            )
        )

    def objective(self, name: str) -> Objective:
        """The objective of that name.

        Raises:
            TaskError: If there is none.
        """
        for objective in self.objectives:
            if objective.name == name:
                return objective
        known = ", ".join(objective.name for objective in self.objectives)
        raise TaskError(f"a task must have the objective that is asked for, found no {name!r} among {known}.")


def _metric_name(metric: Metric) -> str:
    name = getattr(metric, "__name__", "")
    return name if name.isidentifier() else "metric"


Split = Literal["train", "validation"]
