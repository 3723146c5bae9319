"""ONNX Runtime's nodes as `Operator` and back: which attributes decide the time a node takes, and how they are written.

Names: an operation is its name without the domain (``Conv``, ``FusedConv``) unless another domain has one of the same
name; then the last part of the domain stands in front (``nchwc.Conv``, ``microsoft.Gelu``). Attributes keep the values of
ONNX under the names of the field (``strides`` is ``stride``); those at their default are left out, so that equal work has
equal text. Small constant operands (axes, clip bounds) are attributes ``operand<i>``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from edgeprune.backends._base import Operator, OperatorGraph
from edgeprune.backends.onnxruntime.pieces import moved_slice, split_settings, told_split, written_split
from edgeprune.spec import AttributeValue, Kernel

_MICROSOFT = "com.microsoft"

# A view moves no data: ONNX Runtime's memory planner lets its output share the input's buffer, so it is no kernel.
VIEWS = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Dropout"})

IN_PLACE = frozenset(
    {
        *(
            "Add",
            "Sub",
            "Mul",
            "Div",
            "Sum",
            "Relu",
            "LeakyRelu",
            "Elu",
            "Selu",
            "Sigmoid",
            "HardSigmoid",
            "Tanh",
            "Clip",
        ),
        *("Erf", "Abs", "Neg", "Sqrt", "Exp", "Log", "Softplus", "Softsign"),
    }
)
"""Those of the element-wise operations whose kernels ONNX Runtime declares with ``MayInplace``
(onnxruntime/core/providers/cpu/math/element_wise_ops.cc, .../activation/activations.cc, .../math/clip.cc)."""

_FAMILIES = {
    "conv": {"Conv", "FusedConv", "ConvTranspose", "QLinearConv"},
    "gemm": {"Gemm", "FusedGemm", "MatMul", "FusedMatMul", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat"},
    "pool": {
        *("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"),
        *("NhwcMaxPool", "QLinearAveragePool", "QLinearGlobalAveragePool"),
    },
    "reduce": {"ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL2"},
    "layout": {"ReorderInput", "ReorderOutput", "Transpose"},
    "concat": {"Concat", "Split", "Slice", "Gather", "Pad", "Expand", "Tile", "QLinearConcat"},
    "norm": {
        *("LayerNormalization", "SkipLayerNormalization", "SimplifiedLayerNormalization", "LpNormalization"),
        *("InstanceNormalization", "GroupNorm", "GroupNormalization"),
    },
    "softmax": {"Softmax", "LogSoftmax", "QLinearSoftmax"},
    "elementwise": {
        *("Add", "Sub", "Mul", "Div", "Max", "Min", "Sum", "Pow", "Sqrt", "Exp", "Neg", "Abs", "Where"),
        *("Relu", "LeakyRelu", "PRelu", "Elu", "Selu", "Celu", "Clip", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh"),
        *("Softplus", "Erf", "Gelu", "QuickGelu", "FastGelu", "BiasGelu", "Mish", "BatchNormalization"),
        *("Softsign", "Sin", "Cos", "Log", "Floor", "Reciprocal"),
        *("Equal", "Less", "Greater", "And", "Or", "Not", "Cast"),
        *("QuantizeLinear", "DequantizeLinear", "QLinearAdd", "QLinearMul", "QLinearSigmoid", "QLinearLeakyRelu"),
    },
}
FAMILY = {op: family for family, ops in _FAMILIES.items() for op in ops}

# Operations whose second and third operands are weights that follow from the other shapes.
WEIGHTED = frozenset({"Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul"})
_BIASED = WEIGHTED - {"MatMul", "FusedMatMul"}

_RENAMED = {
    "kernel_shape": "kernel",
    "strides": "stride",
    "dilations": "dilation",
    "group": "groups",
    "transB": "trans_b",
}
_ONNX_NAME = {ours: theirs for theirs, ours in _RENAMED.items()}
_DEFAULTS: dict[str, Any] = {
    "allowzero": 0,
    "antialias": 0,
    "auto_pad": "NOTSET",
    "beta": 1.0,
    "ceil_mode": 0,
    "channels_last": 0,
    "cubic_coeff_a": -0.75,
    "exclude_outside": 0,
    "extrapolation_value": 0.0,
    "keep_aspect_ratio_policy": "stretch",
    "noop_with_empty_axes": 0,
    "storage_order": 0,
    "training_mode": 0,
    "transA": 0,
}
# `channels` of a ReorderOutput repeats its output shape.
_REDUNDANT = frozenset({"channels"})
# The `alpha` of a matrix product scales its result, whatever it is: an attention whose heads lost dimensions has another
# one and takes the same time. That of an activation says which function it is.
_KEEPS_ALPHA = frozenset({"LeakyRelu", "Elu", "QuickGelu", "HardSigmoid", "Selu", "Celu"})
CONV_DEFAULTS: dict[str, AttributeValue] = {
    "stride": (1, 1),
    "pads": (0, 0, 0, 0),
    "dilation": (1, 1),
    "groups": 1,
    "activation": "",
}
_SMALL = 16


def op_name(domain: str, op_type: str) -> str:
    """Our name of an ONNX operation."""
    if domain in {"", "ai.onnx"} or (domain == _MICROSOFT and not onnx.defs.has(op_type)):
        return op_type
    return f"{domain.rpartition('.')[2]}.{op_type}"


def onnx_domain(op: str) -> str:
    """The ONNX domain of one of our names."""
    prefix = op.rpartition(".")[0]
    if prefix:
        return _MICROSOFT if prefix == "microsoft" else f"{_MICROSOFT}.{prefix}"
    return "" if onnx.defs.has(op) else _MICROSOFT


def base(op: str) -> str:
    """The operation without its domain: ``Conv`` of ``nchwc.Conv``."""
    return op.rpartition(".")[2]


def family(op: str) -> str:
    """The regression family of an operation."""
    return FAMILY.get(base(op), "other")


_INDICES = {"Gather": 1, "GatherElements": 1, "GatherND": 1}
_CONDITIONS = {"Where": (0,), "And": (0, 1), "Or": (0, 1), "Not": (0,)}
_DECISIONS = frozenset({"Equal", "Less", "Greater", "And", "Or", "Not"})


def input_dtypes(operator: Operator | Kernel) -> list[str]:
    """NumPy names of the types of an operation's inputs, operands that are attributes left out."""
    op = base(operator.op)
    taken = {int(name[7:]) for name, _ in operator.attributes if name.startswith("operand")}
    # Inputs that are left out are not told apart here: no operation has one in front of one of another type.
    places = [place for place in range(len(operator.inputs) + len(taken)) if place not in taken][: len(operator.inputs)]
    return [
        "int64" if _INDICES.get(op) == place else "bool" if place in _CONDITIONS.get(op, ()) else "float32"
        for place in places
    ]


