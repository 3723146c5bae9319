"""What ONNX Runtime makes of a quantized engine, and engines of it at other widths.

All that ONNX Runtime does to quantized operations is the same at all widths: it fuses them by their neighbors, puts images
channels last, and moves the transposes that this needs to where the fewest are left. So the graph of an int8 engine is
read after all of its optimizations, and only what stays in float is left for the NCHWc rule of `layout`.
Two exceptions are not followed: at some widths of an attention the transposes of its heads have other sizes than told here; and
where a skip connection brings int8 numbers to a concatenation in float (of what a transposed convolution made), the network that
is timed transposes them in int8, and the real one in float.

Source: the behavior of ONNX Runtime 1.31.1 (QDQ selectors and actions, NHWC transformer, transpose optimizer), compared with
it on random widths (tests/unit/lowering/test_int8.py, benchmarks/lowering.py --precision int8).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from edgeprune.backends._base import Operator, OperatorGraph
from edgeprune.backends.onnxruntime import engines, int8_nodes, shapes
from edgeprune.backends.onnxruntime.exporting import SOURCES_KEY
from edgeprune.backends.onnxruntime.int8_numbers import Int8Numbers
from edgeprune.backends.onnxruntime.operators import VIEWS, base, family, filled, resized
from edgeprune.backends.onnxruntime.pieces import output_shapes
from edgeprune.backends.onnxruntime.runtime import onnxruntime
from edgeprune.backends.onnxruntime.versions import OnnxVersions
from edgeprune.spec import AttributeValue, Kernel, TensorSpec

Shape = tuple[int, ...]

LAST = "channels last"
"""In `OperatorGraph.notes`: the tensor lies channels last; its shapes are written channels first, as the program has them."""
INT8 = frozenset({"int8", "uint8"})

_INT8_ALLOWED = "session.qdqisint8allowed"
"""Name of the session option, as in onnxruntime_session_options_config_keys.h."""
_FLOAT_ONLY = ("NchwcTransformer", "ConvAddActivationFusion")
"""Optimizers that `layout` foretells: what they do depends on the widths."""
_SUFFIXES = (
    *("_QuantizeLinear_Output", "_QuantizeLinear_Input", "_DequantizeLinear_Output", "_DequantizeLinear_Input"),
    "_quantized",
)
_COUNTED = re.compile(r"_token_\d+$")
_FLOAT_OP = {
    "QLinearConcat": "Concat",
    "QLinearMatMul": "MatMul",
    "MatMulIntegerToFloat": "MatMul",
    "QLinearSoftmax": "Softmax",
}
_POOLS = frozenset({"NhwcMaxPool", "QLinearAveragePool", "QLinearGlobalAveragePool", "MaxPool"})


def operators(engine: Path) -> OperatorGraph:
    """The graph of a dense int8 engine before the float part of it is laid out."""
    original = onnx.load(engine, load_external_data=False)
    metadata = {entry.key: entry.value for entry in original.metadata_props}
    model = engines.optimized(engine, "ALL", _settings(original), without=_FLOAT_ONLY)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    found = tuple(int8_nodes.read(node, constants) for node in engines.in_order(model.graph, original.graph))
    lying = _tensors(model)
    lasting = _channels_last(found, {name: shape for name, (shape, _) in lying.items()})
    used = {name for operator in found for name in (*operator.inputs, *operator.outputs)}
    sources: dict[str, str] = json.loads(metadata.get(SOURCES_KEY, "{}"))
    made = {node.name: node.output[0] for node in original.graph.node if node.name and len(node.output) == 1}
    meant = {name: _meant(name, made) for name in used}
    nodes = {*sources.values(), *(value.name for value in original.graph.input)}
    for operator in found:
        result = operator.outputs[0]
        if sources.get(meant[result], meant[result]) not in nodes and family(operator.op) in ("elementwise", "layout"):
            meant[result] = meant.get(operator.inputs[0], result)
    return OperatorGraph(
        operators=found,
        inputs=tuple(TensorSpec(value.name, *lying[value.name]) for value in original.graph.input),
        outputs=tuple(value.name for value in model.graph.output),
        shapes={
            name: int8_nodes.first(shape) if name in lasting else shape
            for name, (shape, _) in lying.items()
            if name in used
        },
        sources={**{name: sources.get(stem, stem) for name, stem in meant.items()}, **sources},
        dtypes={name: dtype for name, (_, dtype) in lying.items() if dtype != "float32"},
        notes=dict.fromkeys(lasting, LAST),
    )


def parse(engine: Path) -> list[Kernel]:
    """The kernels that ONNX Runtime on this host executes for an int8 engine; see `engines.parse`."""
    model = engines.optimized(engine, "ALL", _settings(onnx.load(engine, load_external_data=False)))
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    lying = _tensors(model)
    found = [int8_nodes.read(node, constants) for node in model.graph.node]
    kernels = []
    for operator in found:
        if operator.op in VIEWS:
            continue
        inputs = [lying[name][0] for name in operator.inputs]
        output = lying[operator.outputs[0]][0]
        if int8_nodes.channels_last(operator):
            inputs, output = [int8_nodes.first(shape) for shape in inputs], int8_nodes.first(output)
        names = (*operator.inputs, *operator.outputs)
        integers = operator.op != "Cast" and (
            int8_nodes.is_int8(operator.op) or any(lying[name][1] in INT8 for name in names)
        )
        kernels.append(
            Kernel(
                op=operator.op,
                family=family(operator.op),
                inputs=tuple(inputs),
                output=output,
                attributes=operator.attributes,
                precision="int8" if integers else "fp32",
            )
        )
    return kernels


def _settings(engine: onnx.ModelProto) -> dict[str, str]:
    """What makes ONNX Runtime on any processor optimize an engine as on the one that it is for: x86 turns int8 into uint8."""
    points = {name for node in engine.graph.node if node.op_type == "QuantizeLinear" for name in node.input[2:]}
    signed = any(tensor.name in points and tensor.data_type == TensorProto.INT8 for tensor in engine.graph.initializer)
    return {_INT8_ALLOWED: "1"} if signed else {}


def quantized(graph: OperatorGraph) -> bool:
    """Whether it is one of an int8 engine, and not one in floats that takes bytes."""
    return any(int8_nodes.is_int8(operator.op) for operator in graph.operators)


def in_int8(operator: Operator, graph: OperatorGraph) -> bool:
    """Whether an operation reads or writes quantized numbers; what turns an image of bytes into floats does not."""
    if operator.op == "Cast":
        return False
    names = (*operator.inputs, *operator.outputs)
    return int8_nodes.is_int8(operator.op) or any(graph.dtypes.get(name) in INT8 for name in names)


def told(operator: Operator, graph: OperatorGraph, shapes: Mapping[str, Shape]) -> Mapping[str, Shape]:
    """Shapes of an operation's tensors as its kernel has them: channels first only where it says that they lie last."""
    if int8_nodes.channels_last(operator) or not graph.notes:
        return shapes
    names = [name for name in (*operator.inputs, *operator.outputs) if graph.notes.get(name) == LAST and name in shapes]
    return {**shapes, **{name: int8_nodes.last(shapes[name]) for name in names}} if names else shapes


