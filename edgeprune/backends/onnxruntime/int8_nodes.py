"""ONNX Runtime's int8 operations as `Operator` and `Kernel`, and back to nodes.

What they read besides data (scales, zero points, weights and their scales) follows from the shapes and the processor's form
of the numbers, so none of it is in a kernel. Scales and zero points are of the same types as in an engine, with meaningless
values: the time does not depend on them.

Layout: the channels-last operations (``channels_last``, ``NhwcMaxPool``) have their shapes written channels first, as those
of every other convolution and pool. All others have their shapes as the tensors lie in memory.

Source: operands of each operation from docs/ContribOperators.md of ONNX Runtime and the operator definitions of ONNX.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto, helper

from edgeprune.backends._base import Operator
from edgeprune.backends.onnxruntime import operators
from edgeprune.backends.onnxruntime.int8_numbers import Int8Numbers
from edgeprune.backends.onnxruntime.operators import CONV_DEFAULTS, base, family, filled, onnx_domain, op_name
from edgeprune.spec import AttributeValue, Kernel

Shape = tuple[int, ...]

# D data, S its scale, Z its zero point; W weights (or data), V their scales, U their zero points; B an int32 bias, F a float one.
_OPERANDS = {
    "QuantizeLinear": "DSZ",
    "DequantizeLinear": "DSZ",
    "QLinearConv": "DSZWVUSZB",
    "QGemm": "DSZWVUBSZ",
    "QLinearMatMul": "DSZWVUSZ",
    "MatMulIntegerToFloat": "DWSVZUF",
    "QLinearAdd": "DSZDSZSZ",
    "QLinearMul": "DSZDSZSZ",
    **dict.fromkeys(
        ("QLinearSigmoid", "QLinearLeakyRelu", "QLinearSoftmax", "QLinearAveragePool", "QLinearGlobalAveragePool"),
        "DSZSZ",
    ),
}
_CONCAT = "QLinearConcat"
_PRODUCTS = frozenset({"QGemm", "QLinearMatMul", "MatMulIntegerToFloat"})
_ALWAYS_LAST = frozenset({"NhwcMaxPool"})
_BY_TENSOR = ("QuantizeLinear", "DequantizeLinear")
_ZERO_POINT = 3
"""Not that of a rectifier's output, which the runtime would take for one that can be left out."""
_SCALE = 0.02


def is_int8(op: str) -> bool:
    """Whether an operation is one of quantized numbers, whatever the types of its tensors."""
    return base(op) in _OPERANDS or base(op) == _CONCAT


def channels_last(operator: Operator | Kernel) -> bool:
    """Whether an operation on images wants channels last."""
    if base(operator.op) in _ALWAYS_LAST:
        return True
    return is_int8(operator.op) and bool(dict(operator.attributes).get("channels_last"))


def first(shape: Shape) -> Shape:
    """A channels-last shape written channels first."""
    return (shape[0], shape[-1], *shape[1:-1])


def last(shape: Shape) -> Shape:
    """A channels-first shape as it lies in memory where channels come last."""
    return (shape[0], *shape[2:], shape[1])


def read(node: NodeProto, constants: Mapping[str, TensorProto]) -> Operator:
    """One node as an operator; see `operators.read`."""
    op = op_name(node.domain, node.op_type)
    if not is_int8(op):
        return operators.read(node, constants)
    attributes = operators.attributes_of(node)
    if base(op) in _BY_TENSOR and not constants[node.input[1]].dims:
        attributes.pop("axis", None)
    if base(op) == "DequantizeLinear" and (held := constants.get(node.input[0])) is not None:
        # Weights of an operation that has no form in int8: they are read as integers, each time.
        attributes["constant"] = helper.tensor_dtype_to_np_dtype(held.data_type).name
    inputs, weight = [], ""
    for role, name in zip(_roles(op, len(node.input)), node.input, strict=False):
        if role == "D" or (role == "W" and name not in constants):
            inputs.append(name)
        elif role == "W":
            weight = name
        elif role in "BF":
            attributes["bias"] = bool(name)
    if base(op) == "QLinearConv":
        attributes = {**CONV_DEFAULTS, "bias": False, "residual": False, **attributes}
        attributes.setdefault("kernel", tuple(constants[weight].dims[2:]))
    elif base(op) in _PRODUCTS and weight:
        attributes.setdefault("bias", False)
    if base(op) == "QGemm":
        attributes["dequantized"] = len(node.input) < len(_OPERANDS["QGemm"])
    return operators.operator_of(node, op, inputs, attributes)


