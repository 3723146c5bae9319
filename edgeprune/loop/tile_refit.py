"""Refit kept tiles, and keep that only where data that the fit did not see say that it helps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from torch import nn

from edgeprune.errors import ReconstructionError
from edgeprune.recovery.evaluation import RecoveryRecord, evaluate
from edgeprune.recovery.tile_reconstruction import reconstruct_tiles
from edgeprune.surgery.cutting import apply
from edgeprune.surgery.tiles import TileGrid
from edgeprune.tasks.batches import batches as unpacked
from edgeprune.tasks.batches import device_of
from edgeprune.tasks.task import Task

if TYPE_CHECKING:
    from edgeprune.loop.planning import Progress
    from edgeprune.surgery.plan import PruningPlan

HELD_BACK = 5
"""Of so many training batches the last one is held back."""


@dataclass(frozen=True)
class Calibration:
    """Training batches in memory, in two parts.

    Attributes:
        fitting: The task; its training data are the batches that scores and fits see.
        judging: The task; its validation data are the training batches that were held back. None where there was only one batch.
    """

    fitting: Task
    judging: Task | None


def calibration_of(model: nn.Module, task: Task, batches: int) -> Calibration:
    """Read training batches once, so that a loader that shuffles does not mix the parts.

    Args:
        model: Batches come to its device.
        task: Objectives with the same loader share its batches.
        batches: Most of each loader.

    Raises:
        TaskError: The data cannot be used.
    """
    loaders = {id(one.train): one.train for one in task.objectives}
    read = {key: list(unpacked(loader, "training data", device_of(model), batches)) for key, loader in loaders.items()}
    fitting, held = {}, {}
    for key, every in read.items():
        places = range(HELD_BACK - 1, len(every), HELD_BACK) or range(len(every) - 1, len(every))
        fitting[key] = [batch for at, batch in enumerate(every) if at not in places] or every
        held[key] = [every[at] for at in places]
    judged = all(len(every) > 1 for every in read.values())
    return Calibration(
        Task(tuple(replace(one, train=fitting[id(one.train)]) for one in task.objectives)),
        Task(tuple(replace(one, validation=held[id(one.train)]) for one in task.objectives)) if judged else None,
    )


@dataclass(frozen=True)
class Refit:
    """What least squares came to.

    Attributes:
        module: The better of the two.
        taken: Whether that is the refitted one.
        record: Validation metrics of both, which did not decide; in its details those on the batches held back, which did.
        note: The decision, one sentence.
    """

    module: nn.Module
    taken: bool
    record: RecoveryRecord
    note: str


def refitted(
    model: nn.Module,
    plan: PruningPlan,
    cut: nn.Module,
    task: Task,
    calibration: Calibration,
    before: Mapping[str, float],
    *,
    progress: Progress | None = None,
) -> Refit:
    """Refit the layers that read less by least squares (`reconstruct_tiles`); taken where no objective loses, and one gains.

    A layer's error is not the model's: that it falls does not say that the model is better for it.

    Args:
        model: The dense model.
        plan: With tiles, or without channels.
        cut: The model cut by the plan.
        task: For the validation metrics.
        calibration: With data held back.
        before: Validation metrics of `cut`.
        progress: Told the layers done.

    Raises:
        ReconstructionError: A layer cannot be refitted.
        TaskError: The task cannot be used.
    """
    tiles = _readable(model, plan)
    data = {id(one.train): one.train for one in calibration.fitting.objectives}
    every = [batch for loader in data.values() for batch in loader]
    dense, fits = reconstruct_tiles(model, tiles, every, progress=progress)
    module = apply(dense, plan)
    details: dict[str, Any] = {
        "layer_errors": {name: [fit.before, fit.after] for name, fit in fits.items()},
        "taken": False,
    }
    note = "The refitted layers were left out: there was no second batch of training data to judge them by."
    if calibration.judging is not None:
        old, new = evaluate(cut, calibration.judging), evaluate(module, calibration.judging)
        details |= {"held_back_before": old, "held_back_after": new, "taken": _better(calibration.judging, old, new)}
        figures = ", ".join(f"{name} {old[name]:.4f} to {new[name]:.4f}" for name in old)
        decided = "are taken" if details["taken"] else "were left out"
        note = f"The layers refitted by least squares {decided}: on training batches held back from the fit, {figures}."
    taken = bool(details["taken"])
    return Refit(
        module if taken else cut,
        taken,
        RecoveryRecord("tile_reconstruction", dict(before), evaluate(module, task), details),
        note,
    )


def _readable(model: nn.Module, plan: PruningPlan) -> dict[str, tuple[TileGrid, npt.NDArray[np.bool_]]]:
    """What each layer still reads: its kept tiles, without the columns of channels that are gone.

    Outputs that are gone are fitted as if they were there; nobody reads them.

    Raises:
        ReconstructionError: No linear layer reads less than before.
    """
    linear = {f"{path}.weight": layer for path, layer in model.named_modules() if type(layer) is nn.Linear}
    gone = {name for branch in plan.removed for name in branch["tensors"]}
    found = {}
    for name, layer in linear.items():
        columns = plan.kept.get(name, {}).get(1)
        if name in gone or (name not in plan.kept_tiles and columns is None):
            continue
        rows, inputs = layer.weight.shape
        tiles = plan.kept_tiles.get(name)
        grid = tiles.grid if tiles else TileGrid(name, (0, rows), (0, inputs))
        read = np.zeros(inputs, dtype=bool)
        read[list(range(inputs) if columns is None else columns)] = True
        # A block column ends where channels begin or end to be there.
        edges = np.unique([*grid.column_edges, *(np.flatnonzero(np.diff(read)) + 1).tolist()])
        block = np.searchsorted(np.array(grid.column_edges), edges[:-1], side="right") - 1
        kept = tiles.array() if tiles else np.ones(grid.shape, dtype=bool)
        found[name] = TileGrid(name, grid.row_edges, tuple(edges.tolist())), kept[:, block] & read[edges[:-1]]
    if not found:
        raise ReconstructionError("no linear layer reads less than before, so that there is nothing to refit.")
    return found


def _better(task: Task, old: Mapping[str, float], new: Mapping[str, float]) -> bool:
    gains = [(1 if one.higher_is_better else -1) * (new[one.name] - old[one.name]) for one in task.objectives]
    return min(gains) >= 0 and max(gains) > 0