def output_dtype(operator: Operator | Kernel) -> str:
    """NumPy name of the type of an operation's outputs."""
    op = base(operator.op)
    if op == "Cast":
        return str(helper.tensor_dtype_to_np_dtype(int(dict(operator.attributes)["to"])))  # type: ignore[arg-type]
    return "bool" if op in _DECISIONS else "float32"


def read(node: NodeProto, constants: Mapping[str, TensorProto]) -> Operator:
    """One node as an operator.

    Args:
        node: A node of a graph that ONNX Runtime has written.
        constants: Name to value of the graph's initializers.
    """
    op = op_name(node.domain, node.op_type)
    attributes = attributes_of(node)
    weighted = base(op) in WEIGHTED and len(node.input) > 1 and node.input[1] in constants
    inputs: list[str] = []
    if weighted:
        inputs.append(node.input[0])
        if base(op) in _BIASED:
            attributes["bias"] = len(node.input) > 2 and node.input[2] != ""
        if base(op) in {"Conv", "FusedConv"}:
            attributes = {**CONV_DEFAULTS, **attributes, "residual": len(node.input) > 3 and node.input[3] != ""}
            attributes.setdefault("kernel", tuple(constants[node.input[1]].dims[2:]))
            inputs += [name for name in node.input[3:4] if name]
    else:
        for position, name in enumerate(node.input):
            value = constants.get(name)
            if not name:
                continue
            if value is not None and int(np.prod(value.dims)) <= _largest_setting(op, len(value.dims)):
                array = numpy_helper.to_array(value)
                attributes[f"operand{position}"] = tuple(array.tolist()) if array.ndim else array.item()
            else:
                inputs.append(name)
    if op == "Split":
        attributes = told_split(attributes)
    if op == "FusedMatMul" and not any(attributes.values()):
        # The scale is left of it, and the same code multiplies (onnxruntime/contrib_ops/cpu/fused_matmul.cc).
        op, attributes = "MatMul", {}
    return operator_of(node, op, inputs, attributes)