def infer_shapes(operator: Operator, graph: OperatorGraph, known: Mapping[str, Shape]) -> dict[str, Shape] | None:
    """See `Backend.infer_shapes`."""
    result = operator.outputs[0]
    if base(operator.op) in _POOLS and operator.inputs[0] in known and result not in known:
        if graph.notes.get(operator.inputs[0]) != graph.notes.get(result):
            return None
        now, dense = known[operator.inputs[0]], graph.shapes[result]
        # The window moves over positions, whose number no width changes.
        return {result: (*now[:2], *dense[2:])} if now[2:] == graph.shapes[operator.inputs[0]][2:] else None
    if base(operator.op) == "QLinearConv":
        return None
    plain = replace(operator, op=_FLOAT_OP.get(base(operator.op), operator.op))
    found = shapes.inferred(plain, told(operator, graph, graph.shapes), told(operator, graph, known))
    if found is None:
        return None
    return {name: int8_nodes.first(shape) if graph.notes.get(name) == LAST else shape for name, shape in found.items()}


def kernel_engine(kernel: Kernel, numbers: Int8Numbers, versions: OnnxVersions) -> bytes:
    """A model of one node; see `engines.kernel_engine`."""

    def lies(shape: Shape) -> Shape:
        return int8_nodes.last(shape) if int8_nodes.channels_last(kernel) else shape

    types = int8_nodes.input_dtypes(kernel, numbers)
    inputs = [
        TensorSpec(f"input{index}", lies(shape), dtype)
        for index, (shape, dtype) in enumerate(zip(kernel.inputs, types, strict=True))
    ]
    dtype = int8_nodes.output_dtype(kernel, numbers)
    outputs = [TensorSpec(f"output{index}", lies(shape), dtype) for index, shape in enumerate(output_shapes(kernel))]
    nodes = int8_nodes.write(kernel, [one.name for one in inputs], [one.name for one in outputs], "kernel", numbers)
    return engines.model_of(nodes, inputs, outputs, versions)


def network_engine(
    graph: OperatorGraph, shapes: Mapping[str, Shape], numbers: Int8Numbers, versions: OnnxVersions
) -> bytes:
    """The network at other widths; see `engines.network_engine`."""
    lying = {name: int8_nodes.last(shape) if graph.notes.get(name) == LAST else shape for name, shape in shapes.items()}

    def spec(name: str) -> TensorSpec:
        return TensorSpec(name, lying[name], graph.dtypes.get(name, "float32"))

    made = {name for operator in graph.operators for name in operator.outputs} | {one.name for one in graph.inputs}
    constants = {name for operator in graph.operators for name in operator.inputs} - made
    nodes: list[onnx.NodeProto] = []
    for index, name in enumerate(sorted(constants)):
        value = engines.unlike(index) if spec(name).dtype == "float32" else 1 if spec(name).dtype in INT8 else 0
        nodes += filled(name, lying[name], value, spec(name).dtype)
    for index, operator in enumerate(_kept_as_it_is(_with_hard_swish(graph.operators))):
        sizes = told(operator, graph, shapes)
        kernel = Kernel(
            op=operator.op,
            family=family(operator.op),
            inputs=tuple(sizes[name] for name in operator.inputs),
            output=sizes[operator.outputs[0]],
            attributes=attributes_at(operator, graph, shapes),
            precision="int8" if in_int8(operator, graph) else "fp32",
        )
        names = list(operator.inputs), list(operator.outputs)
        nodes += int8_nodes.write(kernel, *names, f"operator{index}", numbers, engines.unlike(index))
    inner = [name for operator in graph.operators for name in operator.outputs if name in shapes]
    return engines.model_of(
        nodes,
        [spec(one.name) for one in graph.inputs],
        [spec(name) for name in graph.outputs],
        versions,
        [spec(name) for name in inner],
    )


