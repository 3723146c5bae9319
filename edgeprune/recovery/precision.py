"""Mixed precision: the forward in a short format, weights, losses and the optimizer in float32."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import nn
from torch.utils import _pytree as pytree

from edgeprune.errors import ConfigError

Precision = Literal["float32", "bfloat16", "float16"]
PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16", "float16")


class MixedPrecision:
    """Autocast, and for float16 the scaling that keeps small gradients from vanishing.

    Source: P. Micikevicius et al., "Mixed Precision Training", ICLR 2018 (float32 weights, loss scaling).

    Args:
        precision: Of convolutions and matrix products.
        device: Where the model is.

    Raises:
        ConfigError: The device does not train in that precision.
    """

    def __init__(self, precision: Precision, device: torch.device) -> None:
        possible = {"cpu": ("float32", "bfloat16"), "cuda": PRECISIONS}.get(device.type, ("float32",))
        if device.type == "cuda" and precision == "bfloat16" and not torch.cuda.is_bf16_supported():
            possible = ("float32", "float16")
        if precision not in possible:
            raise ConfigError(
                f"the training precision on {device.type} must be one of {', '.join(possible)}, found {precision}.",
                hint=f"--amp {possible[1]}" if len(possible) > 1 else "float32, or a CUDA device",
            )
        self._device, self._dtype = device, getattr(torch, precision)
        self._short = precision != "float32"
        self._scaler = torch.amp.GradScaler("cuda", enabled=precision == "float16")

    def forward(self) -> AbstractContextManager[Any]:
        """A block in which models run."""
        return torch.autocast(self._device.type, self._dtype, enabled=self._short)

    def outputs(self, tree: Any) -> Any:
        """What a model returned, in float32: a loss need not know of other formats."""
        if not self._short:
            return tree
        short = (torch.bfloat16, torch.float16)
        return pytree.tree_map_only(torch.Tensor, lambda value: value.float() if value.dtype in short else value, tree)

    def backward(self, loss: torch.Tensor) -> None:
        """Gradients of a loss, still scaled."""
        self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def step(self, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], norm: float | None) -> None:
        """Scale gradients back, limit their norm, and step; a step whose gradients are not finite is left out (float16)."""
        self._scaler.unscale_(optimizer)
        if norm is not None:
            nn.utils.clip_grad_norm_(parameters, norm)
        self._scaler.step(optimizer)
        self._scaler.update()

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs, as JSON values."""
        return self._scaler.state_dict()

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        if state:
            self._scaler.load_state_dict(state)