def operator_of(node: NodeProto, op: str, inputs: Sequence[str], attributes: Mapping[str, AttributeValue]) -> Operator:
    """A node as an operator of which operation, data and settings are known."""
    return Operator(
        name=node.name or node.output[0],
        op=op,
        inputs=tuple(inputs),
        outputs=tuple(name for name in node.output if name),
        attributes=tuple(sorted(attributes.items())),
    )


def _largest_setting(op: str, rank: int) -> int:
    """Elements of a constant that says how to compute; what has more is data. A vector per channel is data at any width."""
    if family(op) == "norm" or op == "Concat":
        return 0
    if family(op) in ("elementwise", "conv"):
        return 1 if rank < 2 else 0
    return _SMALL


def attributes_of(node: NodeProto) -> dict[str, AttributeValue]:
    """The attributes of a node that decide its time, by the names of the field."""
    found: dict[str, AttributeValue] = {}
    for attribute in node.attribute:
        value = helper.get_attribute_value(attribute)
        if isinstance(value, bytes):
            value = value.decode()
        if isinstance(value, (list, tuple)):
            value = tuple(item.decode() if isinstance(item, bytes) else item for item in value)
        if attribute.name in _REDUNDANT or isinstance(value, (onnx.TensorProto, onnx.GraphProto)):
            continue
        if attribute.name == "alpha" and node.op_type not in _KEEPS_ALPHA:
            continue
        if attribute.name != "alpha" and _DEFAULTS.get(attribute.name) == value:
            continue
        found[_RENAMED.get(attribute.name, attribute.name)] = value
    return found


def resized(
    operator: Operator, graph: OperatorGraph, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, AttributeValue]:
    """The attributes of an operator at other shapes: groups, and the sizes that are written out as constants.

    Args:
        operator: One of `graph`.
        graph: The dense graph.
        shapes: Tensor name to shape of the candidate.
    """
    attributes = dict(operator.attributes)
    source = shapes[operator.inputs[0]] if operator.inputs else ()
    target = shapes[operator.outputs[0]]
    if "groups" in attributes:
        # A depthwise convolution has as many groups as channels, any other keeps its own.
        dense = graph.shapes[operator.inputs[0]][1]
        attributes["groups"] = source[1] if attributes["groups"] == dense > 1 else attributes["groups"]
    if operator.op in {"Reshape", "Expand"} and "operand1" in attributes:
        attributes["operand1"] = target
        attributes.pop("allowzero", None)
    if operator.op == "Resize" and isinstance(sizes := attributes.get("operand3"), tuple) and len(sizes) == len(target):
        attributes["operand3"] = target
    if operator.op == "Split":
        axis = int(attributes.get("axis", 0))  # type: ignore[arg-type]
        attributes = split_settings(attributes, [shapes[name][axis] for name in operator.outputs])
    if operator.op == "Slice":
        attributes |= moved_slice(operator, graph, shapes)
    if operator.op == "Pad" and isinstance(pads := attributes.get("operand1"), tuple) and len(pads) == 2 * len(target):
        # Where the number of padded channels changed, all of them go behind: it takes the same time.
        rank = len(target)
        same = [target[axis] - source[axis] == pads[axis] + pads[axis + rank] for axis in range(rank)]
        begin = [pads[axis] if same[axis] else 0 for axis in range(rank)]
        attributes["operand1"] = (*begin, *(target[axis] - source[axis] - begin[axis] for axis in range(rank)))
    return attributes


