"""Where the values of units can be seen while a model runs, and looking at them there."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch.export.graph_signature import InputKind
from torch.fx import Interpreter, Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from edgeprune.errors import InputError, ModelError, TaskError
from edgeprune.graph.capture import call_arguments
from edgeprune.graph.rules._base import named_arguments
from edgeprune.tasks.user_code import blamed

if TYPE_CHECKING:
    from torch import nn

    from edgeprune.graph.channel_graph import ChannelGraph, ChannelGroup

Positions = npt.NDArray[np.int64]
_LAYERS = ("aten.conv", "aten.linear.", "aten.addmm.")
_RECTIFIERS = ("aten.relu", "aten.hardtanh")


@dataclass(frozen=True)
class Reading:
    """One place of a program where the values of units can be seen.

    Attributes:
        node: The operation: the layer that reads them, or the one that gives them.
        source: The node whose value holds the units.
        axis: Axis of that value.
        units: Per group the positions along the axis of each of its units, shape (size, positions of a unit).
    """

    node: str
    source: str
    axis: int
    units: Mapping[str, Positions]


Look = Callable[[Reading, torch.Tensor, Mapping[str, Any]], None]
"""Called with a place, the value there, and the operation's arguments by name."""


def layer_readings(graph: ChannelGraph, groups: Sequence[ChannelGroup]) -> list[Reading]:
    """The inputs of all convolutions and linear layers that sum over units of these groups, in program order.

    A depthwise convolution hands its channels on and is none of them.
    """
    found = []
    for node in graph.program.graph.nodes:
        if node.op != "call_function" or not str(node.target).startswith(_LAYERS):
            continue
        named = named_arguments(node)
        source, weight = named.get("input", named.get("mat1")), named.get("weight", named.get("mat2"))
        if not isinstance(source, Node) or not isinstance(weight, Node) or _depthwise(node, weight, named):
            continue
        rank = source.meta["val"].ndim
        axis = rank - weight.meta["val"].ndim + 1 if str(node.target).startswith("aten.conv") else rank - 1
        units = _units(graph, source.name, axis, groups)
        if units:
            found.append(Reading(node.name, source.name, axis, units))
    return found


def value_readings(graph: ChannelGraph, groups: Sequence[ChannelGroup]) -> list[Reading]:
    """As `layer_readings`; where no layer reads a group, the outputs of those that make it."""
    found = layer_readings(graph, groups)
    read = {name for reading in found for name in reading.units}
    for group in groups:
        if group.name not in read:
            found += [place for node in group.nodes for place in _at(graph, node, [group])]
    return found


def rectifier_readings(graph: ChannelGraph, groups: Sequence[ChannelGroup]) -> list[Reading]:
    """The outputs of all ReLUs (and ReLU6) on units of these groups."""
    found = []
    for node in graph.program.graph.nodes:
        rectifies = node.op == "call_function" and str(node.target).startswith(_RECTIFIERS)
        # Other clamps do not make zeros.
        if rectifies and named_arguments(node).get("min_val", 0) == 0:
            found += _at(graph, node.name, groups)
    return found


def require(found: Sequence[Reading], groups: Sequence[ChannelGroup], criterion: str, what: str) -> None:
    """Every group must be seen somewhere.

    Args:
        found: Where units can be seen.
        groups: The groups.
        criterion: Who needs it, for the message.
        what: What is needed, for the message.

    Raises:
        ModelError: Some groups are not.
    """
    seen = {name for reading in found for name in reading.units}
    missing = [group.name for group in groups if group.name not in seen]
    if missing:
        raise ModelError(
            f"the {criterion} criterion needs {what} in every group, found none in {', '.join(missing)}.",
            hint="the criterion l2 or taylor, or keep these groups with constraints",
        )


def _depthwise(node: Node, weight: Node, named: Mapping[str, Any]) -> bool:
    conv_groups, shape = named.get("groups", 1), weight.meta["val"].shape
    reads = shape[0] == conv_groups if "transpose" in str(node.target) else shape[1] == 1
    return bool(conv_groups > 1 and reads)


def _at(graph: ChannelGraph, node: str, groups: Sequence[ChannelGroup]) -> list[Reading]:
    """The value of a node, where it holds units."""
    places = []
    for axis in range(len(graph.unit_of.get(node, ()))):
        units = _units(graph, node, axis, groups)
        if units:
            places.append(Reading(node, node, axis, units))
    return places


def _units(graph: ChannelGraph, node: str, axis: int, groups: Sequence[ChannelGroup]) -> dict[str, Positions]:
    axes = graph.unit_of.get(node, ())
    if axis >= len(axes):
        return {}
    codes = axes[axis]
    found = {}
    for group in groups:
        offset = graph.offset_of[group.name]
        factor, position = np.nonzero((codes >= offset) & (codes < offset + group.size))
        if len(position):
            # Every unit occurs equally often along an axis.
            order = np.lexsort((position, codes[factor, position]))
            found[group.name] = position[order].reshape(group.size, -1)
    return found


