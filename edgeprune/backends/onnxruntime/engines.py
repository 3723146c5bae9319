"""Engine files: reading what the runtime makes of one, and building small ones for measuring."""

from __future__ import annotations

import heapq
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from edgeprune.backends._base import OperatorGraph
from edgeprune.backends.onnxruntime import transposes
from edgeprune.backends.onnxruntime.exporting import SOURCES_KEY
from edgeprune.backends.onnxruntime.operators import (
    VIEWS,
    base,
    family,
    filled,
    input_dtypes,
    output_dtype,
    read,
    resized,
    write,
)
from edgeprune.backends.onnxruntime.pieces import output_shapes
from edgeprune.backends.onnxruntime.runtime import onnxruntime
from edgeprune.backends.onnxruntime.versions import WRITTEN, OnnxVersions
from edgeprune.errors import CompileError
from edgeprune.spec import Kernel, TensorSpec

Shape = tuple[int, ...]

_OPSETS = [("com.microsoft", 1), ("com.microsoft.nchwc", 1)]


def optimized(
    engine: Path | bytes, level: str, settings: Mapping[str, str] | None = None, *, without: Sequence[str] = ()
) -> onnx.ModelProto:
    """What ONNX Runtime on this host makes of an engine at an optimization level (``BASIC``, ``EXTENDED`` or ``ALL``).

    Args:
        engine: ONNX file, or its content.
        level: Of optimization.
        settings: Of the session, by the names that ONNX Runtime has for them.
        without: Names of its optimizers that are left out.

    Raises:
        CompileError: ONNX Runtime refuses the file.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    for name, value in (settings or {}).items():
        options.add_session_config_entry(name, value)
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, f"ORT_ENABLE_{level}")
    with tempfile.TemporaryDirectory(prefix="edgeprune-") as folder:
        target = Path(folder) / "optimized.onnx"
        options.optimized_model_filepath = str(target)
        source = engine if isinstance(engine, bytes) else str(engine)
        try:
            onnxruntime.InferenceSession(
                source, options, providers=["CPUExecutionProvider"], disabled_optimizers=list(without)
            )
        # The runtime's own exceptions share no base class but Exception.
        except Exception as error:
            reason = str(error).strip().splitlines()[0][:200]
            raise CompileError(f"ONNX Runtime must be able to load the engine, it says: {reason}") from error
        return onnx.load(target)


def operators(engine: Path, level: str = "EXTENDED") -> OperatorGraph:
    """The graph of a dense engine after all fusions that do not depend on widths.

    Args:
        engine: The ONNX file.
        level: See `optimized`; at ``BASIC`` constants and batch norms are folded and every node is plain ONNX.
    """
    original = onnx.load(engine, load_external_data=False)
    metadata = {entry.key: entry.value for entry in original.metadata_props}
    model = optimized(engine, level)
    before = onnx.shape_inference.infer_shapes(original).graph
    values = _typed(model, before)
    known = {value.name: _shape(value) for value in values}
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    found = tuple(read(node, constants) for node in in_order(model.graph, original.graph))
    shapes: dict[str, Shape] = {}
    for name in {name for operator in found for name in (*operator.inputs, *operator.outputs)}:
        if name in known:
            shapes[name] = known[name]
        elif name in constants:
            shapes[name] = tuple(constants[name].dims)
    inputs = tuple(
        TensorSpec(value.name, _shape(value), helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name)
        for value in original.graph.input
    )
    return OperatorGraph(
        operators=found,
        inputs=inputs,
        outputs=tuple(value.name for value in model.graph.output),
        shapes=shapes,
        sources=json.loads(metadata.get(SOURCES_KEY, "{}")),
        dtypes={
            name: dtype
            for name, kind in (
                *((value.name, value.type.tensor_type.elem_type) for value in values),
                *((name, tensor.data_type) for name, tensor in constants.items()),
            )
            if kind and (dtype := helper.tensor_dtype_to_np_dtype(kind).name) != "float32"
        },
        notes=transposes.found(found, before, shapes),
    )


def in_order(graph: onnx.GraphProto, original: onnx.GraphProto) -> list[onnx.NodeProto]:
    """Nodes in an order in which they can run, as close to the original one as can be.

    ONNX Runtime writes nodes in an order of its own; which of two convolutions takes a sum goes by the original one. What
    its fusions made comes as soon as its inputs are there.
    """
    position = {node.name: index for index, node in enumerate(original.node)}
    maker = {name: index for index, node in enumerate(graph.node) for name in node.output if name}
    waits = [{maker[name] for name in node.input if name in maker} for node in graph.node]
    readers: dict[int, list[int]] = {}
    for index, before in enumerate(waits):
        for other in before:
            readers.setdefault(other, []).append(index)
    ready = [(position.get(node.name, -1), index) for index, node in enumerate(graph.node) if not waits[index]]
    heapq.heapify(ready)
    found = []
    while ready:
        _, index = heapq.heappop(ready)
        found.append(graph.node[index])
        for reader in readers.get(index, ()):
            waits[reader].discard(index)
            if not waits[reader]:
                heapq.heappush(ready, (position.get(graph.node[reader].name, -1), reader))
    return found


def _typed(model: onnx.ModelProto, original: onnx.GraphProto) -> list[onnx.ValueInfoProto]:
    """Shapes and types of the tensors of an optimized graph: those of the original, and of what fusions put in between."""
    given = {value.name: value for value in [*original.input, *original.output, *original.value_info]}
    extended = onnx.ModelProto()
    extended.CopyFrom(model)
    there = {value.name for value in [*model.graph.input, *model.graph.output, *model.graph.value_info]}
    extended.graph.value_info.extend(value for name, value in given.items() if name not in there)
    found = onnx.shape_inference.infer_shapes(extended).graph
    return [*{**{value.name: value for value in [*found.output, *found.value_info]}, **given}.values()]


def _shape(value: onnx.ValueInfoProto) -> Shape:
    return tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)


def parse(engine: Path) -> list[Kernel]:
    """The kernels that ONNX Runtime on this host executes for an engine, in order, with blocked shapes padded.

    Blocked tensors carry no shape in the optimized file, so shapes are inferred along the graph from the weights.
    """
    model = optimized(engine, "ALL")
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    graph = onnx.shape_inference.infer_shapes(onnx.load(engine, load_external_data=False)).graph
    shapes = {value.name: _shape(value) for value in _typed(model, graph)}
    shapes.update({name: tuple(tensor.dims) for name, tensor in constants.items()})
    found: list[Kernel] = []
    for node in model.graph.node:
        operator = read(node, constants)
        inputs = tuple(shapes[name] for name in operator.inputs)
        if operator.op == "nchwc.ReorderInput":
            shapes[operator.outputs[0]] = _reordered(operator.outputs[0], inputs[0], model.graph, constants)
        output = shapes.get(operator.outputs[0]) or _blocked_output(node, operator.op, inputs, constants)
        shapes.setdefault(operator.outputs[0], output)
        if operator.op not in VIEWS:
            found.append(Kernel(operator.op, family(operator.op), inputs, output, operator.attributes))
    return found


def _reordered(name: str, shape: Shape, graph: onnx.GraphProto, constants: Mapping[str, TensorProto]) -> Shape:
    """Shape of a reordered input; the node does not say how far it pads, its reader's weights do."""
    batch, channels, *space = shape
    for reader in graph.node:
        if name in reader.input and reader.op_type == "Conv":
            weight = constants[reader.input[1]].dims
            channels = max(channels, weight[1], weight[0] if weight[1] == 1 else 0)
    return (batch, channels, *space)


