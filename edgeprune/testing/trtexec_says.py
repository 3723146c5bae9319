"""What TensorRT says of models and engines that it refuses, for the stand-ins of its program and of its Python module.

No module of a package where it is used: both load it by its path, and it knows nothing of edgeprune.

Behavior by source: NVIDIA/TensorRT at v8.6.1, v10.3.0 and v11.1, include/NvInfer.h (``IDequantizeLayer``: types and zero points).
Recorded lines, on github.com: NVIDIA/TensorRT issues 4258 (memory), 3898 (version tags), 1384 (magic tag), 2774 and 4698 (zero
points), yuvraj108c/ComfyUI-Dwpose-Tensorrt issue 5 (version tags of TensorRT 10), yuvraj108c/ComfyUI-Upscaler-Tensorrt issue 36
(no implementation of a node), NVIDIA/Deep-Learning-Accelerator-SW issue 26 (a calibration table of another release).
"""

from __future__ import annotations

MAGIC = b"ftrt"
HEADER = 28
"""Bytes of an engine before the model that the stand-ins put into it."""

SERIALIZATION = {"8.6.1": 236, "10.3.0": 239, "11.1.0": 243}
"""Serialization versions: 236 and 239 as recorded; no log of TensorRT 11 was found, 243 only differs from them."""
RECORDED = {
    "memory": (
        "[E] Error[1]: [defaultAllocator.cpp::allocate::31] Error Code 1: Cuda Runtime (out of memory)",
        "[W] [TRT] Requested amount of GPU memory (15485030400 bytes) could not be allocated. There may not be enough free "
        "memory for allocation to succeed.",
        "[E] Error[9]: Error Code: 9: Skipping tactic 0x0000000000000000 due to exception [tunable_graph.cpp:create:117] "
        "autotuning: User allocator error allocating 15485030400-byte buffer",
        "[E] Error[10]: IBuilder::buildSerializedNetwork: Error Code 10: Internal Error (Could not find any implementation "
        "for node {ForeignNode[/1/Constant_36_output_0.../1/Slice_4]}.)",
        "[E] Engine could not be created from network",
        "[E] Building engine failed",
        "[E] Failed to create engine from model or file.",
        "[E] Engine set up failed",
    ),
    "node": (
        "[E] IBuilder::buildSerializedNetwork: Error Code 10: Internal Error (Could not find any implementation for node "
        "/model/model.6/Conv + PWN(/model/model.7/LeakyRelu).)",
        "[E] Engine could not be created from network",
        "[E] Building engine failed",
        "[E] Failed to create engine from model or file.",
        "[E] Engine set up failed",
    ),
}
_TAG_MISMATCH = {
    "8": "[E] [TRT] 1: [stdArchiveReader.cpp::StdArchiveReaderInitCommon::46] Error Code 1: Serialization (Serialization "
    "assertion stdVersionRead == serializationVersion failed.Version tag does not match. Note: Current Version: {0}, "
    "Serialized Engine Version: {1})",
    "later": "[E] IRuntime::deserializeCudaEngine: Error Code 1: Serialization (Serialization assertion stdVersionRead == "
    "kSERIALIZATION_VERSION failed.Version tag does not match. Note: Current Version: {0}, Serialized Engine Version: {1})",
}

UNCALIBRATED = (
    "[E] Error[3]: IExecutionContext::executeV2: Error Code 3: API Usage Error (Parameter check failed, condition: "
    'nullPtrAllowed. Tensor "input" is bound to nullptr, which is allowed only for an empty input tensor, shape tensor, or an '
    "output tensor associated with an IOuputAllocator.)",
    "[E] Engine could not be created from network",
    "[E] Engine set up failed",
)

_ASYMMETRIC = {
    "8": "ERROR: builtin_op_importers.cpp:1235 In function QuantDequantLinearHelper: [6] Assertion failed: "
    'shiftIsAllZeros(zeroPoint) && "TRT only supports symmetric quantization - zeroPt must be all zeros"',
    "later": "ModelImporter.cpp:141: ERROR: onnxOpImporters.cpp:1584 In function QuantDequantLinearHelper: [6] Assertion failed: "
    "shiftIsAllZeros(zeroPoint): Non-zero zero point is not supported. Please set "
    "kENABLE_UINT8_AND_ASYMMETRIC_QUANTIZATION_DLAto enable asymmetric quantization if it is on DLA.",
}


def mismatch(plan: bytes, version: str) -> str | None:
    """What a release says of an engine that is none of its own."""
    if plan[:4] != MAGIC or len(plan) < HEADER:
        return (
            "[E] [TRT] 1: [stdArchiveReader.cpp::StdArchiveReader::30] Error Code 1: Serialization (Serialization assertion "
            "magicTagRead == kMAGIC_TAG failed.Magic tag does not match)"
        )
    made = ".".join(map(str, plan[24:27]))
    if made == version:
        return None
    line = _TAG_MISMATCH["8" if version.startswith("8.") else "later"]
    return line.format(SERIALIZATION[version], SERIALIZATION.get(made, 0))


def unparsed(model: bytes, version: str) -> str | None:
    """What the ONNX parser of a release says of quantization that TensorRT does not have: only int8 with zero points of 0."""
    if b"QuantizeLinear" not in model:
        return None
    import onnx

    graph = onnx.load_from_string(model).graph
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        zeros = constants[node.input[2]] if len(node.input) > 2 else None
        if zeros is not None and zeros.any():
            return _ASYMMETRIC["8" if version.startswith("8.") else "later"]
        # "Its data type must be DataType::kINT8", of the zero point and of what is dequantized. The words are the stand-in's own.
        read = constants.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if any(array is not None and array.dtype != "int8" for array in (zeros, read)):
            return f"In node {node.name} ({node.op_type}): UNSUPPORTED_NODE: the type of {node.input[0]} must be kINT8"
    return None


def refused(model: bytes, version: str, *, int8: bool) -> str | None:
    """What the builder says of a model with quantize nodes, where types are not the graph's and nobody asked for int8.

    No recorded line of it was found: these words are the stand-in's own.
    """
    if int8 or version.startswith("11.") or b"QuantizeLinear" not in model:
        return None
    return (
        "Error[4]: IBuilder::buildSerializedNetwork: Error Code 4: Internal Error (INT8 is not enabled in the builder.)"
    )