def weight_shapes(kernel: Kernel) -> list[tuple[int, ...]]:
    """Shapes of the weight and the bias (where there is one) of a weighted kernel, as its operation wants them.

    Source: blocked filters are padded to whole blocks in the output channels, and in the input channels too unless the
    input stays in NCHW (fewer channels than a block): `TransformConv` in
    onnxruntime/core/optimizer/nchwc_transformer.cc; the shapes load in ONNX Runtime 1.31.1.
    """
    attributes = dict(kernel.attributes)
    if base(kernel.op) in {"Conv", "FusedConv"}:
        groups = int(attributes["groups"])  # type: ignore[arg-type]
        out_channels = kernel.output[1]
        window: tuple[int, ...] = attributes["kernel"]  # type: ignore[assignment]
        shapes = [(out_channels, kernel.inputs[0][1] // groups, *window)]
        return [*shapes, (out_channels,)] if attributes.get("bias") else shapes
    rows, columns = kernel.inputs[0][-2 if attributes.get("transA") else -1], kernel.output[-1]
    weight = (columns, rows) if attributes.get("trans_b") else (rows, columns)
    return [weight, (columns,)] if attributes.get("bias") else [weight]


def write(kernel: Kernel, inputs: list[str], outputs: list[str], prefix: str, weights: float = 1.0) -> list[NodeProto]:
    """The nodes that run one kernel: its own, and the constants that it reads, filled by ``ConstantOfShape``.

    ONNX Runtime folds those into real initializers when it loads the model, so the file stays below a kilobyte while the
    kernel sees the same packed weights as in a whole network. Weights are 1 / fan-in: activations stay near one, far from
    the denormal numbers that would slow a CPU down.

    Args:
        kernel: What to run.
        inputs: Names of the tensors that it reads, as many as `kernel.inputs`.
        outputs: Names of the tensors that it writes.
        prefix: Unique within the graph.
        weights: Factor of the weights, close to 1.
    """
    nodes: list[NodeProto] = []
    attributes = written_split(kernel) if kernel.op == "Split" else dict(kernel.attributes)
    bias, residual = attributes.pop("bias", False), attributes.pop("residual", False)
    names = list(inputs)
    if base(kernel.op) in WEIGHTED and len(kernel.inputs) <= 2 and not _both_data(kernel):
        shapes = weight_shapes(kernel)
        fan_in = int(np.prod(shapes[0])) // kernel.output[1 if len(kernel.output) > 1 else 0] or 1
        for role, shape in zip(("weight", "bias"), shapes, strict=False):
            nodes += filled(f"{prefix}_{role}", shape, weights / fan_in)
        names = [inputs[0], f"{prefix}_weight", *([f"{prefix}_bias"] if bias else [])]
        if residual:
            names = [*names, *([] if bias else [""]), inputs[1]]
    operands = {int(name[7:]): value for name, value in attributes.items() if name.startswith("operand")}
    for position, value in sorted(operands.items()):
        name = f"{prefix}_operand{position}"
        nodes.append(_literal(name, value))
        names += [""] * (position - len(names))
        names.insert(position, name)
    made = onnx_attributes(attributes)
    if kernel.op == "nchwc.ReorderOutput":
        made["channels"] = kernel.output[-1 if attributes.get("channels_last") else 1]
    domain = onnx_domain(kernel.op)
    nodes.append(helper.make_node(base(kernel.op), names, outputs, name=prefix, domain=domain, **made))
    return nodes


def onnx_attributes(attributes: Mapping[str, AttributeValue]) -> dict[str, Any]:
    """Attributes by the names of ONNX; constant operands and an activation that is none are left out."""
    return {
        _ONNX_NAME.get(name, name): value
        for name, value in attributes.items()
        if not name.startswith("operand") and not (name == "activation" and not value)
    }


def _both_data(kernel: Kernel) -> bool:
    return family(kernel.op) == "gemm" and len(kernel.inputs) > 1


def filled(name: str, shape: tuple[int, ...], value: float, dtype: str = "float32") -> list[NodeProto]:
    """Nodes that make a tensor of one value."""
    size = helper.make_tensor("shape", TensorProto.INT64, [len(shape)], shape)
    fill = helper.make_tensor("value", helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), [1], [value])
    return [
        helper.make_node("Constant", [], [f"{name}_shape"], value=size),
        helper.make_node("ConstantOfShape", [f"{name}_shape"], [name], value=fill),
    ]


def _literal(name: str, value: AttributeValue) -> NodeProto:
    values: list[Any] = list(value) if isinstance(value, tuple) else [value]
    kind = TensorProto.INT64 if all(isinstance(item, int) for item in values) else TensorProto.FLOAT
    dims = [len(values)] if isinstance(value, tuple) else []
    return helper.make_node("Constant", [], [name], value=helper.make_tensor("value", kind, dims, values))
