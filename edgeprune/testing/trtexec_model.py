"""Layers and times of an engine that nobody built: a device that does not exist, for tests of what follows from times.

A program: ONNX on standard input, JSON on standard output. Which nodes become one layer, and how layers are named and exported,
is as in the recorded exports that the stand-in for trtexec has; how long a layer takes is made up: the larger of the time of its
multiplications, input and output channels padded to 8, and of its traffic, both in half precision, or in int8 where the layer
reads quantized numbers; a profiled layer takes 3.3 us more, as recorded ones do (the sum of a ResNet-18's layers is 1.31 of its
latency). A layer takes in the nodes that quantize what it reads and what it writes, and a sum of quantized numbers stays a layer
of its own: no recorded int8 engine was there to look at, so this is made up as the times are. It knows nothing of edgeprune.
"""

from __future__ import annotations

import json
import math
import sys
from typing import Any

import onnx

MACS_PER_MS = 4e9
BYTES_PER_MS = 3e8
LAYER_MS, PROFILED_MS, WHOLE_MS = 0.0012, 0.0033, 0.004
_VIEWS = {"Flatten", "Reshape", "Squeeze", "Unsqueeze", "Identity"}
_FOLLOWING = {"Relu", "Clip", "Add"}
_QUANTIZING = ("QuantizeLinear", "DequantizeLinear")


def made_up(model: onnx.ModelProto) -> dict[str, Any]:
    """``layers`` (as exported), ``profile`` (names with milliseconds) and ``whole_ms`` of a model."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    shapes = {
        value.name: [dimension.dim_value for dimension in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output, *graph.value_info)
    }
    constants = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    beside = _see_through(graph)
    fused = _fused(graph, constants, beside)
    layers, profile = [], []
    total_ms = WHOLE_MS
    for number, nodes in enumerate(fused):
        quantizing = [one for node in nodes for one in beside.get(node.name, ())]
        name = " + ".join(node.name for node in nodes)
        kind = "gemm" if nodes[0].op_type in ("Gemm", "MatMul") else f"Cask{nodes[0].op_type}"
        read = [source for node in nodes for source in node.input if source in shapes and source not in constants]
        made = {source for node in nodes for source in node.output}
        read = [source for source in dict.fromkeys(read) if source not in made]
        written = nodes[-1].output[0]
        ms = _work_ms(nodes[0], shapes, constants, read, written) / (2 if quantizing else 1)
        if number == 0:
            copied = f"Reformatting CopyNode for Input Tensor 0 to {name}"
            layers.append(_layer(copied, "Reformat", read[:1], [f"Reformatted {read[0]}"], shapes, []))
            copied_ms = 2 * 2 * math.prod(shapes[read[0]]) / BYTES_PER_MS
            profile.append([copied, copied_ms + PROFILED_MS])
            total_ms += copied_ms + LAYER_MS
        layers.append(_layer(name, kind, read, [written], shapes, [*(node.name for node in nodes), *quantizing]))
        profile.append([name, ms + PROFILED_MS])
        total_ms += ms + LAYER_MS
    return {"layers": {"Layers": layers, "Bindings": []}, "profile": profile, "whole_ms": total_ms}


def _see_through(graph: onnx.GraphProto) -> dict[str, list[str]]:
    """Take the nodes that quantize out of a graph; tells, by the name of a node that is left, which of them its layer takes in.

    What quantizes an input of the graph is a layer of its own, and stays.
    """
    inputs = {value.name for value in graph.input}
    quantizing = [node for node in graph.node if node.op_type in _QUANTIZING and node.input[0] not in inputs]
    through = {node.output[0]: node.input[0] for node in quantizing}
    names = {node.output[0]: node.name for node in quantizing}
    quantized = {node.input[0]: node.name for node in quantizing if node.op_type == "QuantizeLinear"}
    beside: dict[str, list[str]] = {}
    left = []
    for node in graph.node:
        if node.name in names.values():
            continue
        found = []
        for place, source in enumerate(node.input):
            while source in through:
                found.append(names[source])
                source = through[source]
            node.input[place] = source
        found += [quantized[output] for output in node.output if output in quantized]
        if found and node.op_type not in _QUANTIZING:
            beside[node.name] = found
        left.append(node)
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in left]
    del graph.node[:]
    graph.node.extend(kept)
    return beside


def _fused(
    graph: onnx.GraphProto, constants: dict[str, list[int]], beside: dict[str, list[str]]
) -> list[list[onnx.NodeProto]]:
    """Nodes of each layer: a convolution or product with the sum and the activation behind it, any other alone, views nowhere."""
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for source in node.input:
            readers.setdefault(source, []).append(node)
    taken: set[str] = set()
    groups: dict[str, list[onnx.NodeProto]] = {}
    # Of two branches that are summed the later one has the sum.
    for node in reversed(graph.node):
        if node.op_type not in ("Conv", "Gemm", "MatMul"):
            continue
        groups[node.name] = [node]
        while True:
            following = readers.get(groups[node.name][-1].output[0], [])
            if len(following) != 1 or following[0].op_type not in _FOLLOWING or following[0].name in taken:
                break
            if following[0].op_type == "Add" and following[0].name in beside:
                break
            groups[node.name].append(following[0])
            taken.add(following[0].name)
    found = []
    for node in graph.node:
        if node.name in groups:
            found.append(groups[node.name])
        elif node.name not in taken and node.op_type not in _VIEWS:
            found.append([node])
    return found


def _work_ms(
    node: onnx.NodeProto, shapes: dict[str, list[int]], constants: dict[str, list[int]], read: list[str], written: str
) -> float:
    elements = sum(math.prod(shapes[name]) for name in (*read, written))
    macs = 0.0
    weight = constants.get(node.input[1]) if node.op_type in ("Conv", "Gemm", "MatMul") else None
    if weight is not None:
        elements += math.prod(weight)
        outputs = shapes[node.output[0]]
        positions = math.prod(outputs) / outputs[1 if node.op_type == "Conv" else -1]
        macs = positions * math.prod(-(-size // 8) * 8 if place < 2 else size for place, size in enumerate(weight))
    return max(macs / MACS_PER_MS, 2 * elements / BYTES_PER_MS)


def _layer(
    name: str, kind: str, read: list[str], written: list[str], shapes: dict[str, list[int]], nodes: list[str]
) -> dict[str, Any]:
    def tensors(names: list[str]) -> list[dict[str, Any]]:
        return [
            {"Name": one, "Dimensions": shapes.get(one, shapes[read[0]]), "Format/Datatype": "Half"} for one in names
        ]

    return {
        "Name": name,
        "LayerType": kind,
        "Inputs": tensors(read),
        "Outputs": tensors(written),
        "Metadata": "\x1e".join(f"[ONNX Layer: {node}]" for node in nodes),
    }


if __name__ == "__main__":
    json.dump(made_up(onnx.load_from_string(sys.stdin.buffer.read())), sys.stdout)