def watch(
    graph: ChannelGraph, model: nn.Module, batches: Iterable[tuple[Any, Any]], readings: Sequence[Reading], look: Look
) -> int:
    """Run the captured program, in eval form, on a model's weights and batches, and look at what passes.

    The model itself does not run: nothing of it is changed or hooked. One batch is in memory at a time.

    Args:
        graph: Whose program runs.
        model: Whose weights are taken.
        batches: Inputs and targets; the latter are not used.
        readings: Where to look.
        look: Called at each of them, batch by batch.

    Returns:
        Number of batches.

    Raises:
        TaskError: The batches do not fit the program.
        ModelError: The model could only be traced in parts.
    """
    if graph.parts:
        raise ModelError(
            "a model must be traced as a whole for its activations to be seen, found one traced in parts.",
            hint="the criterion l2 or taylor",
        )
    # Copies of buffers: a forward may write to them.
    tensors: dict[str, Any] = {**graph.program.constants}
    tensors |= {name: value.detach() for name, value in model.named_parameters(remove_duplicate=False)}
    tensors |= {name: value.clone() for name, value in model.named_buffers(remove_duplicate=False)}
    watcher = _Watcher(graph, readings, look)
    count = 0
    with torch.no_grad():
        for inputs, _ in batches:
            count += 1
            for leaves in program_inputs(graph, inputs):
                rest = iter(leaves)
                values = [
                    next(rest) if spec.kind == InputKind.USER_INPUT else tensors[str(spec.target)]
                    for spec in graph.program.graph_signature.input_specs
                ]
                with blamed("the traced model on a batch of the task"):
                    watcher.run(*values)
    return count


def program_inputs(graph: ChannelGraph, inputs: Any) -> Iterator[list[Any]]:
    """A batch as flat inputs of the program; in pieces where that is captured for one batch size.

    Raises:
        TaskError: The batch does not fit the program.
    """
    leaves = _flat(graph, inputs)
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    expected = [tuple(example.shape) for example in graph.example_inputs]
    found = [tuple(tensor.shape) for tensor in tensors]
    if found == expected:
        yield leaves
        return
    counts = {shape[0] for shape in found if shape}
    # Without a common first axis there is no batch to vary.
    if [shape[1:] for shape in found] != [shape[1:] for shape in expected] or len(counts) != 1:
        raise TaskError(
            f"batches must have the shapes of the example inputs but for the batch, {expected}, found {found}.",
            hint="trace with example inputs of the task's shape, or use the criterion taylor",
        )
    (count,) = counts
    if graph.dynamic_batch:
        yield leaves
        return
    if count < graph.batch:
        raise TaskError(
            f"batches must hold at least the {graph.batch} samples that the model was traced for, found {count}.",
            hint="a larger batch size in the task's loader",
        )
    for start in range(0, count - graph.batch + 1, graph.batch):
        stop = start + graph.batch
        yield [leaf[start:stop] if isinstance(leaf, torch.Tensor) and leaf.ndim else leaf for leaf in leaves]


def _flat(graph: ChannelGraph, inputs: Any) -> list[Any]:
    spec = graph.program.call_spec.in_spec
    _, named = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    try:
        args, kwargs = call_arguments(inputs)
    except InputError as error:
        raise TaskError(f"the inputs of a batch cannot be used: {error.message}") from error
    if set(kwargs) == set(named):
        kwargs = {name: kwargs[name] for name in named}
    else:
        args, kwargs = _as_traced(graph, args, kwargs)
    leaves, found = pytree.tree_flatten((args, kwargs))
    if found != spec:
        raise TaskError(
            "the inputs of a batch must be nested like the example inputs, found another form.",
            hint="the same tensor, tuple or dict in both places",
        )
    return leaves


def _as_traced(
    graph: ChannelGraph, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments by position and by name as the model was traced with them; as they came where those are others."""
    spec = graph.program.call_spec.in_spec
    positional, named = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    try:
        signature = inspect.signature(graph.model.forward)
        given = signature.bind(*args, **kwargs).arguments
    except (TypeError, ValueError):
        return args, kwargs
    plain = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    first = list(signature.parameters)[: len(positional)]
    if any(signature.parameters[name].kind not in plain for name in given) or set(given) != {*first, *named}:
        return args, kwargs
    return tuple(given[name] for name in first), {name: given[name] for name in named}


class _Watcher(Interpreter):
    """Runs a program and looks at some of its values."""

    def __init__(self, graph: ChannelGraph, readings: Sequence[Reading], look: Look) -> None:
        super().__init__(graph.program.graph_module)
        self._look = look
        self._readings: dict[str, list[Reading]] = {}
        for reading in readings:
            self._readings.setdefault(reading.node, []).append(reading)

    def run_node(self, n: Node) -> Any:
        """One operation; what it reads is looked at before, what it gives after it."""
        here = self._readings.get(n.name, [])
        for reading in here:
            if reading.source != n.name:
                named = map_arg(named_arguments(n), lambda node: self.env[node])
                self._look(
                    reading, next(self.env[node] for node in n.all_input_nodes if node.name == reading.source), named
                )
        result = super().run_node(n)
        for reading in here:
            if reading.source == n.name:
                self._look(reading, result, {})
        return result
