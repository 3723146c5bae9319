"""The ways in which `multitask.py` chooses widths; each gives a cut model for a share of the dense predicted latency."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from multitask_problems import Problem, example
from torch import nn

import edgeprune
from edgeprune.criteria.calibration import DamageCalibration
from edgeprune.errors import BudgetInfeasibleError
from edgeprune.loop.dense import dense_latency
from edgeprune.loop.multitask.pagcp import Pagcp
from edgeprune.loop.multitask.per_task import PerTask
from edgeprune.recovery.batch_norm import reestimate_batch_norm
from edgeprune.recovery.fine_tuning import FineTuning
from edgeprune.surgery.plan import make_plan
from edgeprune.tasks.batches import call, loss_of
from edgeprune.tasks.task import Task

OURS = "exact, a curve per task, calibrated"
SCRATCH = "the widths of ours, from scratch"
_RATIOS = tuple(step / 20 for step in range(1, 20))
_FINEST = 0.004
"""How far apart global ratios are, at most, where a share is met."""


@dataclass(frozen=True)
class Setting:
    """What all ways are given.

    Attributes:
        problem: Which.
        size: Pixels of an edge.
        model: The dense network.
        task: With limits.
        predictor: Of latencies.
        folder: Where the dense engine lies, for as long as it is used.
    """

    problem: Problem
    size: int
    model: nn.Module
    task: Task
    predictor: Any
    folder: Path
    graph: Any = field(init=False)
    kernels: Any = field(init=False)

    def __post_init__(self) -> None:
        graph = edgeprune.trace(self.model, example(self.size))
        object.__setattr__(self, "graph", graph)
        object.__setattr__(self, "kernels", self._lowered(self.model, graph, self.folder))

    def _lowered(self, model: nn.Module, graph: Any, folder: Path) -> Any:
        return edgeprune.lower(graph, model=model, device=self.predictor.table.target(), workdir=folder)

    def share(self, module: nn.Module) -> float:
        """Predicted latency of another network, as a share of the dense one's."""
        with tempfile.TemporaryDirectory() as folder:
            its = self._lowered(module, edgeprune.trace(module, example(self.size)), Path(folder))
        dense, found = (dense_latency(self.predictor, one).predicted_ms for one in (self.kernels, its))
        return found / dense


@dataclass(frozen=True)
class Cut:
    """A cut model, not yet tuned.

    Attributes:
        module: It.
        share: Its predicted latency, of the dense one's.
        details: What else is worth keeping, JSON values.
        epochs: It has to be trained for so many before it is tuned.
    """

    module: nn.Module
    share: float
    details: dict[str, Any]
    epochs: int = 0


def _planned(options: dict[str, Any], only: str | None = None) -> Callable[[Setting, float], Cut]:
    """Ours with some settings; where it is told of one task alone, its limit included."""

    def cut(setting: Setting, share: float) -> Cut:
        task = setting.task if only is None else Task((setting.task.objective(only),))
        result = edgeprune.prune(
            setting.model,
            example(setting.size),
            edgeprune.Budget(latency_ratio=share),
            None,
            setting.predictor,
            task,
            graph=setting.graph,
            kernel_graph=setting.kernels,
            fine_tuning=FineTuning(epochs=0),
            **options,
        )
        first = result.recovery[0]
        details = {
            "widths": result.plan.widths(),
            "notes": list(result.notes),
            "search": dict(first.details) if first.step in ("pagcp", "per_task") else {},
        }
        return Cut(result.module, result.predicted_ms / result.dense_predicted_ms, details)

    return cut


