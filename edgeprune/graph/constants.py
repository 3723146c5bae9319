"""What removed units would still feed their consumers once nothing makes them any more: a constant, where it is one.

A channel whose weights are all zero is not zero: its bias, the shift of its batch norm and the activation behind them leave
a constant, ``act(bias)``, which the next layer reads. Cutting the channel takes that constant away; recovery may add
``weight * constant`` to the bias of the layer that read it instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.export.graph_signature import InputKind
from torch.fx import Interpreter, Node

from edgeprune.errors import PlanError
from edgeprune.graph.capture import shape_of
from edgeprune.graph.rules._base import named_arguments

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from edgeprune.graph.channel_graph import ChannelGraph, ChannelGroup
    from edgeprune.surgery.plan import PruningPlan

_READERS = ("aten.conv", "aten.linear.", "aten.addmm.")
_CLOSE = 1e-5


@dataclass(frozen=True)
class Constant:
    """What one removed unit feeds one layer.

    Attributes:
        group: Name of the unit's group.
        unit: Its number in the group.
        parameter: Weight of the layer that reads it.
        index: Where on the weight's input axis.
        value: The constant, away from borders that a padding fills with zeros.
    """

    group: str
    unit: int
    parameter: str
    index: int
    value: float


def constants(graph: ChannelGraph, plan: PruningPlan) -> tuple[Constant, ...]:
    """Constants that the removed units of a plan feed their readers, with the weights as they are now.

    The program runs twice, in eval form and on different random inputs, with the weights that make the removed units at zero.
    A reader's input channel that has one and the same value at every position of both runs is a constant; anything else is
    left out (the unit also depends on something that the plan keeps, a concat with the input say).

    Args:
        graph: Of the dense model.
        plan: Made for it.

    Raises:
        PlanError: If the plan belongs to another model.
    """
    if plan.signature != graph.signature:
        raise PlanError("a plan must belong to the traced model, found one with another signature.")
    removed = {group.name: _removed(group, plan) for group in graph.groups}
    inputs_of = {
        (member.parameter, index): (group.name, unit)
        for group in graph.groups
        for member in group.members
        if member.role == "input"
        for unit in removed[group.name]
        for index in member.indices[unit]
    }
    if not inputs_of:
        return ()
    tensors = _without_makers(graph, removed)
    runs = [_seen(graph, tensors, seed) for seed in (0, 1)]
    found = []
    for (parameter, index), (group_name, unit) in inputs_of.items():
        spans = [run[parameter][:, index] for run in runs if parameter in run and index < run[parameter].shape[1]]
        if not spans:
            continue
        low, high = min(float(span[0]) for span in spans), max(float(span[1]) for span in spans)
        if high - low <= _CLOSE * max(1.0, abs(low), abs(high)):
            found.append(Constant(group_name, unit, parameter, index, (low + high) / 2))
    return tuple(found)


def _removed(group: ChannelGroup, plan: PruningPlan) -> list[int]:
    kept = plan.groups.get(group.name)
    # Where nothing is kept the whole branch goes, and with it all that reads these units.
    return [] if kept is None or not kept["kept"] else sorted(set(range(group.size)) - set(kept["kept"]))


def _without_makers(graph: ChannelGraph, removed: Mapping[str, list[int]]) -> dict[str, torch.Tensor]:
    """All tensors of the program, those that make removed units at zero there."""
    tensors: dict[str, Any] = {**graph.program.constants, **graph.program.state_dict}
    for group in graph.groups:
        for member in group.members:
            indices = sorted({index for unit in removed[group.name] for index in member.indices[unit]})
            if member.role == "output" and indices and tensors[member.parameter].ndim > 1:
                where = torch.tensor(indices, device=tensors[member.parameter].device)
                tensors[member.parameter] = tensors[member.parameter].detach().index_fill(member.axis, where, 0.0)
    return tensors


def _seen(graph: ChannelGraph, tensors: Mapping[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """Per weight that reads channels the smallest and largest value of each input channel, shape [2, channels]."""
    generator = torch.Generator().manual_seed(seed)
    inputs = [
        torch.randn(tensor.shape, generator=generator).mul(2).add(0.5).to(tensor)
        if tensor.is_floating_point()
        else tensor.roll(seed, dims=-1)
        if tensor.ndim
        else tensor
        for tensor in graph.example_inputs
    ]
    watcher = _Watcher(graph.program)
    with torch.no_grad():
        watcher.run(*_placeholders(graph, tensors, inputs))
    return watcher.seen


def _placeholders(graph: ChannelGraph, tensors: Mapping[str, torch.Tensor], inputs: list[Any]) -> Iterator[Any]:
    values = {node.name: node.meta.get("val") for node in graph.program.graph.nodes if node.op == "placeholder"}
    # The program was captured at two samples or more where the batch is free; a size that it checks must fit.
    rest = iter(inputs)
    for spec in graph.program.graph_signature.input_specs:
        if spec.kind == InputKind.USER_INPUT and isinstance(values.get(spec.arg.name), torch.Tensor):
            value = next(rest)
            wanted = shape_of(values[spec.arg.name], max(graph.batch, 2) if graph.dynamic_batch else graph.batch)
            yield value if tuple(value.shape) == wanted else torch.cat([value] * wanted[0])[: wanted[0]]
        elif spec.target is not None:
            yield tensors[spec.target]
        else:
            yield getattr(spec.arg, "value", None)


class _Watcher(Interpreter):
    """Runs a program and looks at what its layers read."""

    def __init__(self, program: ExportedProgram) -> None:
        super().__init__(program.graph_module)
        self._target_of = {
            spec.arg.name: spec.target for spec in program.graph_signature.input_specs if spec.target is not None
        }
        self.seen: dict[str, torch.Tensor] = {}

    def run_node(self, n: Node) -> Any:
        """One operation; the span of its input channels is kept where it is a layer."""
        if n.op == "call_function" and str(n.target).startswith(_READERS):
            named = named_arguments(n)
            weight = named.get("weight", named.get("mat2"))
            source = named.get("input", named.get("mat1"))
            if isinstance(weight, Node) and isinstance(source, Node) and weight.name in self._target_of:
                self._look(self._target_of[weight.name], self.env[source], self.env[weight], str(n.target))
        return super().run_node(n)

    def _look(self, parameter: str, x: torch.Tensor, weight: torch.Tensor, op: str) -> None:
        channel = x.ndim - weight.ndim + 1 if op.startswith("aten.conv") else x.ndim - 1
        rows = x.movedim(channel, 0).flatten(1)
        span = torch.stack([rows.amin(dim=1), rows.amax(dim=1)])
        known = self.seen.get(parameter)
        # A module that is used twice reads a constant only if both uses read the same one.
        self.seen[parameter] = (
            span if known is None else torch.stack([torch.minimum(span[0], known[0]), torch.maximum(span[1], known[1])])
        )
