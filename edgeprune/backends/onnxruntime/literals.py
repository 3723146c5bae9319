"""Constants of an ONNX model as initializers, for importers that fold nothing themselves."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper


def with_literals(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with its ``Constant`` and ``ConstantOfShape`` nodes as initializers."""
    values: dict[str, Any] = {item.name: None for item in model.graph.initializer}
    kept = []
    for node in model.graph.node:
        attributes = {item.name: item for item in node.attribute}
        if node.op_type == "Constant" and "value" in attributes:
            values[node.output[0]] = numpy_helper.to_array(attributes["value"].t)
        elif node.op_type == "ConstantOfShape" and values.get(node.input[0]) is not None:
            fill = numpy_helper.to_array(attributes["value"].t)
            values[node.output[0]] = np.full(tuple(values[node.input[0]]), fill[0], fill.dtype)
        else:
            kept.append(node)
    result = onnx.ModelProto()
    result.CopyFrom(model)
    del result.graph.node[:]
    result.graph.node.extend(kept)
    read = {name for node in kept for name in node.input}
    result.graph.initializer.extend(
        numpy_helper.from_array(value, name) for name, value in values.items() if value is not None and name in read
    )
    return result