def _torch_pruning(importance: str, round_to: int | None) -> Callable[[Setting, float], Cut]:
    """Torch-Pruning, one global ranking by all losses added up; its ratio is the mildest that keeps the share.

    It gets all training batches for its scores, as our criteria do, and batch norms estimated anew, as our plans.
    """

    def cut(setting: Setting, share: float) -> Cut:
        tried: dict[float, tuple[float, nn.Module]] = {}
        gradients = _gradients(setting) if importance == "taylor" else {}

        def at(ratio: float) -> float:
            module = _by_torch_pruning(setting, gradients, round_to, ratio)
            tried[ratio] = setting.share(module), module
            return tried[ratio][0]

        # Few channels that fill no vector may take longer than more that do, so all are tried from the mildest on.
        high = next((ratio for ratio in _RATIOS if at(ratio) <= share), None)
        if high is None:
            least = min(found for found, _ in tried.values())
            raise BudgetInfeasibleError(f"Torch-Pruning reaches {least:.1%} at most.", best_ms=least)
        low = max((ratio for ratio in tried if ratio < high), default=0.0)
        while high - low > _FINEST:
            middle = (low + high) / 2
            low, high = (low, middle) if at(middle) <= share else (middle, high)
        found, module = tried[high]
        reestimate_batch_norm(module, setting.task.objectives[0].train)
        return Cut(module, found, {"pruning_ratio": high})

    return cut


def _gradients(setting: Setting) -> dict[str, torch.Tensor]:
    """Of the losses of all tasks and training batches, added up."""
    module = copy.deepcopy(setting.model).eval()
    for inputs, targets in setting.task.objectives[0].train:
        outputs = call(module, inputs)
        losses = [one.weight * loss_of(one, outputs, targets) for one in setting.task.objectives]
        torch.stack(losses).sum().backward()
    return {name: one.grad for name, one in module.named_parameters() if one.grad is not None}


def _by_torch_pruning(
    setting: Setting, gradients: dict[str, torch.Tensor], round_to: int | None, ratio: float
) -> nn.Module:
    """A copy, cut by its Taylor scores where there are gradients, by magnitudes otherwise."""
    import torch_pruning as tp

    module = copy.deepcopy(setting.model).eval()
    chosen = tp.importance.GroupTaylorImportance() if gradients else tp.importance.GroupMagnitudeImportance(p=2)
    for name, parameter in module.named_parameters():
        parameter.grad = gradients[name].clone() if name in gradients else None
    tp.pruner.BasePruner(
        module,
        example(setting.size),
        importance=chosen,
        global_pruning=True,
        pruning_ratio=ratio,
        max_pruning_ratio=0.95,
        round_to=round_to,
        ignored_layers=[module.get_submodule(name) for name in setting.problem.outputs],
    ).step()
    module.zero_grad(set_to_none=True)
    return module.eval()


def from_scratch(setting: Setting, row: dict[str, Any], fresh: nn.Module, epochs: int) -> Cut:
    """The widths of another cell with weights that were drawn for them, to be trained as long as the dense network was."""
    dense, widths = setting.graph.widths(), row["widths"]
    kept = {name: tuple(range(width)) for name, width in widths.items() if width < dense[name]}
    module = edgeprune.apply(fresh, make_plan(setting.graph, kept))
    for _, parameter in module.named_parameters():
        if parameter.ndim > 1:
            # As torch draws them, for the inputs that are left.
            nn.init.kaiming_uniform_(parameter, a=5**0.5)
    return Cut(module, row["predicted_share"], {"widths": widths}, epochs)


def ways(tasks: Iterable[str]) -> dict[str, Callable[[Setting, float], Cut] | None]:
    """By name; None where the cut needs the cell of ours."""
    summed = {"exact, summed damage": {}, "exact, summed damage, calibrated": {"calibrate_damage": DamageCalibration()}}
    return {
        "PAGCP": _planned({"pagcp": Pagcp(rounds=1)}),
        "PAGCP, 3 rounds with 20 steps between": _planned({"pagcp": Pagcp(rounds=3, tuning_steps=20)}),
        OURS: _planned({"per_task": PerTask()}),
        "exact, a curve per task": _planned({"per_task": PerTask(calibration=None)}),
        **{name: _planned(options) for name, options in summed.items()},
        **{f"exact, damage of {name} alone": _planned({}, only=name) for name in tasks},
        "uniform": _planned({"allocator": "uniform"}),
        "Torch-Pruning, Taylor of the summed loss": _torch_pruning("taylor", None),
        "Torch-Pruning, Taylor of the summed loss, round_to=8": _torch_pruning("taylor", 8),
        "Torch-Pruning, magnitude": _torch_pruning("magnitude", None),
        SCRATCH: None,
    }
