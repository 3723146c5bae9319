"""Which layout ONNX Runtime's CPU provider gives each operator: the NCHWc rule.

At its highest optimization level ONNX Runtime walks the graph once in topological order and turns convolutions, pools and
what follows them into operators on tensors whose channels are stored in blocks (16 floats with AVX-512, 8 with AVX2). Where
a blocked tensor meets an operator that cannot read it, a ``ReorderOutput`` is put in between, and a ``ReorderInput`` the
other way. Whether an operator can be blocked depends on its channel counts, so pruning changes *which* kernels run, not
only their sizes: 61 channels leave the blocked path, 60 do not.

A blocked convolution works on whole blocks, whatever the logical channel count: kernels on 52 and on 64 channels are one
and the same. Blocked shapes are therefore written padded.

Source: the behavior of onnxruntime/core/optimizer/nchwc_transformer.cc, checked against ONNX Runtime 1.31.1 on random nets
(tests/unit/backends, tests/unit/lowering).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edgeprune.backends._base import Operator, OperatorGraph
from edgeprune.backends.onnxruntime import int8_graph, transposes
from edgeprune.backends.onnxruntime.operators import CONV_DEFAULTS, VIEWS, family, resized
from edgeprune.spec import AttributeValue, Kernel, Precision

Shape = tuple[int, ...]

# ReorderInput moves four channels at a time, so a tensor with another count cannot enter the blocked path.
_CHANNEL_ALIGNMENT = 4
_POOLS = frozenset({"MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"})
_ACTIVATIONS = frozenset({"Relu", "Sigmoid", "Tanh", "HardSigmoid", "QuickGelu", "microsoft.Gelu", "Gelu"})
_BLOCKED_FUSABLE = frozenset({"Relu", "Sigmoid", "Tanh"})
_PLAIN_FUSABLE = frozenset({"Relu", "Sigmoid", "Tanh", "LeakyRelu", "Clip", "HardSigmoid"})
_PLACES = frozenset({"asymmetric", "align_corners", "half_pixel"})
_CONVS = frozenset({"Conv", "FusedConv"})


def block_size(architecture: str, isa: Sequence[str]) -> int:
    """Channels in a block on a CPU; 1 where ONNX Runtime has no blocked kernels.

    16 with AVX-512F was checked against ONNX Runtime 1.31.1; 8 on other x86-64 CPUs, and no blocked path elsewhere, is what
    its sources are remembered to say and has not been tried on such a machine.
    """
    if architecture not in {"x86_64", "amd64", "AMD64"}:
        return 1
    return 16 if "avx512f" in isa else 8


@dataclass
class _Blocked:
    """A tensor that exists in blocked layout.

    Attributes:
        name: Name of the blocked tensor.
        shape: Logical shape.
        conv: Index of the blocked convolution in the output list that writes it, if it is one.
        uses: How many operators (and graph outputs) read the logical tensor in the original graph.
        served: How many of them read the blocked one.
    """

    name: str
    shape: Shape
    conv: int | None
    uses: int
    served: int = 0


@dataclass
class _Step:
    op: str
    inputs: list[Shape]
    output: Shape
    attributes: dict[str, AttributeValue]
    origin: tuple[str, ...]
    precision: Precision = "fp32"
    operator: Operator | None = None
    """The operator that runs as it is, in plain layout; None for blocked steps."""
    reads: str = ""
    makes: str = ""
    """First tensor that a blocked step reads, and the one that it makes, by the names of the plain graph."""


class _Walk:
    """One walk over the operators at given shapes."""

    def __init__(self, graph: OperatorGraph, shapes: Mapping[str, Shape], block: int) -> None:
        self.graph, self.shapes, self.block = graph, shapes, block
        self.steps: list[_Step] = []
        self.blocked: dict[str, _Blocked] = {}
        self.reordered: set[str] = set()
        self.uses = Counter(name for operator in graph.operators for name in operator.inputs)
        self.uses.update(graph.outputs)
        self.quantized = int8_graph.quantized(graph)

    def run(self) -> list[_Step]:
        for operator in self.graph.operators:
            floating = self.block > 1 and not self._in_int8(operator)
            if not (floating and self._transform(operator)):
                self._plain(operator)
        for name, tensor in self.blocked.items():
            if tensor.served < tensor.uses:
                shape = tensor.shape
                self.steps.append(_Step("nchwc.ReorderOutput", [self._padded(shape)], shape, {}, self._source(name)))
        self._fuse_plain_sums()
        return self.steps

    def _transform(self, operator: Operator) -> bool:
        if operator.op in _CONVS:
            return self._conv(operator)
        if operator.op in _POOLS:
            return self._pool(operator)
        if operator.op == "BatchNormalization":
            return self._batch_norm(operator)
        if not operator.inputs or any(name not in self.blocked for name in operator.inputs):
            return False
        if operator.op in {"Add", "Sum", "Mul"}:
            return self._binary(operator)
        if operator.op == "Concat":
            return self._concat(operator)
        if operator.op in _ACTIVATIONS:
            return self._activation(operator)
        if operator.op == "Resize":
            return self._resize(operator)
        if operator.op == "Transpose":
            return self._to_channels_last(operator)
        return False

    def _conv(self, operator: Operator) -> bool:
        attributes = resized(operator, self.graph, self.shapes)
        source, target = operator.inputs[0], operator.outputs[0]
        shape, output = self.shapes[source], self.shapes[target]
        if len(shape) != 4 or attributes.get("residual", True):
            return False
        channels, groups = shape[1], int(attributes["groups"])  # type: ignore[arg-type]
        reads_blocks = True
        if groups > 1:
            if output[1] % _CHANNEL_ALIGNMENT:
                return False
            if channels == output[1] == groups:
                attributes["groups"] = self._padded(output)[1]
            elif (channels // groups) % self.block or (output[1] // groups) % self.block:
                return False
        elif channels < self.block:
            reads_blocks = False
        elif channels % _CHANNEL_ALIGNMENT:
            return False
        read = self._read(source) if reads_blocks else shape
        self._emit_blocked(operator, "nchwc.Conv", [read], attributes, conv=True)
        return True

    def _pool(self, operator: Operator) -> bool:
        shape = self.shapes[operator.inputs[0]]
        if len(operator.outputs) > 1 or len(shape) != 4 or shape[1] % self.block:
            return False
        self._emit_blocked(
            operator, f"nchwc.{operator.op}", [self._read(operator.inputs[0])], dict(operator.attributes)
        )
        return True

    def _batch_norm(self, operator: Operator) -> bool:
        """What no convolution took in becomes one: depthwise, of one pixel."""
        source = operator.inputs[0]
        if source not in self.blocked:
            return False
        padded = self._read(source)
        attributes: dict[str, AttributeValue] = {"kernel": (1, 1), "groups": padded[1], "bias": True, "residual": False}
        self._emit_blocked(operator, "nchwc.Conv", [padded], {**CONV_DEFAULTS, **attributes}, conv=True)
        return True

    def _binary(self, operator: Operator) -> bool:
        if operator.op == "Mul" and self._hard_swish(operator):
            return True
        tensors = [self.blocked[name] for name in operator.inputs]
        if len(tensors) < 2 or any(tensor.shape != tensors[0].shape for tensor in tensors):
            return False
        for tensor in tensors:
            tensor.served += 1
        if operator.op != "Mul" and len(tensors) == 2:
            for tensor, other in (tensors, tensors[::-1]):
                if tensor.conv is None or tensor.uses != 1:
                    continue
                conv = self.steps[tensor.conv]
                if conv.attributes["residual"] or conv.attributes["activation"]:
                    continue
                conv.attributes["residual"] = True
                conv.inputs.append(self._padded(other.shape))
                # The sum can only run once the other side exists: the convolution moves behind it.
                self._move_last(tensor.conv)
                self._fuse(operator, len(self.steps) - 1)
                return True
        self._emit_blocked(
            operator, operator.op, [self._padded(tensor.shape) for tensor in tensors], dict(operator.attributes)
        )
        return True

    def _hard_swish(self, operator: Operator) -> bool:
        """A convolution's output times its hard sigmoid, where nothing else reads either of them."""
        for name, gate in (operator.inputs, operator.inputs[::-1]) if len(operator.inputs) == 2 else ():
            tensor, sigmoid = self.blocked[name], self.blocked[gate]
            step = next((step for step in self.steps if step.makes == gate), None)
            if step is None or step.op != "HardSigmoid" or step.reads != name or tensor.conv is None:
                continue
            conv = self.steps[tensor.conv]
            if abs(float(step.attributes.get("alpha", 0.2)) - 1 / 6) > 1e-6 or step.attributes.get("beta", 0.5) != 0.5:  # type: ignore[arg-type]
                continue
            if conv.attributes["activation"] or tensor.uses != 2 or sigmoid.uses != 1:
                continue
            conv.attributes["activation"] = "HardSwish"
            conv.origin += step.origin
            self._drop(self.steps.index(step))
            tensor.served, sigmoid.served = 2, 1
            self._fuse(operator, tensor.conv)
            return True
        return False

    def _concat(self, operator: Operator) -> bool:
        tensors = [self.blocked[name] for name in operator.inputs]
        if dict(operator.attributes).get("axis") != 1 or any(tensor.shape[1] % self.block for tensor in tensors):
            return False
        for tensor in tensors:
            tensor.served += 1
        self._emit_blocked(
            operator, "Concat", [self._padded(tensor.shape) for tensor in tensors], dict(operator.attributes)
        )
        return True

    def _activation(self, operator: Operator) -> bool:
        tensor = self.blocked[operator.inputs[0]]
        tensor.served += 1
        if operator.op in _BLOCKED_FUSABLE and tensor.conv is not None and tensor.uses == 1:
            conv = self.steps[tensor.conv]
            if not conv.attributes["activation"]:
                conv.attributes["activation"] = operator.op
                self._fuse(operator, tensor.conv)
                return True
        self._emit_blocked(operator, operator.op, [self._padded(tensor.shape)], dict(operator.attributes))
        return True

    def _resize(self, operator: Operator) -> bool:
        """Whole factors in height and width, in the modes that blocked upsampling has."""
        source, target = self.blocked[operator.inputs[0]], self.shapes[operator.outputs[0]]
        attributes = dict(operator.attributes)
        mode, places = str(attributes.get("mode", "nearest")), str(attributes.get("coordinate_transformation_mode"))
        scales = tuple(after // before for before, after in zip(source.shape, target, strict=True))
        whole = tuple(before * scale for before, scale in zip(source.shape, scales, strict=True)) == target
        if mode == "nearest" and (places != "asymmetric" or attributes.get("nearest_mode") != "floor"):
            return False
        if mode not in ("nearest", "linear") or places not in _PLACES or len(target) != 4 or not whole or 0 in scales:
            return False
        source.served += 1
        kept: dict[str, AttributeValue] = {"mode": mode, "coordinate_transformation_mode": places, "scales": scales}
        self._emit_blocked(operator, "nchwc.Upsample", [self._padded(source.shape)], kept)
        return True

    def _to_channels_last(self, operator: Operator) -> bool:
        """A reorder writes channels last as well."""
        tensor = self.blocked[operator.inputs[0]]
        if dict(operator.attributes).get("perm") != (0, 2, 3, 1):
            return False
        tensor.served += 1
        output = self.shapes[operator.outputs[0]]
        attributes: dict[str, AttributeValue] = {"channels_last": 1}
        self.steps.append(
            _Step("nchwc.ReorderOutput", [self._padded(tensor.shape)], output, attributes, self._origin(operator))
        )
        return True

    def _read(self, name: str) -> Shape:
        """The blocked form of a tensor; made by a ReorderInput, once, where there is none."""
        shape = self.shapes[name]
        if name in self.blocked:
            self.blocked[name].served += 1
        elif name not in self.reordered:
            self.reordered.add(name)
            self.steps.append(_Step("nchwc.ReorderInput", [shape], self._padded(shape), {}, self._source(name)))
        return self._padded(shape)

    def _plain(self, operator: Operator) -> None:
        if operator.op in VIEWS:
            return
        sizes = int8_graph.told(operator, self.graph, self.shapes)
        attributes = dict(int8_graph.attributes_at(operator, self.graph, self.shapes))
        inputs = [sizes[name] for name in operator.inputs]
        precision: Precision = "int8" if self._in_int8(operator) else "fp32"
        origin = self._origin(operator)
        self.steps.append(
            _Step(operator.op, inputs, sizes[operator.outputs[0]], attributes, origin, precision, operator)
        )

    def _in_int8(self, operator: Operator) -> bool:
        return self.quantized and int8_graph.in_int8(operator, self.graph)

    def _fuse_plain_sums(self) -> None:
        """Convolutions that stayed in plain layout take the sum behind them, and its activation, if they have a bias.

        Source: the behavior of onnxruntime/core/optimizer/conv_add_act_fusion.cc, which runs after the NCHWc rule.
        """
        readers = {name: step for step in self.steps if step.operator for name in step.operator.inputs}
        merged: list[_Step] = []
        for step in self.steps:
            if step.operator is None or step.op != "Conv" or not step.attributes.get("bias"):
                continue
            total = self._lone_reader(step, readers)
            if total is None or total.op != "Add" or any(total is other for other in merged):
                continue
            if len(total.inputs) != 2 or total.inputs[0] != total.inputs[1]:
                continue
            step.op, step.attributes["residual"] = "FusedConv", True
            step.inputs.append(total.output)
            merged.append(total)
            step.origin += total.origin
            activation = self._lone_reader(total, readers)
            if activation is not None and activation.op in _PLAIN_FUSABLE:
                step.attributes["activation"] = activation.op
                merged.append(activation)
                step.origin += activation.origin
        self.steps = [step for step in self.steps if not any(step is other for other in merged)]

    def _lone_reader(self, step: _Step, readers: Mapping[str, _Step]) -> _Step | None:
        name = step.operator.outputs[0] if step.operator else ""
        return readers.get(name) if self.uses[name] == 1 else None

    def _emit_blocked(
        self,
        operator: Operator,
        op: str,
        inputs: list[Shape],
        attributes: dict[str, AttributeValue],
        *,
        conv: bool = False,
    ) -> None:
        target = operator.outputs[0]
        shape = self.shapes[target]
        self.steps.append(
            _Step(
                *(op, inputs, self._padded(shape), attributes, self._origin(operator)),
                reads=operator.inputs[0],
                makes=target,
            )
        )
        self.blocked[target] = _Blocked(target, shape, len(self.steps) - 1 if conv else None, self.uses[target])

    def _fuse(self, operator: Operator, conv: int) -> None:
        target = operator.outputs[0]
        self.steps[conv].origin += self._origin(operator)
        self.blocked[target] = _Blocked(target, self.shapes[target], conv, self.uses[target])

    def _move_last(self, index: int) -> None:
        makers = [tensor for tensor in self.blocked.values() if tensor.conv == index]
        step = self.steps[index]
        self._drop(index)
        self.steps.append(step)
        for tensor in makers:
            tensor.conv = len(self.steps) - 1

    def _drop(self, index: int) -> None:
        del self.steps[index]
        for tensor in self.blocked.values():
            if tensor.conv is not None and tensor.conv > index:
                tensor.conv -= 1

    def _padded(self, shape: Shape) -> Shape:
        return (shape[0], -(-shape[1] // self.block) * self.block, *shape[2:])

    def _origin(self, operator: Operator) -> tuple[str, ...]:
        first, *others = operator.outputs
        parts = [name for name in others if operator.op == "Split" and name in self.graph.sources]
        return tuple(self.graph.sources.get(name, name) for name in (first, *parts))

    def _source(self, name: str) -> tuple[str, ...]:
        return (self.graph.sources.get(name, name),)


def kernels(graph: OperatorGraph, shapes: Mapping[str, Shape], block: int) -> list[Kernel]:
    """Kernels that run when the tensors of `graph` have the given shapes.

    Args:
        graph: Operators before layouts are chosen.
        shapes: Tensor name to shape.
        block: From `block_size`.
    """
    graph, shapes = transposes.settled(graph, shapes)
    return [
        Kernel(
            op=step.op,
            family=family(step.op),
            inputs=tuple(step.inputs),
            output=step.output,
            attributes=tuple(sorted(step.attributes.items())),
            precision=step.precision,
            origin=step.origin,
        )
        for step in _Walk(graph, shapes, block).run()
    ]
