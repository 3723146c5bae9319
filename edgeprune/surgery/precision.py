"""One precision for everything: what forward casts to a smaller one, or makes in it, would hide differences by rounding."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

_SMALLER = (torch.float32, torch.float16, torch.bfloat16)
_SAID_OF_A_TYPE = torch.ops.aten._assert_tensor_metadata.default
"""What torch.export writes before a cast: of which type a tensor was."""


def as_exact_as(tensors: Iterable[torch.Tensor]) -> AbstractContextManager[Any]:
    """What forward computes is as exact as these weights: where they are in float64, everything is.

    Args:
        tensors: Parameters and buffers; the first of a floating type tells.
    """
    first = next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), torch.float32)
    return _InFloat64() if first == torch.float64 else nullcontext()  # type: ignore[no-untyped-call]


class _InFloat64(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Casts to a smaller floating type are casts to float64 meanwhile, and tensors made in one are made in float64."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is _SAID_OF_A_TYPE:
            return None
        if kwargs.get("dtype") in _SMALLER:
            kwargs["dtype"] = torch.float64
        found = func(*args, **kwargs)
        if isinstance(found, torch.Tensor) and found.dtype in _SMALLER:
            made = not any(isinstance(value, torch.Tensor) for value in pytree.tree_leaves((args, kwargs)))
            return found.double() if made else found
        return found
