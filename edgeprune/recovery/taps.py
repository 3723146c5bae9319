"""Where features of the cut model are compared with those of the dense one, and which channels of it are the same.

A tap is a value of the traced program. The plan says which of its channels were kept, so no adapter has to be learned.
"""

from __future__ import annotations

import copy
import difflib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.fx import Node
from torch.utils import _pytree as pytree

from edgeprune.errors import ConfigError, ModelError
from edgeprune.graph.capture import eval_copy, shape_of
from edgeprune.graph.editing import masks_of
from edgeprune.parts import core_of
from edgeprune.recovery.side_by_side import Side
from edgeprune.recovery.watching import Place, Tap, everything
from edgeprune.surgery.plan import make_plan
from edgeprune.surgery.program_module import FORWARD_ERRORS, ProgramModule

if TYPE_CHECKING:
    from torch import nn

    from edgeprune.graph.channel_graph import ChannelGraph
    from edgeprune.surgery.plan import PruningPlan

_SUMS = ("aten.add.Tensor", "aten.add_.Tensor")
_ACTIVATIONS = (
    "aten.relu", "aten.gelu", "aten.silu", "aten.hardtanh", "aten.hardswish", "aten.leaky_relu", "aten.elu",
    "aten.mish", "aten.sigmoid", "aten.tanh", "aten.prelu", "aten.celu", "aten.selu", "aten.clamp",
)  # fmt: skip
_LAYERS = ("aten.conv", "aten.linear.", "aten.addmm.", "aten.batch_norm.")
_SPREAD = 4
"""Taps of a network that has only one resolution."""


def find_taps(graph: ChannelGraph, plan: PruningPlan, module: nn.Module, names: Sequence[str] = ()) -> tuple[Tap, ...]:
    """Where to compare a cut model with the dense one.

    By default the end of each stage: the last residual sum at each resolution, with the activation behind it; with one
    resolution alone (a transformer) four such sums, evenly spread; without residual sums the last activation, or the last layer's
    value, at each resolution. A value of one position (behind global pooling) has no spatial features and is none.

    To find the places the dense model is run once, on noise and with weights a little off, so that no two values are equal by
    chance.

    Args:
        graph: The traced dense model.
        plan: What was cut.
        module: What `edgeprune.apply` made of the plan.
        names: Instead of the default: modules, whose output is meant, or nodes of the program.

    Raises:
        ConfigError: A name is unknown, or its value is nothing that can be compared.
        ModelError: The model has no place to compare at, or does not run on tensors alone.
    """
    return _found(graph, plan, module.operations if isinstance(module, ProgramModule) else None, names)


def require_places(graph: ChannelGraph, names: Sequence[str] = ()) -> None:
    """Refuse taps at which features cannot be compared whatever the plan, before the long steps; as `find_taps`.

    A plan may still take such a place away, with the branch that it lies in.

    Args:
        graph: The traced dense model, which is run once.
        names: See `find_taps`.

    Raises:
        ConfigError: As `find_taps`.
        ModelError: The same.
    """
    _found(graph, make_plan(graph, {}, allow_empty=True), None, names)


def _found(
    graph: ChannelGraph, plan: PruningPlan, operations: Iterable[str] | None, names: Sequence[str]
) -> tuple[Tap, ...]:
    finder = _Finder(graph, plan, operations)
    if names:
        return tuple(finder.named(name) for name in names)
    taps = finder.default()
    if not taps:
        raise ModelError(
            "distilling features needs values with channels and positions that both models compute, found none.",
            hint="--distill logits, or --tap MODULE",
        )
    return taps


def require_known(graph: ChannelGraph, names: Sequence[str]) -> None:
    """Refuse names of taps that a model does not have, before the long steps.

    Raises:
        ConfigError: The model runs no module of that name.
    """
    for name in names:
        _nodes(graph, name)


def _nodes(graph: ChannelGraph, name: str) -> list[Node]:
    """The operations of a module, or the one of that name."""
    calls = [node for node in graph.program.graph.nodes if node.op == "call_function"]
    inside = [node for node in calls if node.name == name or name in _paths(node)]
    if not inside:
        known = dict.fromkeys(path for node in calls for path in _paths(node) if path)
        near = difflib.get_close_matches(name, known, n=4, cutoff=0.3) or list(known)[:4]
        raise ConfigError(f"a tap must be a module that the model runs, found {name!r}.", hint=", ".join(near))
    return inside


