"""What a model is for: one or more named objectives, each with data, a loss and a metric.

A *batch* is a pair ``(inputs, targets)``. The inputs are a tensor (one positional argument of the model), a tuple or list
(several), or a dict (keyword arguments); the targets are whatever the loss and the metric understand.

Several objectives are what several heads on a shared trunk have: each objective's loss and metric take their part of the
model's outputs and of the batch's targets. Objectives that are given the *same loader object* share its batches and the model's
forward on them; others have data of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from edgeprune.errors import TaskError
from edgeprune.tasks.limits import Tolerance, parse_limit

if TYPE_CHECKING:
    import torch

_METRIC_HINT = "metric=accuracy, a function that returns one number; limits, verdicts and reports are told by it"
Batches = Iterable[Any]
"""Something that can be iterated again and again and yields batches: a `torch.utils.data.DataLoader`, a list."""
Loss = Callable[[Any, Any], "torch.Tensor"]
Metric = Callable[[Any, Any], float]
Labeled = Callable[[Any], "torch.Tensor | Sequence[bool] | bool"]


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
        limit: How bad the metric of a pruned model may be: its worst acceptable value, or as text or `Tolerance` how much worse
            than the dense model's, ``"2%"`` of it or ``"2pp"`` (percentage points of a metric that is a share). None: no limit.
        weight: Weight of this objective's loss where several are added.
        pooled: False: the metric is called per batch and averaged over samples (exact for accuracy). True: it is called
            once on the concatenated outputs and targets of all batches (needed for AUC, mean IoU, correlation).
        labeled: ``labeled(targets)``: which samples of a batch have labels for this objective, one bool per sample (or one for
            all). Loss and metric are then called on those samples alone: every tensor of outputs and targets whose axis 0 is
            the batch is cut down to them. A batch without any counts as a loss of 0 in training and not at all in a metric.
            None: all samples have labels.
    """

    name: str
    train: Batches
    validation: Batches
    loss: Loss
    metric: Metric = None  # type: ignore[assignment]  # refused below, in words of a task
    higher_is_better: bool = True
    limit: float | str | Tolerance | None = None
    weight: float = 1.0
    pooled: bool = False
    labeled: Labeled | None = None

    def __post_init__(self) -> None:
        if isinstance(self.limit, str):
            object.__setattr__(self, "limit", parse_limit(self.limit))
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
                    f"found {type(getattr(self, part)).__name__}.",
                    hint=_METRIC_HINT if part == "metric" else None,
                )
        if self.labeled is not None and not callable(self.labeled):
            raise TaskError(
                f"labeled of objective {self.name!r} must be callable as labeled(targets), "
                f"found {type(self.labeled).__name__}."
            )
        if not self.weight >= 0:
            raise TaskError(f"the weight of objective {self.name!r} must be at least 0, found {self.weight}.")

    def worst(self, dense: float | None = None) -> float | None:
        """The worst acceptable value of the metric; None without a limit.

        Args:
            dense: Metric of the dense model on the same data; only a limit that refers to it needs it.

        Raises:
            TaskError: The limit refers to the dense model, whose metric is not known or nothing that it can refer to.
        """
        if not isinstance(self.limit, Tolerance):
            return None if self.limit is None else float(self.limit)
        if dense is None:
            raise TaskError(
                f"the limit of objective {self.name!r}, {self.limit}, needs the metric of the dense model, found none."
            )
        return self.limit.worst(dense, self.higher_is_better, self.name)

    def meets_limit(self, value: float, dense: float | None = None) -> bool:
        """Whether a value of the metric is acceptable; always true without a limit.

        Args:
            value: The metric.
            dense: That of the dense model, see `worst`.

        Raises:
            TaskError: As `worst`.
        """
        worst = self.worst(dense)
        return worst is None or (value >= worst if self.higher_is_better else value <= worst)


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
        limit: float | str | Tolerance | None = None,
        pooled: bool = False,
        labeled: Labeled | None = None,
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
            labeled: See `Objective`.

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
                    labeled=labeled,
                ),
            )
        )

    def with_limits(self, limits: Mapping[str, float | str | Tolerance | None]) -> Task:
        """The same task with other limits of the objectives that are named.

        Raises:
            TaskError: If there is no objective of a name.
            ConfigError: If a limit cannot be read.
        """
        for name in limits:
            self.objective(name)
        return Task(tuple(replace(one, limit=limits.get(one.name, one.limit)) for one in self.objectives))

    def require_kept_by(self, dense: Mapping[str, float]) -> None:
        """Refuse limits that the dense model itself does not keep: no pruned one could be asked to.

        Args:
            dense: Metric of the dense model by objective.

        Raises:
            TaskError: It does not keep one, or one refers to a metric that it cannot refer to.
        """
        for objective in self.objectives:
            value = dense[objective.name]
            if not objective.meets_limit(value, value):
                raise TaskError(
                    f"the limit of objective {objective.name!r} must be one that the dense model keeps, found a metric of "
                    f"{value:.4g}, which is beyond {objective.worst(value):.4g}.",
                    hint=f"--limit {objective.name}=2%, which refers to the dense model",
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
