"""Biases take over what removed channels gave on average."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgeprune.errors import ConfigError
from edgeprune.recovery.reconstruction import MOST_BYTES, refitted

if TYPE_CHECKING:
    from torch import nn

    from edgeprune.graph.channel_graph import ChannelGraph
    from edgeprune.recovery.evaluation import RecoveryRecord, StepProgress
    from edgeprune.surgery.plan import PruningPlan
    from edgeprune.tasks.task import Batches, Task


def compensate_biases(
    module: nn.Module,
    graph: ChannelGraph,
    plan: PruningPlan,
    example_inputs: Any,
    loader: Batches,
    *,
    samples: int = 512,
    task: Task | None = None,
    seed: int = 0,
    most_bytes: int = MOST_BYTES,
    progress: StepProgress | None = None,
) -> RecoveryRecord:
    """Give the layers of a cut model the biases with which they have the mean outputs of the dense ones, in place.

    A removed channel that was constant leaves no trace then; one that varied leaves its variation. Layer by layer, each on what
    the ones before it, compensated already, give; weights stay. Behind a layer with a batch norm the mean is that one's affair:
    all batch norms get the statistics of what they see, as of `edgeprune.recovery.batch_norm.reestimate_batch_norm`, which this
    takes the place of. A layer without a bias and without a batch norm behind it stays as it is.

    Source: Y. Chu et al., "Group channel pruning and spatial attention distilling for object detection", Applied Intelligence
    2022, push the constant ``act(beta)`` of a channel whose batch norm scales it by 0 through the next layer; here it is the mean
    over data, which any channel has, and which knows what padding leaves of it.

    Args:
        module: What `edgeprune.apply` made of the plan; changed only when all of it is done.
        graph: The traced dense model, whose outputs are the targets.
        plan: What was cut.
        example_inputs: As the model was traced with.
        loader: Batches of training data; targets are not used.
        samples: Most samples.
        task: For the metrics before and after in the record.
        seed: Of the choice of output positions.
        most_bytes: See `edgeprune.recovery.reconstruction.reconstruct`.
        progress: Told the operations done.

    Returns:
        A record; its details say how many ``layers`` were compensated, and the mean of their relative errors ``before`` and
        ``after``: squared error over the variance of the target.

    Raises:
        ConfigError: There are no samples.
        ReconstructionError: The model was traced in parts, or the cut model runs other operations than the dense one.
        TaskError: The loader is empty, or its batches do not fit the traced model.
    """
    if samples < 1:
        raise ConfigError(f"bias compensation needs at least 1 sample, found {samples}.")
    return refitted(
        "bias_compensation",
        module,
        graph,
        plan,
        example_inputs,
        loader,
        samples=samples,
        ridge=0.0,
        task=task,
        seed=seed,
        most_bytes=most_bytes,
        progress=progress,
        weights=False,
    )
