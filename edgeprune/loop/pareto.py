"""`pareto`: what latency costs in damage, over the whole range that pruning can reach."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.errors import ConfigError
from edgeprune.loop.lowering import lowered, require_runtime
from edgeprune.loop.planning import ALLOCATOR, Planner, Progress, Proposal

if TYPE_CHECKING:
    from torch import nn

    from edgeprune.allocation._base import Allocator
    from edgeprune.criteria._base import Criterion
    from edgeprune.criteria.calibration import DamageCalibration
    from edgeprune.graph.channel_graph import ChannelGraph
    from edgeprune.latency.predictor import Predictor
    from edgeprune.lowering.kernel_graph import KernelGraph
    from edgeprune.spec import Constraints
    from edgeprune.tasks.task import Task


def pareto(
    model: nn.Module,
    example_inputs: Any,
    predictor: Predictor,
    task: Task | None = None,
    constraints: Constraints | None = None,
    *,
    points: int = 20,
    criterion: str | Criterion | None = None,
    allocator: str | Allocator = ALLOCATOR,
    calibrate_damage: DamageCalibration | None = None,
    blocks: bool = False,
    backend: str = "onnxruntime",
    graph: ChannelGraph | None = None,
    kernel_graph: KernelGraph | None = None,
    progress: Progress | None = None,
) -> tuple[Proposal, ...]:
    """Plans along the Pareto front of damage and predicted latency, from the fastest to the dense one.

    Nothing is cut, tuned or measured: a plan's `Proposal.plan` goes to `edgeprune.apply`. Latencies are predicted ones, before
    any board has corrected them. Damage is in ``proposal.allocation.certificate.damage``.

    Args:
        model: The dense model.
        example_inputs: Tensor, tuple or dict; fixes the deployment batch.
        predictor: Fitted on a table of the board.
        task: Data and loss for criteria that need them; without it scores are data-free.
        constraints: What widths must respect.
        points: Number of latencies, evenly from the smallest that was found to the dense one; a plan that is the best at
            several of them is there once.
        criterion: Importance of channels; ``"taylor"`` with a task and ``"l2"`` without one when None.
        allocator: How widths are chosen.
        calibrate_damage: How damage is put on the scale of measured losses; needs a task.
        blocks: Whether whole residual branches may go too; needs a task.
        backend: Runtime of the engines, where there is no `kernel_graph`.
        graph: The traced model, where the caller has it.
        kernel_graph: The lowered model, where the caller has it.
        progress: Called with (step, done, in all).

    Raises:
        ConfigError: There are fewer than two points, or whole branches may go and there is no task.
        TableMismatchError: The predictor is of another runtime than the backend.
        EmptyPlanError: The model has nothing that can be pruned.
        ConstraintError: A constraint matches nothing.
        TaskError: The task cannot be used.
    """
    if points < 2:
        raise ConfigError(f"a front must have at least 2 points, found {points}.")
    with tempfile.TemporaryDirectory(prefix="edgeprune-lower-") as folder:
        if kernel_graph is None:
            kernel_graph = lowered(
                model, example_inputs, backend, predictor, graph=graph, folder=Path(folder), progress=progress
            )
        require_runtime(predictor, kernel_graph)
        planner = Planner(
            model,
            kernel_graph,
            predictor,
            task=task,
            constraints=constraints,
            criterion=criterion,
            allocator=allocator,
            calibrate_damage=calibrate_damage,
            blocks=blocks,
            progress=progress,
        )
        return planner.front(points)