def _blocked_output(
    node: onnx.NodeProto, op: str, inputs: tuple[Shape, ...], constants: Mapping[str, TensorProto]
) -> Shape:
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    batch, channels, *space = inputs[0]
    if op == "Concat":
        return (batch, sum(shape[1] for shape in inputs), *space)
    if op in {"nchwc.GlobalAveragePool", "nchwc.GlobalMaxPool"}:
        return (batch, channels, *(1 for _ in space))
    if base(op) in {"Conv", "MaxPool", "AveragePool"}:
        weight = constants.get(node.input[1]) if len(node.input) > 1 else None
        kernel = list(weight.dims[2:]) if weight is not None else attributes["kernel_shape"]
        size = len(kernel)
        stride, dilation = attributes.get("strides", [1] * size), attributes.get("dilations", [1] * size)
        pads = attributes.get("pads", [0] * 2 * size)
        up = -1 if attributes.get("ceil_mode") else 1
        window = [
            up * ((up * (space[i] + pads[i] + pads[i + size] - dilation[i] * (kernel[i] - 1) - 1)) // stride[i]) + 1
            for i in range(size)
        ]
        return (batch, weight.dims[0] if weight is not None else channels, *window)
    if op == "nchwc.Upsample":
        return tuple(size * scale for size, scale in zip(inputs[0], attributes["scales"], strict=True))
    return inputs[0]


def kernel_engine(kernel: Kernel, versions: OnnxVersions = WRITTEN) -> bytes:
    """A model of one node: the kernel as it is after optimization, to be loaded without further optimization.

    The kernel must come from an engine of the same opset. Whether the board's ONNX Runtime runs it alone, the board tells; this
    host's may know other layouts.
    """
    inputs = [
        TensorSpec(f"input{index}", shape, dtype)
        for index, (shape, dtype) in enumerate(zip(kernel.inputs, input_dtypes(kernel), strict=True))
    ]
    outputs = [
        TensorSpec(f"output{index}", shape, output_dtype(kernel)) for index, shape in enumerate(output_shapes(kernel))
    ]
    nodes = write(kernel, [spec.name for spec in inputs], [spec.name for spec in outputs], "kernel")
    return model_of(nodes, inputs, outputs, versions)


def network_engine(graph: OperatorGraph, shapes: Mapping[str, Shape], versions: OnnxVersions = WRITTEN) -> bytes:
    """The network at other widths, from the fused operators of an engine of the same opset, with meaningless weights."""
    graph, shapes = transposes.settled(graph, shapes)
    nodes: list[onnx.NodeProto] = []
    constants: set[str] = {name for operator in graph.operators for name in operator.inputs}
    constants -= {spec.name for spec in graph.inputs}
    constants -= {name for operator in graph.operators for name in operator.outputs}
    for index, name in enumerate(sorted(constants)):
        dtype = graph.dtypes.get(name, "float32")
        nodes += filled(name, shapes[name], unlike(index) if dtype == "float32" else 0, dtype)
    for index, operator in enumerate(graph.operators):
        kernel = Kernel(
            op=operator.op,
            family=family(operator.op),
            inputs=tuple(shapes[name] for name in operator.inputs),
            output=shapes[operator.outputs[0]],
            attributes=tuple(sorted(resized(operator, graph, shapes).items())),
        )
        nodes += write(kernel, list(operator.inputs), list(operator.outputs), f"operator{index}", unlike(index))
    inner = [name for operator in graph.operators for name in operator.outputs if name in shapes]
    return model_of(
        nodes,
        [TensorSpec(spec.name, shapes[spec.name], spec.dtype) for spec in graph.inputs],
        [TensorSpec(name, shapes[name], graph.dtypes.get(name, "float32")) for name in graph.outputs],
        versions,
        [TensorSpec(name, shapes[name], graph.dtypes.get(name, "float32")) for name in inner],
    )


def unlike(index: int) -> float:
    """Another number close to 1 for each index.

    Of two layers with equal weights and one input the runtime computes only one, and it leaves out the sum with a zero.
    Multiples of the golden ratio, modulo 1, spread evenly, so products of many stay close to 1.
    """
    return 1.0 + 0.05 * ((index + 1) * 0.6180339887498949 % 1.0 - 0.5)


def model_of(
    nodes: list[onnx.NodeProto],
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    versions: OnnxVersions,
    inner: Sequence[TensorSpec] = (),
) -> bytes:
    def infos(tensors: Sequence[TensorSpec]) -> list[onnx.ValueInfoProto]:
        return [
            helper.make_tensor_value_info(spec.name, helper.np_dtype_to_tensor_dtype(np.dtype(spec.dtype)), spec.shape)
            for spec in tensors
        ]

    graph = helper.make_graph(nodes, "edgeprune", infos(inputs), infos(outputs), value_info=infos(inner))
    opsets = [("", versions.opset), *_OPSETS]
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid(domain, version) for domain, version in opsets])
    model.ir_version = versions.ir_version
    return bytes(model.SerializeToString())