class _Finder:
    """Places in a model.

    Args:
        graph: The traced dense model.
        plan: What was cut.
        operations: Those of the cut program; None where the model is of its own class, which has all but the removed ones.
    """

    def __init__(self, graph: ChannelGraph, plan: PruningPlan, operations: Iterable[str] | None) -> None:
        self.graph = graph
        self.calls = [node for node in graph.program.graph.nodes if node.op == "call_function"]
        self.order = {node.name: place for place, node in enumerate(self.calls)}
        removed = {branch["name"] for branch in plan.removed}
        inside = frozenset[str]().union(*(branch.nodes for branch in graph.branches if branch.name in removed))
        there = set(self.order) if operations is None else set(operations)
        self.there = there - inside
        units = {
            name: np.isin(np.arange(group["size"]), group["kept"])
            for name, group in plan.groups.items()
            if group["kept"]  # a removed branch's channels are those of nothing that is left
        }
        self.kept = masks_of(graph, units)
        self._events: list[tuple[Place, torch.Tensor]] = []
        self._values: dict[str, torch.Tensor] = {}

    def default(self) -> tuple[Tap, ...]:
        usable = [node for node in self.calls if self._axis(node) is not None]
        by_input = _depends_on_inputs(self.graph)
        sums = [node for node in usable if _is_sum(node, by_input)]
        ends = sums or [node for node in usable if str(node.target).startswith(_ACTIVATIONS)]
        ends = ends or [node for node in usable if str(node.target).startswith(_LAYERS)]
        ends = list(dict.fromkeys(map(_settled, ends)))
        ends = [node for node in ends if self._axis(node) is not None and node.name in self.there]
        stages: dict[tuple[int, ...], list[Node]] = {}
        for node in ends:
            stages.setdefault(self._positions(node), []).append(node)
        self._run([node.name for node in ends])
        if len(stages) == 1:
            (only,) = stages.values()
            count = min(_SPREAD, len(only))
            chunks = [only[len(only) * at // count : len(only) * (at + 1) // count] for at in range(count)]
        else:
            chunks = list(stages.values())
        taps = (next((tap for node in reversed(chunk) if (tap := self._tap(node))), None) for chunk in chunks)
        return tuple(sorted((tap for tap in taps if tap is not None), key=lambda tap: self.order[tap.name]))

    def named(self, name: str) -> Tap:
        node = _settled(_nodes(self.graph, name)[-1], over_activations=False)
        if self._axis(node) is None or node.name not in self.there:
            raise ConfigError(
                f"a tap must give values with one axis of channels and more than one position, in the cut model too; "
                f"those of {name!r} do not.",
                hint="without --tap, the ends of stages",
            )
        self._run([node.name])
        tap = self._tap(node)
        if tap is None:
            raise ConfigError(
                f"the value of a tap must be what a module gets or returns, that of {name!r} is neither.",
                hint="the module around it, or without --tap the ends of stages",
            )
        return tap

    def _axis(self, node: Node) -> int | None:
        """The axis of a value's channels, where it has one and several positions."""
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.ndim < 3:
            return None
        shape = shape_of(value, self.graph.batch)
        axes = self.graph.unit_of.get(node.name, ())
        labelled = [axis for axis, codes in enumerate(axes) if (codes >= 0).any()]
        if labelled and labelled != [0]:
            axis = labelled[0] if len(labelled) == 1 else None
        else:
            axis = 1 if value.ndim > 3 else value.ndim - 1
        if axis is None or math.prod(shape) <= shape[0] * shape[axis]:
            return None
        return axis

    def _positions(self, node: Node) -> tuple[int, ...]:
        shape = shape_of(node.meta["val"], self.graph.batch)
        return tuple(size for axis, size in enumerate(shape) if axis not in (0, self._axis(node)))

    def _tap(self, node: Node) -> Tap | None:
        """The tap at a node, where its value passes by."""
        value, axis = self._values[node.name], self._axis(node)
        assert axis is not None
        for place, seen in self._events:
            if seen.shape == value.shape and torch.allclose(
                seen, value, rtol=1e-3, atol=1e-5 * float(value.abs().max())
            ):
                mask = self.kept.masks(node.name, axis) if node.name in self.graph.unit_of else np.ones(1, bool)
                kept = None if mask.all() else tuple(np.flatnonzero(mask).tolist())
                return Tap(node.name, axis, kept, place)
        return None

    def _run(self, names: Sequence[str]) -> None:
        """Values of these nodes, and everything that passes by in the model itself on the same inputs."""
        graph = self.graph
        spec = graph.program.call_spec.in_spec
        if spec is None or spec.num_leaves != len(graph.example_inputs):
            raise ModelError(
                "distilling features needs a forward that takes only tensors, found other arguments too.",
                hint="--distill logits",
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            twin = _slightly_off(graph.model)
            inputs = [_noise(tensor) for tensor in graph.example_inputs]
        args, kwargs = pytree.tree_unflatten(inputs, spec)
        try:
            # With gradients on, as in training: torch has shortcuts without them that skip modules.
            with torch.enable_grad(), everything(twin) as events:
                core_of(twin, graph.parts)(*_copies(args), **_copies(kwargs))
            tensors = {
                **dict(twin.named_parameters(remove_duplicate=False)),
                **dict(twin.named_buffers(remove_duplicate=False)),
            }
            side = Side(graph.program, tensors)
            side.begin(inputs)
            with torch.no_grad():
                for node in self.calls:
                    side.run(node)
                    if node.name in names:
                        self._values[node.name] = side.of(node).clone()
        except FORWARD_ERRORS as error:
            raise ModelError(
                f"distilling features needs a model that runs on random inputs of the traced size, found {error}",
                hint="--distill logits",
            ) from error
        self._events = [(place, tensor.detach()) for place, tensor in events]


def _is_sum(node: Node, by_input: Callable[[Node], bool]) -> bool:
    if not str(node.target).startswith(_SUMS) or len(node.all_input_nodes) != 2:
        return False
    values = [one.meta.get("val") for one in (*node.all_input_nodes, node)]
    shapes = {tuple(map(str, value.shape)) for value in values if isinstance(value, torch.Tensor)}
    tensors = all(isinstance(value, torch.Tensor) for value in values)
    return tensors and len(shapes) == 1 and all(map(by_input, node.all_input_nodes))


def _depends_on_inputs(graph: ChannelGraph) -> Callable[[Node], bool]:
    found = set(graph.program.graph_signature.user_inputs)
    for node in graph.program.graph.nodes:
        if any(one.name in found for one in node.all_input_nodes):
            found.add(node.name)
    return lambda node: node.name in found


def _settled(node: Node, *, over_activations: bool = True) -> Node:
    """Where a value comes to rest: behind its activation, and behind operations that overwrite it."""
    while True:
        users = list(node.users)
        over = [user for user in users if _overwrites(user, node)]
        behind = users if over_activations and len(users) == 1 and _activates(users[0]) else []
        following = next(iter(over or behind), None)
        if following is None:
            return node
        node = following


def _overwrites(user: Node, node: Node) -> bool:
    name = str(user.target).split(".")
    return len(name) > 1 and name[1].endswith("_") and bool(user.args) and user.args[0] is node


def _activates(node: Node) -> bool:
    return str(node.target).startswith(_ACTIVATIONS)


def _paths(node: Node) -> Iterator[str]:
    for path, _ in (node.meta.get("nn_module_stack") or {}).values():
        yield str(path)


def _slightly_off(model: nn.Module) -> nn.Module:
    """A copy in eval form none of whose weights is exactly what it was: zeros and ones make values equal that are not."""
    twin = copy.deepcopy(eval_copy(model)).float()
    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter.is_floating_point():
                scale = float(parameter.std()) if parameter.numel() > 1 else 0.0
                noise = torch.randn(parameter.shape, dtype=parameter.dtype).to(parameter.device)
                parameter.add_(noise, alpha=0.1 * (scale or 1.0))
    return twin


def _noise(tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.is_floating_point():
        return tensor
    return (torch.randn(tensor.shape) + 0.5).to(tensor.device)


_copies = partial(pytree.tree_map_only, torch.Tensor, torch.clone)
