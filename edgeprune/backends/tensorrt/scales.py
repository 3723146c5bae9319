"""Scales of numbers in a file of their own, for a Jetson's DLA: up to TensorRT 10 it takes no quantize nodes.

The file is the calibration table that TensorRT writes when it calibrates by itself: a line with its release and the kind of
calibrator, and a line for each tensor, its scale (the largest magnitude over 127) as the eight hexadecimal digits of a
big-endian float. Of another release it is passed over, and the builder then wants data to calibrate with. Weights are quantized
by the builder, per channel by their largest magnitude, which is what our quantize nodes say too.

Sources: NVIDIA-AI-IOT/cuDLA-samples at 781c515, ``export/qdq_translator`` (the same, of another kind of model) and
``data/model``; NVIDIA/TensorRT issue 625 (the digits) and NVIDIA/Deep-Learning-Accelerator-SW issue 26 (one of another release);
NVIDIA/TensorRT, samples/common/sampleEngines.cpp at v8.6.1 and v10.3.0 (``RndInt8Calibrator``, which reads it, is of the kind
``EntropyCalibration2``).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import onnx
from onnx import numpy_helper

from edgeprune.backends.onnxruntime.quantizing import LAYERS
from edgeprune.backends.tensorrt.versions import Version


@dataclass(frozen=True)
class Scales:
    """What a builder is told instead of quantize nodes.

    Attributes:
        table: The file.
        exact: Names of the layers that stay in fp16.
    """

    table: bytes
    exact: tuple[str, ...]


def of(model: onnx.ModelProto, version: Version) -> Scales:
    """What the quantize nodes of a model say.

    Args:
        model: From `edgeprune.backends.tensorrt.model.quantized`.
        version: Of the TensorRT that reads it.
    """
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    lines = [f"TRT-{version.number}-EntropyCalibration2"]
    ends = {value.name for value in model.graph.output}
    # What makes an output of the network was renamed when its numbers were quantized.
    renamed = {node.input[0]: node.output[0] for node in model.graph.node if node.output[0] in ends}
    found: dict[str, float] = {}
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear" and node.input[0] not in constants:
            name = renamed.get(node.output[0], node.input[0])
            found[name] = float(numpy_helper.to_array(constants[node.input[1]]))
    lines += [f"{name}: {struct.pack('>f', scale).hex()}" for name, scale in found.items()]
    made = {output: node for node in model.graph.node for output in node.output}
    exact = []
    for node in model.graph.node:
        maker = made.get(node.input[0]) if node.input else None
        if node.op_type in LAYERS and (maker is None or maker.op_type != "DequantizeLinear"):
            exact.append(node.name)
    return Scales(("\n".join(lines) + "\n").encode("ascii"), tuple(exact))