def _roles(op: str, count: int) -> str:
    return "SZ" + "DSZ" * (count // 3) if base(op) == _CONCAT else _OPERANDS[base(op)]


def input_dtypes(kernel: Kernel, numbers: Int8Numbers) -> list[str]:
    """NumPy names of the types of a kernel's inputs."""
    constant = kernel.attribute("constant")
    if constant is not None:
        return [str(constant)]
    if base(kernel.op) == "QuantizeLinear" or kernel.precision != "int8":
        return operators.input_dtypes(kernel)
    return [numbers.dtype if name == "float32" else name for name in operators.input_dtypes(kernel)]


def output_dtype(kernel: Kernel, numbers: Int8Numbers) -> str:
    """NumPy name of the type of a kernel's outputs."""
    floating = base(kernel.op) in ("DequantizeLinear", "MatMulIntegerToFloat") or kernel.attribute("dequantized", False)
    found = operators.output_dtype(kernel)
    return numbers.dtype if kernel.precision == "int8" and not floating and found == "float32" else found


def write(
    kernel: Kernel,
    inputs: Sequence[str],
    outputs: Sequence[str],
    prefix: str,
    numbers: Int8Numbers,
    factor: float = 1.0,
) -> list[NodeProto]:
    """The nodes that run one kernel; see `operators.write`.

    Args:
        kernel: What to run.
        inputs: Names of the tensors that it reads, as many as `kernel.inputs`.
        outputs: Names of the tensors that it writes.
        prefix: Unique within the graph.
        numbers: Form of the numbers on the processor.
        factor: Of scales, close to 1.
    """
    if not is_int8(kernel.op):
        return operators.write(kernel, list(inputs), list(outputs), prefix, factor)
    nodes: list[NodeProto] = []
    attributes = dict(kernel.attributes)
    constant, axis = str(attributes.pop("constant", "")), attributes.get("axis")
    bias, floating = bool(attributes.pop("bias", False)), bool(attributes.pop("dequantized", False))
    if base(kernel.op) == "QLinearConv":
        attributes.pop("residual", None)
    left, names = list(inputs), []
    weighted = base(kernel.op) == "QLinearConv" or (base(kernel.op) in _PRODUCTS and len(kernel.inputs) == 1)
    shape = _weight_shape(kernel) if weighted else ()
    columns = _columns(kernel)
    by_axis = () if axis is None else (kernel.inputs[0][int(axis)],)  # type: ignore[arg-type]
    for place, role in enumerate(_roles(kernel.op, 2 + 3 * len(left))):
        name = f"{prefix}_{place}"
        if role == "D" or (role == "W" and not weighted):
            names.append(left.pop(0))
            continue
        if (role in "BF" and not bias) or (floating and place >= len(_OPERANDS["QGemm"]) - 2):
            names.append("")
            continue
        names.append(name)
        if role == "S" and constant:
            nodes += filled(name, by_axis, _SCALE * factor)
        elif role == "S" or (role == "V" and not weighted):
            nodes.append(_scalar(name, "float32", _SCALE * factor * (1 + place / 100)))
        elif role == "Z" and constant:
            nodes += filled(name, by_axis, 0, constant)
        elif role == "Z" or (role == "U" and not weighted):
            nodes.append(_scalar(name, numbers.dtype, _ZERO_POINT))
        elif role == "W":
            nodes += filled(name, shape, 1, "int8")
        elif role == "V":
            nodes += filled(name, (columns,), factor / (int(np.prod(shape)) // columns or 1))
        elif role == "U":
            nodes += filled(name, (columns,), 0, "int8")
        else:
            nodes += filled(name, (columns,), 1, "int32" if role == "B" else "float32")
    while names and not names[-1]:
        names.pop()
    made: dict[str, Any] = operators.onnx_attributes(attributes)
    nodes.append(
        helper.make_node(base(kernel.op), names, list(outputs), name=prefix, domain=onnx_domain(kernel.op), **made)
    )
    return nodes


def _columns(kernel: Kernel) -> int:
    return kernel.output[1] if family(kernel.op) == "conv" else kernel.output[-1]


def _weight_shape(kernel: Kernel) -> Shape:
    attributes: dict[str, AttributeValue] = dict(kernel.attributes)
    if base(kernel.op) == "QLinearConv":
        groups, window = int(attributes["groups"]), attributes["kernel"]  # type: ignore[arg-type]
        return (kernel.output[1], kernel.inputs[0][1] // groups, *window)  # type: ignore[misc]
    rows, columns = kernel.inputs[0][-2 if attributes.get("transA") else -1], kernel.output[-1]
    return (columns, rows) if attributes.get("trans_b") else (rows, columns)


def _scalar(name: str, dtype: str, value: float) -> NodeProto:
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    return helper.make_node("Constant", [], [name], value=helper.make_tensor("value", kind, [], [value]))
