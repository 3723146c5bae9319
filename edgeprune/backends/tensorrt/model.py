"""The ONNX model as one release of TensorRT takes it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx

from edgeprune.backends._base import Case, OperatorGraph, Told
from edgeprune.backends.onnxruntime.exporting import SOURCES_KEY
from edgeprune.backends.onnxruntime.half import in_half
from edgeprune.backends.tensorrt.versions import Dialect
from edgeprune.errors import ExportError
from edgeprune.spec import Precision

QUANTIZING = ("QuantizeLinear", "DequantizeLinear")
"""Operations that say in the graph what is int8."""


def prepared(model: onnx.ModelProto, family: Dialect, precision: Precision) -> onnx.ModelProto:
    """A model of the opset, IR version and types that a release builds from; inputs and outputs keep their types.

    Since TensorRT 11 types are taken from the graph, so for fp16 weights and activations are made fp16 here. Before, the
    graph stays fp32 and an option asks for fp16.

    Args:
        model: A checked model; it is not changed.
        family: The release's.
        precision: Of the engine.

    Raises:
        ExportError: An operation cannot be had in that opset, or not in fp16.
    """
    found = onnx.ModelProto()
    found.CopyFrom(model)
    opset = _opset(found)
    if opset > family.opset:
        try:
            found = onnx.version_converter.convert_version(found, family.opset)
            _drop_defaults(found, opset, family.opset)
        except (RuntimeError, ValueError) as error:
            raise ExportError(
                f"TensorRT {family.name} takes ONNX up to opset {family.opset}, and the model cannot be had in it: "
                f"{_first_line(error)}.",
                hint="a board with a newer TensorRT, or --backend onnxruntime",
            ) from error
    found.ir_version = min(found.ir_version, family.ir_version)
    if precision == "fp16" and family.strongly_typed:
        found = in_half(found)
    try:
        onnx.checker.check_model(found, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(
            f"the model for TensorRT {family.name} must pass the ONNX checker, {_first_line(error)}.",
            hint="--backend onnxruntime",
        ) from error
    return found


def quantized(
    model: onnx.ModelProto, cases: Sequence[Case], needed_db: float, told: Told | None = None
) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """A model with explicit quantize and dequantize nodes as TensorRT takes them, and what became of its layers.

    Args:
        model: As `prepared` made it.
        cases: Calibration data.
        needed_db: See `edgeprune.backends.onnxruntime.quantizing.quantize`.
        told: Told what happens.

    Raises:
        CompileError: No layer can be int8.
        ConfigError: There are too few cases.
    """
    from edgeprune.backends.onnxruntime.int8_numbers import Int8Numbers
    from edgeprune.backends.onnxruntime.quantizing import quantize

    with tempfile.TemporaryDirectory(prefix="edgeprune-int8-") as folder:
        exact, path = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        exact.write_bytes(model.SerializeToString())
        found = quantize(exact, cases, path, needed_db=needed_db, numbers=Int8Numbers.of_tensorrt(), told=told)
        return onnx.load(path), found.facts()


def quantized_for_timing(model: onnx.ModelProto) -> onnx.ModelProto:
    """A model with quantize and dequantize nodes where `quantized` puts them if no layer is too noisy, with made-up scales.

    The time of an inference does not depend on scales; the outputs mean nothing.

    Args:
        model: As `prepared` made it.

    Raises:
        CompileError: No layer has weights.
    """
    from edgeprune.backends.onnxruntime.int8_numbers import Int8Numbers
    from edgeprune.backends.onnxruntime.quantizing import quantize_for_timing

    with tempfile.TemporaryDirectory(prefix="edgeprune-int8-") as folder:
        exact, path = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        exact.write_bytes(model.SerializeToString())
        quantize_for_timing(exact, None, path, numbers=Int8Numbers.of_tensorrt())
        return onnx.load(path)


def served(model: onnx.ModelProto) -> dict[str, str]:
    """Name of each quantize and dequantize node to that of the node for whose sake it is there: the first that reads what it
    makes, of the model's last numbers the one that made them.
    """
    makers = {output: node for node in model.graph.node for output in node.output}
    readers: dict[str, onnx.NodeProto] = {}
    for node in model.graph.node:
        for source in node.input:
            readers.setdefault(source, node)
    found = {}
    for node in model.graph.node:
        if node.op_type in QUANTIZING:
            other = _working(node, lambda one: readers.get(one.output[0]))
            if other is None:
                other = _working(node, lambda one: makers.get(one.input[0]))
            if other is not None:
                found[node.name] = other.name
    return found


def network(graph: OperatorGraph, shapes: Mapping[str, tuple[int, ...]]) -> onnx.ModelProto:
    """The operators as a plain ONNX model at other widths, with meaningless weights; a node has the name of its operator.

    Weights are initializers: what an importer computes from a shape may be no weight to it.
    """
    from edgeprune.backends.onnxruntime import engines
    from edgeprune.backends.onnxruntime.literals import with_literals

    made = with_literals(onnx.load_from_string(engines.network_engine(graph, shapes)))
    names = {operator.outputs[0]: operator.name for operator in graph.operators}
    for node in made.graph.node:
        node.name = names.get(node.output[0], node.name)
    # Domains of ONNX Runtime's own: no node is of them, and another importer may not know them.
    plain = [entry for entry in made.opset_import if entry.domain in ("", "ai.onnx")]
    del made.opset_import[:]
    made.opset_import.extend(plain)
    return made


def operations(model: onnx.ModelProto) -> dict[str, str]:
    """Name of each node to its operation."""
    return {node.name: node.op_type for node in model.graph.node if node.name}


def origins(model: onnx.ModelProto) -> dict[str, str]:
    """Name of each node to that of the traced program's node that its first output is the value of, where known."""
    told = {entry.key: entry.value for entry in model.metadata_props}
    sources: dict[str, str] = json.loads(told.get(SOURCES_KEY, "{}"))
    return {
        node.name: sources[node.output[0]]
        for node in model.graph.node
        if node.name and node.output and node.output[0] in sources
    }


def _working(node: onnx.NodeProto, near: Callable[[onnx.NodeProto], onnx.NodeProto | None]) -> onnx.NodeProto | None:
    """The nearest node in one direction that does more than quantize."""
    other = near(node)
    while other is not None and other.op_type in QUANTIZING:
        other = near(other)
    return other


def _drop_defaults(model: onnx.ModelProto, newer: int, opset: int) -> None:
    """Take away attributes that `opset` does not know and that say what is the default in the `newer` one.

    The converter leaves them (seen with ONNX 1.23.2 and ``noop_with_empty_axes`` of reductions). Others stay, and the checker
    names them.
    """
    for node in model.graph.node:
        if node.domain not in ("", "ai.onnx"):
            continue
        known = onnx.defs.get_schema(node.op_type, opset, "").attributes
        later = onnx.defs.get_schema(node.op_type, newer, "").attributes
        defaults = {name: schema.default_value for name, schema in later.items() if schema.default_value.type}
        kept = [
            item
            for item in node.attribute
            if item.name in known
            or item.name not in defaults
            or onnx.helper.get_attribute_value(item) != onnx.helper.get_attribute_value(defaults[item.name])
        ]
        del node.attribute[:]
        node.attribute.extend(kept)


def _opset(model: onnx.ModelProto) -> int:
    return max((int(entry.version) for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200].rstrip(".")
