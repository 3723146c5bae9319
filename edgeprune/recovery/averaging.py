"""An exponential moving average of the weights on their way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

_WARM_UP = 10


class WeightAverage:
    """``average = d * average + (1 - d) * weight`` after each step, with ``d = min(decay, (1 + step) / (10 + step))``.

    So the average is not held back by the weights at the start in a short training. Buffers are not averaged: statistics of a
    batch norm belong to the weights before it and are estimated anew where the average is used.

    Source: B. Polyak, A. Juditsky, "Acceleration of Stochastic Approximation by Averaging", 1992; the growing decay is that of
    TensorFlow's ``ExponentialMovingAverage`` with ``num_updates``.

    Args:
        parameters: Whose average it is.
        decay: In [0, 1).
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        self._parameters, self._decay = list(parameters), decay
        self.values = [parameter.detach().clone() for parameter in parameters]

    def update(self, step: int) -> None:
        """Take in the weights after a step, the first of which is 1."""
        decay = min(self._decay, (1 + step) / (_WARM_UP + step))
        with torch.no_grad():
            for value, parameter in zip(self.values, self._parameters, strict=True):
                value.lerp_(parameter, 1 - decay)

    def restore(self, values: Sequence[torch.Tensor]) -> None:
        """Go on from earlier values."""
        for value, earlier in zip(self.values, values, strict=True):
            value.copy_(earlier)

    @contextmanager
    def in_place(self, model: nn.Module) -> Iterator[None]:
        """The model has the averaged weights for a block; its own and its buffers come back afterwards."""
        trained = [parameter.detach().clone() for parameter in self._parameters]
        buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
        with torch.no_grad():
            for parameter, value in zip(self._parameters, self.values, strict=True):
                parameter.copy_(value)
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(self._parameters, trained, strict=True):
                    parameter.copy_(value)
                for buffer, value in buffers:
                    buffer.copy_(value)
