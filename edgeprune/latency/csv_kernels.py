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


def _flag(text: str) -> bool:
    if text.strip().lower() not in _TRUE | _FALSE:
        raise ValueError("0 or 1")
    return text.strip().lower() in _TRUE


def _name(text: str) -> str:
    return text.strip()


READERS: Mapping[str, Callable[[str], Any]] = {
    "count": _count,
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
    batch, rows, inner, columns = (fields[name] for name in ("batch", "rows", "inner", "columns"))
    shapes = (((batch, rows, inner), (batch, inner, columns)), (batch, rows, columns))
    return Kernel("MatMul", "gemm", *shapes, precision=fields["precision"])


def _pool2d(op: str) -> Callable[[Fields], Kernel]:
    def make(fields: Fields) -> Kernel:
        height, width = fields["height"], fields["width"] or fields["height"]
        window, padding = fields["kernel_size"], fields["padding"] or (0, 0)
        stride = fields["stride"] or window
        output = _slid((height, width), window, stride, (1, 1), padding)
        attributes = {"dilation": (1, 1), "kernel": window, "pads": (*padding, *padding), "stride": stride}
        place = (fields["batch"], fields["channels"])
        shapes = ((*place, height, width),), (*place, *output)
        return Kernel(op, "pool", *shapes, tuple(attributes.items()), fields["precision"])

    return make


def _elementwise(op: str, operands: int) -> Callable[[Fields], Kernel]:
    def make(fields: Fields) -> Kernel:
        height = fields["height"]
        shape = (fields["batch"], fields["channels"], height, fields["width"] or height)
        return Kernel(op, "elementwise", (shape,) * operands, shape, precision=fields["precision"])

    return make


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
_CHANNELS = {"channels": "count", "height": "count"}
_WINDOW = {**_CHANNELS, "kernel_size": "sizes"}

KINDS: Mapping[str, Kind] = {
    "conv2d": Kind(
        _conv2d,
        {"in_channels": "count", "out_channels": "count", "height": "count", "kernel_size": "sizes"},
        {**_CONV, "groups": ("count", 1)},
    ),
    "depthwise_conv2d": Kind(_depthwise_conv2d, _WINDOW, _CONV),
    "linear": Kind(_linear, {"in_features": "count", "out_features": "count"}, {"bias": ("flag", True), **_ALL}),
    "matmul": Kind(_matmul, {"rows": "count", "inner": "count", "columns": "count"}, _ALL),
    "max_pool2d": Kind(_pool2d("MaxPool"), _WINDOW, _POOL),
    "average_pool2d": Kind(_pool2d("AveragePool"), _WINDOW, _POOL),
    "relu": Kind(_elementwise("Relu", 1), _CHANNELS, _IMAGE),
    "add": Kind(_elementwise("Add", 2), _CHANNELS, _IMAGE),
}
"""Every kind of operation that `LatencyTable.from_csv` reads. ``height`` and ``width`` are those of the input."""
