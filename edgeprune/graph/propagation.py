"""Walk the captured program once and label every tensor; anything without a rule pins what it touches."""

from __future__ import annotations

import logging
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch.export.graph_signature import InputKind
from torch.fx import Node

from edgeprune.graph.atoms import KEPT, Atoms, Ids
from edgeprune.graph.capture import Capture, concrete, module_path, shape_of
from edgeprune.graph.labels import Label, free, kept
from edgeprune.graph.rules._base import Call
from edgeprune.graph.rules.table import rule_for

log = logging.getLogger("edgeprune.graph")

_MISFITS = (ValueError, TypeError, LookupError, AssertionError)

Labels = Label | list[Label] | None

Kind = Literal["head", "head dimension"]
"""What the positions of an axis are in an attention."""


@dataclass(frozen=True)
class Producer:
    """A layer that makes channels.

    Attributes:
        ids: Atoms along the output axis.
        name: Module path of the layer, or the parameter's name; ``""`` where forward computes the weight.
        node: Program node.
        parameter: Name of the weight that makes them, or ``""``.
    """

    ids: Ids
    name: str
    node: str
    parameter: str = ""


@dataclass
class Propagation:
    """State of one walk; rules read and write it through its methods."""

    captured: Capture
    atoms: Atoms = field(default_factory=Atoms)
    labels: dict[str, Labels] = field(default_factory=dict)
    parameters: dict[str, str] = field(default_factory=dict)
    canonical: dict[int, str] = field(default_factory=dict)
    parameter_shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    axes: dict[tuple[str, int], Ids] = field(default_factory=dict)
    roles: dict[tuple[str, int], str] = field(default_factory=dict)
    own: list[Ids] = field(default_factory=list)
    filled: list[Ids] = field(default_factory=list)
    indices: set[str] = field(default_factory=set)
    producers: list[Producer] = field(default_factory=list)
    balanced: set[str] = field(default_factory=set)
    kinds: list[tuple[Ids, Kind]] = field(default_factory=list)
    beside_batch: list[tuple[Ids, int]] = field(default_factory=list)
    frozen_calls: list[tuple[Call, int, int]] = field(default_factory=list)

    def run(self) -> None:
        """Label every node of the program."""
        self._read_signature()
        for node in self.captured.program.graph.nodes:
            if node.op == "call_function":
                self.labels[node.name] = self._call(node)
            elif node.op == "output":
                self._pin_outputs(node)

    # What rules use

    def label(self, node: Node) -> Label:
        """Label of a node with one tensor."""
        name = self.parameters.get(node.name)
        if name is not None:
            return self._parameter_label(name)
        found = self.labels[node.name]
        assert isinstance(found, Label), f"{node.name} holds several tensors"
        return found

    def of(self, call: Call, argument: str) -> Label:
        """Label of a tensor argument."""
        node = call.node_of(argument)
        assert node is not None, f"{call.op} has no tensor {argument}"
        return self.label(node)

    def parameter(self, call: Call, argument: str) -> str | None:
        """Name of the parameter that an argument is; None where it is computed."""
        node = call.node_of(argument)
        return None if node is None else self.parameters.get(node.name)

    def axis(self, parameter: str, axis: int, role: str) -> Ids:
        """Atoms along one axis of a parameter; an axis of length 1 always stays."""
        key = (parameter, axis)
        if key not in self.axes:
            size = self.parameter_shapes[parameter][axis]
            self.axes[key] = self.atoms.fresh(size) if size > 1 else np.full(size, KEPT, dtype=np.int64)
            self.roles[key] = role
            self.own.append(self.axes[key])
        return self.axes[key]

    def bind(self, call: Call, argument: str, axis: int, ids: Ids | None, role: str, event: int) -> None:
        """An axis of a tensor argument, mostly a weight, goes with these atoms; None where all of it stays."""
        node = call.node_of(argument)
        if node is not None:
            self.bind_node(node, axis, ids, role, event)

    def bind_node(self, node: Node, axis: int, ids: Ids | None, role: str, event: int) -> None:
        """The same of an argument that stands in a list."""
        name = self.parameters.get(node.name)
        if name is None:
            self.meet(self.label(node).axes[axis], ids, event)
        elif (name, axis) in self.axes:
            self.meet(self.axes[name, axis], ids, event)
        else:
            size = self.parameter_shapes[name][axis]
            self.axes[name, axis] = np.full(size, KEPT, dtype=np.int64) if ids is None else ids
            self.roles[name, axis] = role

    def made(self, call: Call, argument: str, axis: int) -> Ids:
        """Atoms along the axis of a weight that makes channels."""
        node = call.node_of(argument)
        assert node is not None, f"{call.op} has no tensor {argument}"
        name = self.parameters.get(node.name)
        return self.label(node).axis(axis) if name is None else self.axis(name, axis, "output")

    def meet(self, one: Ids | None, other: Ids | None, event: int) -> Ids | None:
        """Two axes of one size go together; returns what is left of both."""
        if one is None or other is None:
            self.atoms.pin(one, event)
            self.atoms.pin(other, event)
            return None
        self.atoms.unify(one, other, event)
        return free(np.where(other < 0, KEPT, one))

    def together(self, labels: Sequence[Label], shape: tuple[int, ...], event: int) -> Label:
        """Labels of tensors that are broadcast against each other: axes that face each other go together.

        A tensor of length 1 along an axis says nothing about the others' channels there.
        """
        axes: list[Ids | None] = []
        lost = False
        for axis, size in enumerate(shape):
            places = [(label, axis - len(shape) + len(label.shape)) for label in labels]
            facing = [label.axes[own] for label, own in places if own >= 0 and (label.shape[own] > 1 or size == 1)]
            ids = facing[0] if facing else None
            for other in facing[1:]:
                ids = self.meet(ids, other, event)
            axes.append(ids)
            lost = lost or (ids is None and any(other is not None for other in facing))
        return Label(tuple(axes), shape, event if lost else max(label.event for label in labels))

    def event(self, call: Call, reason: str, *labels: Label) -> int:
        """An event at this operation, or the earlier one that already explains why one of the labels stays."""
        known = [label.event for label in labels if label.event >= 0]
        return known[0] if known else self.atoms.event(reason, call.op, call.source)

    def keep_whole(self, label: Label, axes: Iterable[int], event: int) -> Label:
        """Nothing may be removed along these axes."""
        for axis in axes:
            if label.axes[axis] is not None:
                self.atoms.pin(label.axes[axis], event)
                label = replace(label.at(axis, None), event=event)
        return label

    def mark(self, ids: Ids | None, kind: Kind) -> None:
        """Record what the positions of an axis are, for the names of groups; both factors of a head's axis can go."""
        if ids is not None:
            self.kinds.append((ids, kind))

    def produce(
        self,
        call: Call,
        ids: Ids,
        argument: str = "weight",
        conv_groups: int = 1,
        weight: str = "",
        value: Node | None = None,
    ) -> None:
        """Record that a layer makes these channels, and whether its conv groups must stay balanced.

        Args:
            call: The operation.
            ids: Atoms of the channels.
            argument: Which of its arguments is the weight.
            conv_groups: Of a convolution.
            weight: Name of the weight's parameter, where no argument is one by itself.
            value: The node that holds the channels, where the operation gives several tensors.
        """
        node = call.node_of(argument)
        parameter = weight if node is None else self.parameters.get(node.name, "")
        if conv_groups > 1 and parameter:
            self.balanced.add(parameter)
        path = parameter.rpartition(".")[0] or module_path(call.node) or parameter
        self.producers.append(Producer(ids, path, (value or call.node).name, parameter))

    def freeze(self, call: Call, reason: str) -> Label | list[Label]:
        """Pin everything that an operation touches."""
        event = self.atoms.event(reason, call.op, call.source)
        sizes = [
            label.shape[axis] for node in call.tensor_nodes() for label in self._all_of(node) for axis in label.varied
        ]
        for node in call.tensor_nodes():
            self._pin_node(node, event)
        # What carries no channels (a mask, positions) loses nothing.
        if sizes:
            self.frozen_calls.append((call, event, max(sizes)))
        if isinstance(call.node.meta["val"], list | tuple):
            return [kept(shape, event) for shape in call.shapes()]
        return kept(call.shape(), event)

    # Walking

    def _call(self, node: Node) -> Labels:
        if node.target is operator.getitem:
            parts, index = node.args
            found = self.labels.get(parts.name) if isinstance(parts, Node) else None
            return found[index] if isinstance(found, list) and isinstance(index, int) else None
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor | list | tuple):
            return None
        call = Call(node, self.captured.batch)
        rule = rule_for(call.op)
        if rule is None:
            return self.freeze(call, f"{call.op} has no rule")
        if any(not self._has_label(argument) for argument in call.tensor_nodes()):
            return self.freeze(call, f"{call.op} reads a list of tensors as a whole")
        try:
            found = rule.propagate(self, call)
        except _MISFITS as error:
            # What it has said so far only ties and pins.
            log.warning("%s at %s is used in a way that its rule does not know: %s", call.op, call.source, error)
            return self.freeze(call, f"{call.op} is used in a way that its rule does not know")
        if isinstance(value, torch.Tensor):
            assert isinstance(found, Label), f"{call.op} has one output"
            return self._free_of_batch(call, found, value)
        assert isinstance(found, list), f"{call.op} has several outputs"
        return [self._free_of_batch(call, label, part) for label, part in zip(found, value, strict=True)]

    def _free_of_batch(self, call: Call, label: Label, value: torch.Tensor) -> Label:
        """An axis whose size follows the batch keeps all positions: at another batch they are other channels.

        Heads beside the batch are an exception, as attention is often written: there are so many of them per sample.
        """
        sizes: list[Any] = list(value.shape)
        batch = self.captured.batch
        for axis in label.varied:
            if not isinstance(sizes[axis], torch.SymInt):
                continue
            event = self.event(call, "it lies along an axis whose size depends on the batch", label)
            ids = label.axis(axis)
            per_sample = len(ids) // batch
            multiple = concrete(sizes[axis], 2 * batch) == 2 * len(ids) and len(ids) % batch == 0
            if multiple and np.array_equal(ids, np.tile(ids[:per_sample], batch)):
                self.beside_batch.append((ids, event))
            else:
                label = self.keep_whole(label, (axis,), event)
        return label

    def _has_label(self, node: Node) -> bool:
        return node.name in self.parameters or isinstance(self.labels.get(node.name), Label)

    def _all_of(self, node: Node) -> list[Label]:
        """Labels of all tensors that a node holds."""
        name = self.parameters.get(node.name)
        found = self.labels.get(node.name) if name is None else self._parameter_label(name)
        return found if isinstance(found, list) else [] if found is None else [found]

    def _pin_node(self, node: Node, event: int) -> None:
        for label in self._all_of(node):
            self.keep_whole(label, range(len(label.axes)), event)

    def _pin_outputs(self, node: Node) -> None:
        event = self.atoms.event("an output of the model keeps its size", "output")
        for item in torch.utils._pytree.tree_leaves(node.args[0]):
            if isinstance(item, Node):
                self._pin_node(item, event)

    # Placeholders

    def _read_signature(self) -> None:
        program, batch = self.captured.program, self.captured.batch
        values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
        for spec in program.graph_signature.input_specs:
            value = values.get(getattr(spec.arg, "name", ""))
            if not isinstance(value, torch.Tensor):
                continue
            shape = shape_of(value, batch)
            if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER) and spec.target is not None:
                held = program.state_dict.get(spec.target, program.constants.get(spec.target))
                name = self.canonical.setdefault(id(held), spec.target)
                self.parameters[spec.arg.name] = name
                self.parameter_shapes[name] = shape
                if not (value.is_floating_point() or value.is_complex()):
                    self.indices.add(name)
            elif spec.kind == InputKind.USER_INPUT:
                event = self.atoms.event("it is combined with an input of the model, which keeps its size", "input")
                self.labels[spec.arg.name] = kept(shape, event)
            else:
                event = self.atoms.event("it is combined with a constant of forward", "constant")
                self.labels[spec.arg.name] = kept(shape, event)

    def _parameter_label(self, name: str) -> Label:
        """A parameter as data: each of its axes can be cut, unless it holds indices."""
        shape = self.parameter_shapes[name]
        if name in self.indices:
            return kept(shape)
        return Label(tuple(free(self.axis(name, axis, "vector")) for axis in range(len(shape))), shape)
