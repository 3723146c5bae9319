"""Weights and buffers to come back to, whatever ends a training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn


class Snapshot:
    """The weights and buffers to come back to.

    Attributes:
        values: Parameters, then buffers, in the model's order.
    """

    def __init__(self, model: nn.Module) -> None:
        self._tensors = [*model.parameters(), *model.buffers()]
        self.values: list[torch.Tensor] = []
        self.take()

    def take(self) -> None:
        """Remember the values of now."""
        self.values = [tensor.detach().clone() for tensor in self._tensors]

    def set(self, values: Sequence[torch.Tensor]) -> None:
        """Remember other values."""
        self.values = [value.to(tensor.device) for value, tensor in zip(values, self._tensors, strict=True)]

    def restore(self) -> None:
        """Put the remembered values back."""
        with torch.no_grad():
            for tensor, value in zip(self._tensors, self.values, strict=True):
                tensor.copy_(value)


@contextmanager
def consistent(model: nn.Module) -> Iterator[Snapshot]:
    """Whatever ends the block, the model holds what was last remembered, and no gradients are left behind."""
    snapshot = Snapshot(model)
    try:
        yield snapshot
    finally:
        snapshot.restore()
        model.zero_grad(set_to_none=True)
