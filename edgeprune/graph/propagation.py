"""Walk the captured program once and label every tensor; anything without a rule pins what it touches."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.export.graph_signature import InputKind
from torch.fx import Node

from edgeprune.graph.atoms import KEPT, Atoms, Ids
from edgeprune.graph.capture import Capture, module_path, shape_of
from edgeprune.graph.labels import Label, compact, kept, vector
from edgeprune.graph.rules._base import Call, named_arguments
from edgeprune.graph.rules.table import rule_for

MAX_PLAIN_PARAMETER = 1 << 20
"""Parameters with several channel axes that are used as data are labeled entry by entry up to this size."""

Labels = Label | list[Label] | None


@dataclass(frozen=True)
class Producer:
    """A layer that makes channels.

    Attributes:
        ids: Atoms along the output axis.
        name: Module path of the layer, or the parameter's name.
        node: Program node.
    """

    ids: Ids
    name: str
    node: str


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
    plain: dict[str, Label | None] = field(default_factory=dict)
    producers: list[Producer] = field(default_factory=list)
    balanced: set[str] = field(default_factory=set)
    frozen_calls: list[tuple[Call, int, int]] = field(default_factory=list)

    def run(self) -> None:
        """Label every node of the program."""
        self._read_signature()
        self._find_plain_parameters()
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
        """Name of the parameter that an argument is, where it can be cut axis by axis; else None."""
        node = call.node_of(argument)
        name = None if node is None else self.parameters.get(node.name)
        return None if name is None or name in self.plain else name

    def axis(self, parameter: str, axis: int, role: str) -> Ids:
        """Atoms along one axis of a parameter; an axis of length 1 always stays."""
        key = (parameter, axis)
        if key not in self.axes:
            size = self.parameter_shapes[parameter][axis]
            self.axes[key] = self.atoms.fresh(size) if size > 1 else np.full(size, KEPT, dtype=np.int64)
            self.roles[key] = role
        return self.axes[key]

    def bind(self, parameter: str, axis: int, ids: Ids, role: str, event: int) -> None:
        """The axis of a parameter goes with these atoms."""
        key = (parameter, axis)
        if key in self.axes:
            self.atoms.unify(self.axes[key], ids, event)
        else:
            self.axes[key] = ids
            self.roles[key] = role

    def event(self, call: Call, reason: str, *labels: Label) -> int:
        """An event at this operation, or the earlier one that already explains why one of the labels stays."""
        known = [label.event for label in labels if label.event >= 0]
        return known[0] if known else self.atoms.event(reason, call.op, call.source)

    def collapse(self, label: Label, axis: int, event: int) -> Ids:
        """Ids along one axis at full length; what varies along other axes is made to go together."""
        ids = label.ids
        for other in label.varied:
            if other != axis:
                ids = self.atoms.unify_along(ids, other, event)
        return Label(ids, label.shape).axis(axis)

    def keep_whole(self, label: Label, axes: tuple[int, ...], event: int) -> Label:
        """Nothing may be removed along these axes."""
        inside = [axis for axis in label.varied if axis in axes]
        if not inside:
            return label
        if len(inside) == len(label.varied):
            self.atoms.pin(label.ids, event)
            return kept(label.shape, event)
        ids = label.ids
        for axis in inside:
            ids = self.atoms.unify_along(ids, axis, event)
        return Label(ids, label.shape, label.event)

    def produce(self, call: Call, ids: Ids, parameter: str, conv_groups: int = 1) -> None:
        """Record that a layer makes these channels, and whether its conv groups must stay balanced."""
        if conv_groups > 1:
            self.balanced.add(parameter)
        path = parameter.rpartition(".")[0] or module_path(call.node) or parameter
        self.producers.append(Producer(ids, path, call.node.name))

    def freeze(self, call: Call, reason: str) -> Label | list[Label]:
        """Pin everything that an operation touches."""
        event = self.atoms.event(reason, call.op, call.source)
        widest = 1
        for node in call.tensor_nodes():
            label = None if node.name in self.parameters else self.labels.get(node.name)
            if isinstance(label, Label):
                widest = max([widest, *label.ids.shape])
            self._pin_node(node, event)
        self.frozen_calls.append((call, event, widest))
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
        found = rule.propagate(self, call)
        if isinstance(value, torch.Tensor):
            assert isinstance(found, Label), f"{call.op} has one output"
            return self._free_of_batch(call, found, value)
        assert isinstance(found, list), f"{call.op} has several outputs"
        return [self._free_of_batch(call, label, part) for label, part in zip(found, value, strict=True)]

    def _free_of_batch(self, call: Call, label: Label, value: torch.Tensor) -> Label:
        """An axis whose size follows the batch keeps all positions: at another batch they are other channels."""
        sizes: list[Any] = list(value.shape)
        axes = tuple(axis for axis, size in enumerate(sizes) if isinstance(size, torch.SymInt))
        if not set(axes) & set(label.varied):
            return label
        event = self.event(call, "it lies along an axis whose size depends on the batch", label)
        return self.keep_whole(label, axes, event)

    def _has_label(self, node: Node) -> bool:
        return node.name in self.parameters or isinstance(self.labels.get(node.name), Label)

    def _pin_node(self, node: Node, event: int) -> None:
        name = self.parameters.get(node.name)
        if name is not None:
            for axis in range(len(self.parameter_shapes[name])):
                self.atoms.pin(self.axis(name, axis, "vector"), event)
            label = self.plain.get(name)
            if label is not None:
                self.atoms.pin(label.ids, event)
            return
        found = self.labels.get(node.name)
        for label in found if isinstance(found, list) else [found]:
            if label is not None:
                self.atoms.pin(label.ids, event)

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
            elif spec.kind == InputKind.USER_INPUT:
                event = self.atoms.event("it is combined with an input of the model, which keeps its size", "input")
                self.labels[spec.arg.name] = kept(shape, event)
            else:
                event = self.atoms.event("it is combined with a constant of forward", "constant")
                self.labels[spec.arg.name] = kept(shape, event)

    def _find_plain_parameters(self) -> None:
        """Parameters with several axes that are used as data, not as the weight of a contraction."""
        for node in self.captured.program.graph.nodes:
            if node.op not in ("call_function", "output"):
                continue
            rule = rule_for(str(node.target)) if node.op == "call_function" else None
            weights = {named_arguments(node).get(name) for name in rule.weights} if rule and rule.weights else set()
            for used in node.all_input_nodes:
                name = self.parameters.get(used.name)
                if name is None or used in weights:
                    continue
                if sum(size > 1 for size in self.parameter_shapes[name]) > 1:
                    self.plain[name] = None

    def _parameter_label(self, name: str) -> Label:
        shape = self.parameter_shapes[name]
        if name not in self.plain:
            wide = [axis for axis, size in enumerate(shape) if size > 1]
            return vector(self.axis(name, wide[0], "vector"), shape, wide[0]) if wide else kept(shape)
        label = self.plain[name]
        if label is None:
            if int(np.prod(shape)) > MAX_PLAIN_PARAMETER:
                event = self.atoms.event(f"parameter {name} is too large to be used as data", "parameter")
                label = kept(shape, event)
            else:
                label = compact(self.atoms.fresh(shape), shape)
            self.plain[name] = label
        return label
