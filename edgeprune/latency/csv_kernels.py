"""Kernels from the columns of a foreign table: what each kind of operation needs, under names of our own.

The kernels are those that lowering makes for ONNX Runtime's plain operators, so a table of them fits and predicts as any
other does. A further kind is one function and one row in `KINDS`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from edgeprune.spec import AttributeValue, Kernel

Fields = Mapping[str, Any]

EPSILON, MOMENTUM, SIXTH = 9.999999747378752e-06, 0.8999999761581421, 0.1666666716337204
"""What norms add to a variance, 1e-5, what a batch norm keeps of its statistics, 0.9, and the slope of a hard sigmoid, 1/6, as 32
bits hold them."""

_TRUE, _FALSE = frozenset({"1", "true", "yes", "y", "1.0"}), frozenset({"0", "false", "no", "n", "", "0.0"})


@dataclass(frozen=True)
class Kind:
    """One kind of operation.

    Attributes:
        make: Kernel from typed fields, batch and precision included.
        required: Field to its type.
        optional: Field to its type and what it is where nothing is said; None leaves the choice to `make`.
    """

    make: Callable[[Fields], Kernel]
    required: Mapping[str, str]
    optional: Mapping[str, tuple[str, Any]]

    def type_of(self, field: str) -> str:
        """How a field is read: a key of `READERS`."""
        return self.required[field] if field in self.required else self.optional[field][0]

    @property
    def fields(self) -> tuple[str, ...]:
        """All fields, those that must be given first."""
        return (*self.required, *self.optional)


def _count(text: str) -> int:
    number = float(text)
    if not (number == int(number) and 1 <= number < 2**31):
        raise ValueError("a whole number from 1")
    return int(number)


def _pair(text: str, least: int = 0) -> tuple[int, int]:
    parts = re.findall(r"[0-9]+(?:\.0+)?", text)
    sizes = [int(float(part)) for part in parts]
    if len(sizes) not in (1, 2) or min(sizes) < least or re.sub(r"[0-9.,x×()\[\]\s]", "", text):
        raise ValueError(f"a size from {least} such as 3 or 3x3")
    return (sizes[0], sizes[-1])


def _sizes(text: str) -> tuple[int, int]:
    return _pair(text, least=1)


def _counts(text: str) -> tuple[int, ...]:
    parts = re.split(r"\s*[+;x×]\s*|\s+", text.strip())
    try:
        return tuple(map(_count, parts))
    except ValueError as error:
        raise ValueError("a whole number from 1, or several such as 32+64") from error


def _flag(text: str) -> bool:
    if text.strip().lower() not in _TRUE | _FALSE:
        raise ValueError("0 or 1")
    return text.strip().lower() in _TRUE


def _name(text: str) -> str:
    return text.strip()


READERS: Mapping[str, Callable[[str], Any]] = {
    "count": _count,
    "counts": _counts,
    "sizes": _sizes,
    "padding": _pair,
    "flag": _flag,
    "name": _name,
}
"""Type of a field to what reads it from text; raises ValueError with what must be there."""


def _conv2d(fields: Fields) -> Kernel:
    height, width = fields["height"], fields["width"] or fields["height"]
    window, stride, dilation = fields["kernel_size"], fields["stride"], fields["dilation"]
    # Same padding, as nearly every network has it.
    padding = fields["padding"] or tuple((step * (size - 1)) // 2 for size, step in zip(window, dilation, strict=True))
    batch, cin, cout, groups = (fields[name] for name in ("batch", "in_channels", "out_channels", "groups"))
    if cin % groups or cout % groups:
        raise ValueError(f"groups must divide the channels, found {groups} groups of {cin} and {cout} channels")
    output = (batch, cout, *_slid((height, width), window, stride, dilation, padding))
    activation, residual = fields["activation"], fields["residual"]
    attributes: dict[str, AttributeValue] = {
        "activation": activation,
        "bias": fields["bias"],
        "dilation": dilation,
        "groups": groups,
        "kernel": window,
        "pads": (*padding, *padding),
        "residual": residual,
        "stride": stride,
    }
    image = (batch, cin, height, width)
    return Kernel(
        "FusedConv" if activation or residual else "Conv",
        "conv",
        (image, output) if residual else (image,),
        output,
        tuple(attributes.items()),
        fields["precision"],
    )


def _depthwise_conv2d(fields: Fields) -> Kernel:
    channels = fields["channels"]
    return _conv2d({**fields, "in_channels": channels, "out_channels": channels, "groups": channels})


def _linear(fields: Fields) -> Kernel:
    shapes = ((fields["batch"], fields["in_features"]),), (fields["batch"], fields["out_features"])
    return Kernel("Gemm", "gemm", *shapes, (("bias", fields["bias"]), ("trans_b", 1)), fields["precision"])


def _matmul(fields: Fields) -> Kernel:
    rows, inner, columns = (fields[name] for name in ("rows", "inner", "columns"))
    place = _place(fields)
    shapes = (((*place, rows, inner), (*place, inner, columns)), (*place, rows, columns))
    return Kernel("MatMul", "gemm", *shapes, precision=fields["precision"])


def _pool2d(op: str) -> Callable[[Fields], Kernel]:
    def make(fields: Fields) -> Kernel:
        height, width = fields["height"], fields["width"] or fields["height"]
        window, padding = fields["kernel_size"], fields["padding"] or (0, 0)
        stride = fields["stride"] or window
        output = _slid((height, width), window, stride, (1, 1), padding)
        attributes: dict[str, AttributeValue] = {
            **({"count_include_pad": 1} if op == "AveragePool" else {"dilation": (1, 1)}),
            "kernel": window,
            "pads": (*padding, *padding),
            "stride": stride,
        }
        place = (fields["batch"], fields["channels"])
        shapes = ((*place, height, width),), (*place, *output)
        return Kernel(op, "pool", *shapes, tuple(attributes.items()), fields["precision"])

    return make


def _elementwise(op: str, operands: int) -> Callable[[Fields], Kernel]:
    def make(fields: Fields) -> Kernel:
        shape = _image_shape(fields)
        return Kernel(op, "elementwise", (shape,) * operands, shape, precision=fields["precision"])

    return make


def _conv_transpose2d(fields: Fields) -> Kernel:
    batch, cin, cout, groups = (fields[name] for name in ("batch", "in_channels", "out_channels", "groups"))
    if cin % groups or cout % groups:
        raise ValueError(f"groups must divide the channels, found {groups} groups of {cin} and {cout} channels")
    image = (fields["height"], fields["width"] or fields["height"])
    window, stride, dilation, padding, more = (
        fields[name] for name in ("kernel_size", "stride", "dilation", "padding", "output_padding")
    )
    sizes = [
        (image[axis] - 1) * stride[axis] - 2 * padding[axis] + dilation[axis] * (window[axis] - 1) + more[axis] + 1
        for axis in (0, 1)
    ]
    if min(sizes) < 1:
        raise ValueError(f"the padding must leave some of the image, found {padding} of {window} on {image}")
    attributes: dict[str, AttributeValue] = {
        "dilation": dilation,
        "groups": groups,
        "kernel": window,
        "output_padding": more,
        "pads": (*padding, *padding),
        "stride": stride,
    }
    # Its weights are told as inputs, as lowering tells them.
    inputs = ((batch, cin, *image), (cin, cout // groups, *window), *(((cout,),) if fields["bias"] else ()))
    return Kernel(
        "ConvTranspose", "conv", inputs, (batch, cout, *sizes), tuple(attributes.items()), fields["precision"]
    )


def _silu(fields: Fields) -> Kernel:
    shape = _image_shape(fields)
    return Kernel("QuickGelu", "elementwise", (shape,), shape, (("alpha", 1.0),), fields["precision"])


def _hard_sigmoid(fields: Fields) -> Kernel:
    shape, attributes = _image_shape(fields), (("alpha", SIXTH), ("beta", 0.5))
    return Kernel("HardSigmoid", "elementwise", (shape,), shape, attributes, fields["precision"])


def _global_average_pool2d(fields: Fields) -> Kernel:
    # Exporters say it as a mean over the pixels.
    shape, attributes = _image_shape(fields), (("keepdims", 1), ("operand1", (-1, -2)))
    return Kernel("ReduceMean", "reduce", (shape,), (*shape[:2], 1, 1), attributes, fields["precision"])


def _batch_norm(fields: Fields) -> Kernel:
    shape, attributes = _image_shape(fields), (("epsilon", EPSILON), ("momentum", MOMENTUM))
    inputs = (shape, *((shape[1],),) * 4)
    return Kernel("BatchNormalization", "elementwise", inputs, shape, attributes, fields["precision"])


def _instance_norm(fields: Fields) -> Kernel:
    shape = _image_shape(fields)
    inputs = (shape, *((shape[1],),) * 2)
    return Kernel("InstanceNormalization", "norm", inputs, shape, (("epsilon", EPSILON),), fields["precision"])


def _layer_norm(fields: Fields) -> Kernel:
    shape = (fields["batch"], fields["tokens"], fields["channels"])
    inputs = (shape, *((shape[2],),) * (2 if fields["bias"] else 1))
    attributes = (("axis", -1), ("epsilon", EPSILON), ("stash_type", 1))
    return Kernel("LayerNormalization", "norm", inputs, shape, attributes, fields["precision"])


def _softmax(fields: Fields) -> Kernel:
    shape = (*_place(fields), fields["rows"], fields["columns"])
    return Kernel("Softmax", "softmax", (shape,), shape, (("axis", -1),), fields["precision"])


def _concat(fields: Fields) -> Kernel:
    parts = (*fields["channels"], *fields["more_channels"])
    if len(parts) < 2:
        raise ValueError(f"a concatenation must have the channels of at least two parts, found {parts[0]} alone")
    batch, image = fields["batch"], (fields["height"], fields["width"] or fields["height"])
    inputs, output = tuple((batch, channels, *image) for channels in parts), (batch, sum(parts), *image)
    return Kernel("Concat", "concat", inputs, output, (("axis", 1),), fields["precision"])


def _split(fields: Fields) -> Kernel:
    batch, channels, *image = shape = _image_shape(fields)
    parts = fields["parts"]
    if channels % parts:
        raise ValueError(f"the parts of a split must be equal, found {parts} of {channels} channels")
    attributes = (("axis", 1), ("num_outputs", parts))
    return Kernel("Split", "concat", (shape,), (batch, channels // parts, *image), attributes, fields["precision"])


def _gather(fields: Fields) -> Kernel:
    indices, channels = (fields["batch"], fields["tokens"]), fields["channels"]
    inputs = ((fields["entries"], channels), indices)
    return Kernel("Gather", "concat", inputs, (*indices, channels), (("axis", 0),), fields["precision"])


def _transpose(fields: Fields) -> Kernel:
    batch, rows, columns = (fields[name] for name in ("batch", "rows", "columns"))
    shapes = ((batch, rows, columns),), (batch, columns, rows)
    return Kernel("Transpose", "layout", *shapes, (("perm", (0, 2, 1)),), fields["precision"])


def _image_shape(fields: Fields) -> tuple[int, int, int, int]:
    return (fields["batch"], fields["channels"], fields["height"], fields["width"] or fields["height"])


def _place(fields: Fields) -> tuple[int, ...]:
    """Leading axes of products and rows: the batch, and the heads where there are any."""
    return (fields["batch"],) if fields["heads"] is None else (fields["batch"], fields["heads"])


def _slid(
    image: tuple[int, int],
    window: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
    padding: tuple[int, int],
) -> tuple[int, int]:
    sizes = [
        (image[axis] + 2 * padding[axis] - dilation[axis] * (window[axis] - 1) - 1) // stride[axis] + 1
        for axis in (0, 1)
    ]
    if min(sizes) < 1:
        raise ValueError(f"the window must fit into the padded image, found {window} on {image}")
    return (sizes[0], sizes[1])


_ACTIVATIONS = {"relu": "Relu", "sigmoid": "Sigmoid", "tanh": "Tanh"}
_ALL: Mapping[str, tuple[str, Any]] = {"batch": ("count", 1), "precision": ("name", "fp32")}
_IMAGE: Mapping[str, tuple[str, Any]] = {"width": ("count", None), **_ALL}
_CONV: Mapping[str, tuple[str, Any]] = {
    "stride": ("sizes", (1, 1)),
    "padding": ("padding", None),
    "dilation": ("sizes", (1, 1)),
    "activation": ("name", ""),
    "residual": ("flag", False),
    "bias": ("flag", True),
    **_IMAGE,
}
_POOL: Mapping[str, tuple[str, Any]] = {"stride": ("sizes", None), "padding": ("padding", None), **_IMAGE}
_HEADS: Mapping[str, tuple[str, Any]] = {"heads": ("count", None), **_ALL}
_CHANNELS = {"channels": "count", "height": "count"}
_TOKENS = {"tokens": "count", "channels": "count"}
_WINDOW = {**_CHANNELS, "kernel_size": "sizes"}

KINDS: Mapping[str, Kind] = {
    "conv2d": Kind(
        _conv2d,
        {"in_channels": "count", "out_channels": "count", "height": "count", "kernel_size": "sizes"},
        {**_CONV, "groups": ("count", 1)},
    ),
    "depthwise_conv2d": Kind(_depthwise_conv2d, _WINDOW, _CONV),
    "conv_transpose2d": Kind(
        _conv_transpose2d,
        {"in_channels": "count", "out_channels": "count", "height": "count", "kernel_size": "sizes"},
        {
            **{name: _CONV[name] for name in ("stride", "dilation", "bias")},
            "padding": ("padding", (0, 0)),
            "output_padding": ("padding", (0, 0)),
            "groups": ("count", 1),
            **_IMAGE,
        },
    ),
    "linear": Kind(_linear, {"in_features": "count", "out_features": "count"}, {"bias": ("flag", True), **_ALL}),
    "matmul": Kind(_matmul, {"rows": "count", "inner": "count", "columns": "count"}, _HEADS),
    "max_pool2d": Kind(_pool2d("MaxPool"), _WINDOW, _POOL),
    "average_pool2d": Kind(_pool2d("AveragePool"), _WINDOW, _POOL),
    "global_average_pool2d": Kind(_global_average_pool2d, _CHANNELS, _IMAGE),
    **{name: Kind(_elementwise(op, 1), _CHANNELS, _IMAGE) for name, op in _ACTIVATIONS.items()},
    "silu": Kind(_silu, _CHANNELS, _IMAGE),
    "hard_sigmoid": Kind(_hard_sigmoid, _CHANNELS, _IMAGE),
    "add": Kind(_elementwise("Add", 2), _CHANNELS, _IMAGE),
    "mul": Kind(_elementwise("Mul", 2), _CHANNELS, _IMAGE),
    "batch_norm": Kind(_batch_norm, _CHANNELS, _IMAGE),
    "instance_norm": Kind(_instance_norm, _CHANNELS, _IMAGE),
    "layer_norm": Kind(_layer_norm, _TOKENS, {"bias": ("flag", True), **_ALL}),
    "softmax": Kind(_softmax, {"rows": "count", "columns": "count"}, _HEADS),
    "concat": Kind(_concat, {"channels": "counts", "height": "count"}, {"more_channels": ("counts", ()), **_IMAGE}),
    "split": Kind(_split, {**_CHANNELS, "parts": "count"}, _IMAGE),
    "gather": Kind(_gather, {"entries": "count", **_TOKENS}, _ALL),
    "transpose": Kind(_transpose, {"rows": "count", "columns": "count"}, _ALL),
}
"""Every kind of operation that `LatencyTable.from_csv` reads. ``height`` and ``width`` are those of the input."""
