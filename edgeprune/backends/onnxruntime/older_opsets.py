"""An exported model in an older opset, for a runtime that reads no newer one.

ONNX's own converter has no way down for several operations whose older form says the same (Split, Pad, Resize). So what opset 18
changed for what the exporter writes is put back here, the older opset is stated, and the checker holds every node against its
definition in that opset; an operation, an attribute or an input that is not there is refused.

Source: the operators' change log, onnx.ai/onnx/operators (``docs/Changelog.md`` of onnx/onnx), versions 15 to 18.
"""

from __future__ import annotations

from typing import Any

import onnx
from onnx import helper, numpy_helper

from edgeprune.backends.onnxruntime.versions import OnnxVersions
from edgeprune.errors import ExportError

_AXES_WERE_ATTRIBUTES = frozenset(
    f"Reduce{name}" for name in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")
)
# What would pass the checker and mean something else: the default of RoiAlign's coordinate_transformation_mode.
_MEANS_ANOTHER_BEFORE = {"RoiAlign": 16}


def converted(model: onnx.ModelProto, versions: OnnxVersions) -> onnx.ModelProto:
    """The same model in an older opset and IR version, checked; names of tensors and nodes stay.

    Args:
        model: With static shapes, in opset 18; left as it is.
        versions: What it is to state.

    Raises:
        ExportError: An operation has no older form.
    """
    older = onnx.ModelProto()
    older.CopyFrom(model)
    if versions.opset < 18:
        _sizes_of_splits(older.graph, model, versions)
        _axes_as_attributes(older.graph)
    for entry in older.opset_import:
        if entry.domain in ("", "ai.onnx"):
            entry.version = versions.opset
    older.ir_version = versions.ir_version
    changed = [node.op_type for node in older.graph.node if versions.opset < _MEANS_ANOTHER_BEFORE.get(node.op_type, 0)]
    if changed:
        raise _refusal(versions, f"{changed[0]} means something else there")
    try:
        onnx.checker.check_model(older, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise _refusal(versions, str(error).strip().splitlines()[0][:200].rstrip(".")) from error
    return older


def _sizes_of_splits(graph: onnx.GraphProto, model: onnx.ModelProto, versions: OnnxVersions) -> None:
    """Say the sizes that a Split cuts into; before opset 18 it could not be told how many parts there are."""
    inferred = onnx.shape_inference.infer_shapes(model).graph
    shapes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*inferred.input, *inferred.value_info)
        if value.type.tensor_type.HasField("shape")
    }
    shapes |= {tensor.name: list(tensor.dims) for tensor in inferred.initializer}
    for number, node in enumerate(graph.node):
        if node.op_type == "Split" and "num_outputs" in (attributes := _attributes(node)):
            shape, axis, parts = shapes.get(node.input[0], []), attributes.get("axis", 0), attributes["num_outputs"]
            # 0 stands for an unknown size too.
            size = shape[axis] if -len(shape) <= axis < len(shape) else 0
            if size == 0:
                raise _refusal(versions, f"a Split of {node.input[0]} in {parts}, whose size is not known")
            each = -(-size // parts)
            name = f"edgeprune_split_{number}"
            sizes = [each] * (parts - 1) + [size - each * (parts - 1)]
            graph.initializer.append(helper.make_tensor(name, onnx.TensorProto.INT64, [parts], sizes))
            node.input.append(name)
            _forget(node, "num_outputs")


def _axes_as_attributes(graph: onnx.GraphProto) -> None:
    """Say the axes of reductions in an attribute, as before opset 18; those that are no constant stay, and are refused."""
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type not in _AXES_WERE_ATTRIBUTES:
            continue
        if len(node.input) == 2 and node.input[1] in constants:
            axes = numpy_helper.to_array(constants[node.input[1]]).tolist()
            if axes or not _attributes(node).get("noop_with_empty_axes", 0):
                del node.input[1]
                node.attribute.extend([helper.make_attribute("axes", axes)] if axes else [])
        if not _attributes(node).get("noop_with_empty_axes", 0) or "axes" in _attributes(node):
            _forget(node, "noop_with_empty_axes")
    read = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    unread = [tensor for tensor in graph.initializer if tensor.name not in read]
    for tensor in unread:
        graph.initializer.remove(tensor)


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def _forget(node: onnx.NodeProto, name: str) -> None:
    for attribute in [one for one in node.attribute if one.name == name]:
        node.attribute.remove(attribute)


def _refusal(versions: OnnxVersions, found: str) -> ExportError:
    return ExportError(
        f"the model must be expressible in opset {versions.opset}, which is the newest that the board's ONNX Runtime reads, "
        f"found: {found}.",
        hint="edgeprune device setup BOARD, which brings a newer ONNX Runtime",
    )