def _kept_as_it_is(operators: Sequence[Operator]) -> list[Operator]:
    """With products of dequantized numbers under a name by which the runtime does not fuse them; the same code multiplies.

    The runtime left them in float because of what stood beside them before its other fusions.
    """
    exact = {operator.outputs[0] for operator in operators if operator.op == "DequantizeLinear"}
    return [
        replace(operator, op="FusedMatMul")
        if operator.op == "MatMul" and exact.issuperset(operator.inputs)
        else operator
        for operator in operators
    ]


def _with_hard_swish(operators: Sequence[Operator]) -> list[Operator]:
    """With the function whole that the runtime takes apart itself.

    In pieces it would get two readers of what a ``DequantizeLinear`` makes, and the runtime gives each reader one of its own.
    """
    readers = Counter(name for operator in operators for name in operator.inputs)
    gates = {
        operator.outputs[0]: operator.inputs[0]
        for operator in operators
        if operator.op == "HardSigmoid"
        and readers[operator.outputs[0]] == 1
        and abs(float(dict(operator.attributes).get("alpha", 0.2)) - 1 / 6) < 1e-6  # type: ignore[arg-type]
    }
    whole = {
        operator.outputs[0]: gate
        for operator in operators
        for gate in operator.inputs
        if operator.op == "Mul" and gates.get(gate) in operator.inputs
    }
    taken = set(whole.values())
    return [
        replace(operator, op="HardSwish", inputs=(gates[whole[operator.outputs[0]]],), attributes=())
        if operator.outputs[0] in whole
        else operator
        for operator in operators
        if operator.outputs[0] not in taken
    ]


def attributes_at(
    operator: Operator, graph: OperatorGraph, shapes: Mapping[str, Shape]
) -> tuple[tuple[str, AttributeValue], ...]:
    """Attributes of an operation at other shapes; see `operators.resized`."""
    there = graph if not graph.notes else replace(graph, shapes=told(operator, graph, graph.shapes))
    return tuple(sorted(resized(operator, there, told(operator, graph, shapes)).items()))


def _tensors(model: onnx.ModelProto) -> dict[str, tuple[Shape, str]]:
    """Shape and type of every tensor of an optimized model, from running it once: not all of its operations tell shapes."""
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    names = list(dict.fromkeys(name for node in model.graph.node for name in node.output if name))
    del watched.graph.output[:]
    watched.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(watched.SerializeToString(), options, providers=["CPUExecutionProvider"])
    given = {}
    for value in model.graph.input:
        kind = value.type.tensor_type
        shape = tuple(dim.dim_value for dim in kind.shape.dim)
        given[value.name] = np.zeros(shape, helper.tensor_dtype_to_np_dtype(kind.elem_type))
    found = dict(zip(names, session.run(names, given), strict=True)) | given
    tensors = {name: (tuple(array.shape), array.dtype.name) for name, array in found.items()}
    for tensor in model.graph.initializer:
        tensors[tensor.name] = (tuple(tensor.dims), helper.tensor_dtype_to_np_dtype(tensor.data_type).name)
    return tensors


def _channels_last(found: Sequence[Operator], lying: Mapping[str, Shape]) -> set[str]:
    """Names of the tensors that lie channels last."""
    lasting: set[str] = set()
    for operator in found:
        source, result = (operator.inputs or ("",))[0], operator.outputs[0]
        rank = len(lying[result])
        if int8_nodes.channels_last(operator):
            lasting.update((source, result))
        elif operator.op == "Transpose":
            perm = dict(operator.attributes).get("perm")
            if source not in lasting and rank > 2 and perm == (0, *range(2, rank), 1):
                lasting.add(result)
        elif operator.op in VIEWS or family(operator.op) == "gemm":
            continue
        elif any(name in lasting and len(lying[name]) == rank for name in operator.inputs):
            lasting.update(operator.outputs)
    return lasting


def _meant(name: str, made: Mapping[str, str]) -> str:
    """The tensor of the float model that a tensor of the optimized graph stands for, as far as its name tells.

    Results that lie channels last are named by the node that made them.
    """
    name = _COUNTED.sub("", name)
    name = made.get(name, name)
    while (suffix := next((one for one in _SUFFIXES if name.endswith(one)), None)) is not None:
        name = name.removesuffix(suffix)
    return name
