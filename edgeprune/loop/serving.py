"""Which objectives of a task each part of a model serves: what lies behind the outputs that an objective's loss reads.

Which outputs a loss reads is what its gradient says; which operations, and with them channel groups and kernels, an output needs
is what the captured program says.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.utils import _pytree as pytree

from edgeprune.errors import TaskError
from edgeprune.latency.calibration import Totals
from edgeprune.loop.result import Serves
from edgeprune.tasks.batches import call, device_of, labeled_batches, loss_of, mode

if TYPE_CHECKING:
    from torch import nn

    from edgeprune.allocation.choices import Choice
    from edgeprune.allocation.cost import CostModel
    from edgeprune.graph.channel_graph import ChannelGraph
    from edgeprune.tasks.task import Objective, Task

_LEAST_SHARE = 0.005
"""Of the latency: what is worth a sentence."""


@dataclass(frozen=True)
class Serving:
    """Which objectives need what.

    Attributes:
        objectives: Their names, in the order of the task.
        nodes: Per program node the objectives whose losses depend on it.
        groups: The same per channel group.
        outputs: Per objective the places of the model's outputs that its loss reads.
    """

    objectives: tuple[str, ...]
    nodes: Mapping[str, frozenset[str]]
    groups: Mapping[str, frozenset[str]]
    outputs: Mapping[str, frozenset[int]]

    def told(self, cost: CostModel) -> Serves:
        """The same as plain data, for results."""

        def ordered(names: frozenset[str]) -> tuple[str, ...]:
            return tuple(name for name in self.objectives if name in names)

        return Serves(
            {name: tuple(sorted(places)) for name, places in self.outputs.items()},
            {name: ordered(names) for name, names in self.groups.items()},
            tuple((ordered(names), ms) for names, ms in self.latency_ms(cost).items()),
        )

    def latency_ms(self, cost: CostModel) -> dict[frozenset[str], float]:
        """The predicted dense latency by the set of objectives that it serves, milliseconds; they add up to all of it.

        What a network pays once, and kernels of no node (layout changes at the model's ends), serve all of them.
        """
        every = frozenset(self.objectives)
        kernels = cost.kernels({})
        calibration = cost.predictor.calibration_of(kernels)
        found = {every: float(calibration.fixed_ms)}
        for kernel, ms in zip(kernels, cost.kernels_ms(kernels), strict=True):
            known = [self.nodes[node] for node in kernel.origin if node in self.nodes]
            serves = frozenset[str]().union(*known) if known else every
            found[serves] = found.get(serves, 0.0) + calibration.part_ms(Totals.of([kernel], [ms]))
        return found

    def sentences(self, cost: CostModel) -> Iterator[str]:
        """What serves one objective alone, and what none, as sentences; nothing for a single objective that needs all."""
        latency_ms = self.latency_ms(cost)
        total_ms = sum(latency_ms.values())
        sets = [frozenset({name}) for name in self.objectives] if len(self.objectives) > 1 else []
        for serves in (*sets, frozenset[str]()):
            share = latency_ms.get(serves, 0.0) / total_ms
            count = sum(found == serves for found in self.groups.values())
            if share < _LEAST_SHARE and not count:
                continue
            whom = f"only {next(iter(serves))}" if serves else "no objective"
            yield f"{share:.0%} of the predicted latency, and {count} of {len(self.groups)} channel groups, serve {whom}."


def serving(task: Task, model: nn.Module, graph: ChannelGraph) -> Serving | None:
    """Find out which objectives need what.

    Args:
        task: The objectives; each loss is called on one batch with labels.
        model: The traced model.
        graph: Its channel groups and program.

    Returns:
        None where the model was traced in parts, or returns something else than nested tensors: that cannot be told then.

    Raises:
        TaskError: A task that cannot be used.
    """
    if graph.parts:
        return None
    names = [str(name) for name in graph.program.graph_signature.user_outputs]
    nodes = {node.name: node for node in graph.program.graph.nodes}
    serves: dict[str, set[str]] = {name: set() for name in nodes}
    outputs = {}
    for objective in task.objectives:
        read = outputs_read(objective, model, len(names))
        if read is None:
            return None
        outputs[objective.name] = read
        # Everything that the outputs are computed from.
        waiting = [nodes[names[number]] for number in read if names[number] in nodes]
        seen = set(waiting)
        while waiting:
            node = waiting.pop()
            serves[node.name].add(objective.name)
            fresh = [one for one in node.all_input_nodes if one not in seen]
            seen.update(fresh)
            waiting += fresh
    found = {name: frozenset(several) for name, several in serves.items()}
    groups = {
        group.name: frozenset[str]().union(*(found.get(node, frozenset()) for node in group.nodes))
        for group in graph.groups
    }
    return Serving(tuple(one.name for one in task.objectives), found, groups, outputs)


def served(task: Task, model: nn.Module, graph: ChannelGraph, choices: Iterable[Choice]) -> dict[str, frozenset[str]]:
    """Per decision, by its first group, the objectives that it matters to; all where that cannot be told.

    Args:
        task: The objectives.
        model: The traced model.
        graph: Its channel groups and program.
        choices: The decisions that are not frozen.

    Raises:
        TaskError: None of them matters to an objective, or the task cannot be used.
    """
    found = serving(task, model, graph)
    every = frozenset(one.name for one in task.objectives)
    serves = {
        choice.groups[0]: every
        if found is None
        else frozenset[str]().union(*(found.groups[one] for one in choice.groups))
        for choice in choices
    }
    for one in task.objectives:
        if not any(one.name in several for several in serves.values()):
            raise TaskError(
                f"the loss of objective {one.name!r} must depend on a channel group that can be pruned, found none.",
                hint="edgeprune explain MODEL, or a task without it",
            )
    return serves


def outputs_read(objective: Objective, model: nn.Module, count: int) -> frozenset[int] | None:
    """Which of a model's outputs, flat, a loss reads; None where they are not so many nested tensors.

    Raises:
        TaskError: The loss cannot be used, or there are no labels for it.
    """
    with mode(model, training=False):
        inputs, targets = next(labeled_batches(objective, "train", device_of(model), 1))
        with torch.no_grad():
            outputs = call(model, inputs)
    leaves, form = pytree.tree_flatten(outputs)
    if len(leaves) != count or not all(isinstance(leaf, torch.Tensor) for leaf in leaves):
        return None
    fresh = [leaf.detach().clone().requires_grad_(leaf.is_floating_point()) for leaf in leaves]
    with torch.enable_grad():
        # Not the leaves themselves: a loss may work in place on what it is given.
        loss = loss_of(objective, pytree.tree_unflatten([leaf.clone() for leaf in fresh], form), targets)
    places = [place for place, leaf in enumerate(fresh) if leaf.requires_grad]
    if not loss.requires_grad:
        return frozenset(range(count))
    gradients = torch.autograd.grad(loss, [fresh[place] for place in places], allow_unused=True)
    return frozenset(place for place, gradient in zip(places, gradients, strict=True) if gradient is not None)
