"""Layer by layer, the weights of a cut model by least squares: what the dense layer computed, from the inputs that are left.

Source: Y. He et al., "Channel Pruning for Accelerating Very Deep Neural Networks", ICCV 2017, section 3.1 (the refit after the
selection) and section 3.2 (the target of a residual branch). As there, each layer reads what the layers before it, refitted
already, give; unlike there, weights are drawn towards those that they had, and batch norms stay and are moved along.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from edgeprune.criteria.readings import program_inputs
from edgeprune.errors import ConfigError, ReconstructionError
from edgeprune.graph.capture import capture, shape_of
from edgeprune.recovery.evaluation import RecoveryRecord, StepProgress, evaluate
from edgeprune.recovery.refitting import Refit
from edgeprune.recovery.side_by_side import Side, SideBySide
from edgeprune.tasks.batches import batches as unpacked
from edgeprune.tasks.batches import device_of

if TYPE_CHECKING:
    from torch import nn

    from edgeprune.graph.channel_graph import ChannelGraph
    from edgeprune.surgery.plan import PruningPlan
    from edgeprune.tasks.task import Batches, Task

MOST_BYTES = 2**30
"""Of activations and rows that are in memory at once, beside the calibration samples themselves."""
_HELD = 0.5
"""Share of that for activations that are kept; the rest is for the batch that is looked at and its rows."""
_AT_ONCE = 0.125
"""Share of it for the activations of one batch, and for the rows of one layer from one batch."""


def reconstruct(
    module: nn.Module,
    graph: ChannelGraph,
    plan: PruningPlan,
    example_inputs: Any,
    loader: Batches,
    *,
    samples: int = 512,
    ridge: float = 1e-3,
    task: Task | None = None,
    seed: int = 0,
    most_bytes: int = MOST_BYTES,
    progress: StepProgress | None = None,
) -> RecoveryRecord:
    """Refit the convolutions and linear layers of a cut model, in place, so that they compute what the dense ones did.

    Needs no labels and no gradients. Each layer ``y = W x + b`` that reads something else than in the dense model is solved
    for::

        minimize over W', b':  sum over rows of |y - W' x' - b'| ** 2  +  ridge * mean(x' ** 2) * rows * |W' - W| ** 2

    over random output positions of the calibration samples, with ``x'`` from the layers refitted before it. Without a bias the
    batch norm behind the layer takes ``b'`` over in its running mean (its variance stays, for the target is the dense output);
    without either, ``b'`` is 0. Where the output ends in a residual sum whose other addend is known by then, the target makes
    up for what that one has lost. Other batch norms get the statistics of what they see. Left as they are: grouped,
    depthwise and transposed convolutions, and weights that several operations share.

    Args:
        module: What `edgeprune.apply` made of the plan; changed only when all of it is done.
        graph: The traced dense model, whose weights are the targets'.
        plan: What was cut.
        example_inputs: As the model was traced with.
        loader: Batches of training data; targets are not used.
        samples: Most samples.
        ridge: How strongly weights are drawn towards those that they had.
        task: For the metrics before and after in the record.
        seed: Of the choice of positions.
        most_bytes: About the most memory for activations and for rows of layers, in bytes. Activations of batches for which
            there is no room are computed anew for every layer, which takes longer and comes to the same. Samples and the sums
            of a layer (``8 * columns * (columns + outputs)`` bytes) come on top.
        progress: Told the operations done.

    Returns:
        A record; its details say how many ``layers`` were refitted, and the mean of their relative errors ``before`` and
        ``after``: squared error over the variance of the target.

    Raises:
        ConfigError: There are no samples, or the ridge is negative.
        ReconstructionError: The model was traced in parts, or the cut model runs other operations than the dense one.
        TaskError: The loader is empty, or its batches do not fit the traced model.
    """
    if samples < 1 or ridge < 0:
        raise ConfigError(
            f"reconstruction needs at least 1 sample and a ridge of at least 0, found {samples} and {ridge}."
        )
    return refitted(
        "reconstruction",
        module,
        graph,
        plan,
        example_inputs,
        loader,
        samples=samples,
        ridge=ridge,
        task=task,
        seed=seed,
        most_bytes=most_bytes,
        progress=progress,
    )


def refitted(
    step: str,
    module: nn.Module,
    graph: ChannelGraph,
    plan: PruningPlan,
    example_inputs: Any,
    loader: Batches,
    *,
    samples: int,
    ridge: float,
    task: Task | None,
    seed: int,
    most_bytes: int,
    progress: StepProgress | None,
    weights: bool = True,
) -> RecoveryRecord:
    """The pass that `reconstruct` and `edgeprune.recovery.bias_compensation.compensate_biases` have in common.

    Args:
        step: Name of the record.
        module: See `reconstruct`, as the others.
        graph: The same.
        plan: The same.
        example_inputs: The same.
        loader: The same.
        samples: The same.
        ridge: The same.
        task: The same.
        seed: The same.
        most_bytes: The same.
        progress: The same.
        weights: Whether weights change too, or biases and statistics alone.

    Raises:
        ReconstructionError: As `reconstruct`.
        TaskError: The same.
    """
    captured = capture(module, example_inputs)
    if graph.parts or captured.parts:
        raise ReconstructionError(
            "a model must be traced as a whole to be reconstructed, found one traced in parts.",
            hint="fine-tuning, without reconstruction",
        )
    before = evaluate(module, task) if task is not None else {}
    dense = Side(graph.program, _tensors(graph.model))
    cut = Side(captured.program, _tensors(module))
    batches: list[list[Any]] = []
    count = 0
    # Both programs hold activations; batches that take more than their share come in pieces.
    at_once = max(1, int(_AT_ONCE * most_bytes / max(1, 2 * _live_bytes(graph))))
    for inputs, _ in unpacked(loader, "calibration data", device_of(module)):
        for leaves in program_inputs(graph, inputs):
            taken = _first(leaves, samples - count if graph.dynamic_batch else graph.batch)
            batches += _pieces(taken, at_once) if graph.dynamic_batch else [taken]
            count += _samples(taken)
            if count >= samples:
                break
        if count >= samples:
            break
    refit = Refit(
        dense, cut, plan, count, ridge=ridge, seed=seed, most_bytes=int(_AT_ONCE * most_bytes), weights=weights
    )

    def tell(done: int, total: int) -> None:
        if progress is not None:
            progress("reconstructing" if weights else "compensating biases", done, total)

    names = {branch["name"] for branch in plan.removed}
    removed = frozenset[str]().union(*(branch.nodes for branch in graph.branches if branch.name in names))
    SideBySide(dense, cut, batches, most_bytes=int(_HELD * most_bytes), removed=removed).run(refit.look, tell)
    with torch.no_grad():
        own = {
            **dict(module.named_parameters(remove_duplicate=False)),
            **dict(module.named_buffers(remove_duplicate=False)),
        }
        for name, value in refit.changed.items():
            own[name].copy_(value)
    after = evaluate(module, task) if task is not None else {}
    errors = list(refit.errors.values())
    return RecoveryRecord(
        step,
        before,
        after,
        {
            "samples": count,
            "layers": len(errors),
            "before": sum(one for one, _ in errors) / max(1, len(errors)),
            "after": sum(two for _, two in errors) / max(1, len(errors)),
        },
    )


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    found = {name: value.detach() for name, value in module.named_parameters(remove_duplicate=False)}
    return found | {name: value.clone() for name, value in module.named_buffers(remove_duplicate=False)}


def _first(leaves: list[Any], count: int) -> list[Any]:
    """The first samples of a batch."""
    return [leaf[:count] if isinstance(leaf, torch.Tensor) and leaf.ndim else leaf for leaf in leaves]


def _pieces(leaves: list[Any], size: int) -> Iterator[list[Any]]:
    """A batch in parts of at most so many samples."""
    count = _samples(leaves)
    for start in range(0, count, size):
        yield [
            leaf[start : start + size] if isinstance(leaf, torch.Tensor) and leaf.ndim and len(leaf) == count else leaf
            for leaf in leaves
        ]


def _live_bytes(graph: ChannelGraph) -> int:
    """Largest number of bytes of activations that one sample has at the same time."""
    calls = [node for node in graph.program.graph.nodes if node.op == "call_function"]
    last = {one.name: place for place, node in enumerate(calls) for one in node.all_input_nodes}
    live: dict[str, int] = {}
    most = 0
    for place, node in enumerate(calls):
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            live[node.name] = math.prod(shape_of(value, graph.batch)) * value.element_size() // graph.batch
        most = max(most, sum(live.values()))
        live = {name: size for name, size in live.items() if last.get(name, -1) > place}
    return most


def _samples(leaves: list[Any]) -> int:
    return next(int(leaf.shape[0]) for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.ndim)
