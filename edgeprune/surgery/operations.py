"""Which operations a written program may name: a plan comes from a file, and what it names is run."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch

from edgeprune.errors import PlanError

_ARITHMETIC = ("getitem", "add", "sub", "mul", "floordiv", "mod", "neg", "pow", "truediv")
_WITH_TEXT = (
    "conv1d", "conv2d", "conv3d", "div", "div_", "einsum", "gelu", "gelu_", "linalg_matrix_norm", "linalg_norm", "meshgrid",
    "pad", "pad_sequence", "scatter", "scatter_reduce", "searchsorted",
)  # fmt: skip
"""Operations whose text argument is a mode; text could also be the name of a file."""
_FROM_SIZES = (
    "arange", "empty", "eye", "full", "linspace", "logspace", "ones", "rand", "randint", "randn", "scalar_tensor",
    "tril_indices", "triu_indices", "zeros",
)  # fmt: skip
"""Operations that read no tensor."""
_INTERNAL = (
    "_log_softmax", "_shape_as_tensor", "_softmax", "_to_copy", "_unsafe_view", "_upsample_bicubic2d_aa",
    "_upsample_bilinear2d_aa", "_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d",
    "_weight_norm", "__and__", "__or__", "__xor__",
)  # fmt: skip
"""Names with an underscore that a capture produces; the other ones may skip checks of bounds."""
_STORAGE = ("resize", "resize_", "resize_as", "resize_as_", "set", "set_")


@cache
def operation(name: str) -> Callable[..., Any]:
    """The operation of that name: computation on tensors of ATen, or arithmetic on sizes.

    Raises:
        PlanError: If this version of torch has no such operation, or a program may not name it.
    """
    family, _, rest = name.partition(".")
    if family == "operator" and rest in _ARITHMETIC:
        return cast(Callable[..., Any], getattr(operator, rest))
    packet_name, _, overload = rest.partition(".")
    packet = getattr(torch.ops.aten, packet_name, None) if family == "aten" else None
    found = getattr(packet, overload, None) if packet is not None else None
    if not isinstance(found, torch._ops.OpOverload):
        raise PlanError(
            f"a program may only name operations of ATen that torch {torch.__version__} has, found {name!r}."
        )
    if not _computes(packet_name, [str(argument.type) for argument in found._schema.arguments]):
        raise PlanError(f"a program may only name operations that compute on tensors, found {name!r}.")
    return found


def _computes(name: str, types: list[str]) -> bool:
    """Whether an operation touches nothing but the tensors that it is given."""
    if name in _STORAGE or (name.startswith("_") and name not in _INTERNAL):
        return False
    if any("str" in kind for kind in types) and not (name in _WITH_TEXT or name.startswith("fft_")):
        return False
    return name in _FROM_SIZES or any("Tensor" in kind for kind in types)
