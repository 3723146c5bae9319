"""Layers of an engine as kernels, with their times and the nodes of the model that they compute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgeprune.backends.tensorrt.exports import Layer, LayerTime, Profile, integers, occurrences
from edgeprune.spec import AttributeValue, Kernel, Precision

# ParameterType, LayerType in lower case or ONNX operation: family. What is not here is "other".
_FAMILIES = {
    **dict.fromkeys(("Convolution", "Deconvolution", "Conv", "ConvTranspose"), "conv"),
    **dict.fromkeys(("MatrixMultiply", "FullyConnected", "Gemm", "MatMul", "gemm"), "gemm"),
    **dict.fromkeys(("Pooling", "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"), "pool"),
    **dict.fromkeys(("Reduce", "ReduceMean", "ReduceSum", "ReduceMax"), "reduce"),
    **dict.fromkeys(("SoftMax", "Softmax", "LogSoftmax"), "softmax"),
    **dict.fromkeys(("Normalization", "LayerNormalization", "InstanceNormalization", "BatchNormalization"), "norm"),
    **dict.fromkeys(("Concatenation", "Concat"), "concat"),
    **dict.fromkeys(("Reformat", "Shuffle", "Slice", "Transpose", "Reshape", "Flatten", "noop"), "layout"),
    **dict.fromkeys(
        (
            "ElementWise",
            "PointWise",
            "Activation",
            "Unary",
            "Scale",
            "Add",
            "Mul",
            "Sub",
            "Div",
            "Relu",
            "Clip",
            "Sigmoid",
        ),
        "elementwise",
    ),
}
# What names a layer that computes several operations: the first in this order.
_WORK = ("conv", "gemm", "pool", "reduce", "softmax", "norm", "concat", "layout", "elementwise", "other")


@dataclass(frozen=True)
class TimedKernel:
    """One layer of an engine.

    Attributes:
        layer: TensorRT's name of it.
        kernel: What it computes; `Kernel.origin` has the nodes.
        nodes: Names of the ONNX nodes that it computes.
        average_ms: Mean time, milliseconds; None where the profile has no row for it.
        median_ms: Median time, milliseconds, where known.
    """

    layer: str
    kernel: Kernel
    nodes: tuple[str, ...]
    average_ms: float | None
    median_ms: float | None

    def as_json(self) -> dict[str, Any]:
        """For the record beside an engine."""
        return {
            "layer": self.layer,
            "kernel": self.kernel.key,
            "origin": list(self.kernel.origin),
            "nodes": list(self.nodes),
            "average_ms": self.average_ms,
            "median_ms": self.median_ms,
        }


def timed_kernels(
    layers: Sequence[Layer],
    profile: Profile | None = None,
    *,
    operations: Mapping[str, str] | None = None,
    origins: Mapping[str, str] | None = None,
) -> list[TimedKernel]:
    """Join layers with their times, by name and occurrence, and with the model's nodes, by their metadata.

    Args:
        layers: Of the engine, in order.
        profile: Its profile.
        operations: Name of an ONNX node to its operation: what TensorRT's code generator made says nothing else.
        origins: Name of an ONNX node to that of the traced program's node; a node that is not in it keeps its own name.

    Returns:
        One entry per layer, then one per row of the profile that no layer has the name of.
    """
    rows: dict[tuple[str, int], LayerTime] = {}
    if profile is not None:
        rows = dict(zip(occurrences([row.name for row in profile.rows]), profile.rows, strict=True))
    found = []
    for layer, key in zip(layers, occurrences([layer.name for layer in layers]), strict=True):
        found.append(_timed(layer, rows.pop(key, None), operations or {}, origins or {}))
    found += [_timed(Layer(row.name), row, {}, {}) for row in rows.values()]
    return found


def kernel_of(layer: Layer, operations: Mapping[str, str], origins: Mapping[str, str]) -> Kernel:
    """What a layer computes.

    Its precision is that of its weights, else of its output. The tactic and the tensors' layouts are attributes: layers that
    differ in them take different times.
    """
    family = _family(layer, operations)
    output = layer.outputs[0].shape if layer.outputs else ()
    attributes: dict[str, AttributeValue] = {
        name: value
        for name, value in (("tactic", layer.fields.get("TacticName")), ("activation", layer.fields.get("Activation")))
        if isinstance(value, str) and value
    }
    formats = ";".join(tensor.format for tensor in (*layer.inputs, *layer.outputs) if tensor.format)
    if formats:
        attributes["formats"] = formats
    if family == "conv":
        pads = integers(layer.fields.get("PrePadding")) + integers(layer.fields.get("PostPadding"))
        attributes |= {
            "kernel": integers(layer.fields.get("Kernel")),
            "stride": integers(layer.fields.get("Stride")),
            "pads": pads,
            "dilation": integers(layer.fields.get("Dilation")),
            "groups": _count(layer.fields.get("Groups")) or 1,
            "activation": "" if attributes.get("activation") in (None, "NONE") else str(attributes["activation"]),
            "residual": bool(_count(layer.fields.get("HasResidual"))),
            "bias": bool(_count(layer.fields.get("HasBias"))),
        }
    return Kernel(
        op=layer.kind or "unknown",
        family=family,
        inputs=tuple(tensor.shape for tensor in layer.inputs),
        output=output,
        attributes=tuple(sorted(attributes.items())),
        precision=_precision(layer),
        origin=tuple(dict.fromkeys(origins.get(node, node) for node in layer.nodes)),
    )


def _timed(
    layer: Layer, row: LayerTime | None, operations: Mapping[str, str], origins: Mapping[str, str]
) -> TimedKernel:
    return TimedKernel(
        layer=layer.name,
        kernel=kernel_of(layer, operations, origins),
        nodes=layer.nodes,
        average_ms=None if row is None else row.average_ms,
        median_ms=None if row is None else row.median_ms,
    )


def _family(layer: Layer, operations: Mapping[str, str]) -> str:
    parameter = layer.fields.get("ParameterType")
    told = _FAMILIES.get(parameter) if isinstance(parameter, str) else None
    told = told or _FAMILIES.get(layer.kind.lower())
    if told is not None:
        return told
    known = [_FAMILIES.get(operations[node], "other") for node in layer.nodes if node in operations]
    return min(known, key=_WORK.index, default="other")


def _precision(layer: Layer) -> Precision:
    weights = layer.fields.get("Weights")
    told = str(weights.get("Type", "")) if isinstance(weights, dict) else ""
    if not told:
        told = next((tensor.format for tensor in layer.outputs if tensor.format), "")
    if "Half" in told or "FP16" in told:
        return "fp16"
    return "int8" if "int8" in told.lower() else "fp32"


def _count(value: Any) -> int:
    return int(value) if isinstance(value, int) else 0
