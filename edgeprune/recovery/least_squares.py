"""A layer's weights by least squares from sums over its rows: no row is kept."""

from __future__ import annotations

import torch

_BYTES_AT_ONCE = 2**25
"""Of rows that are in float64 at the same time."""


class Moments:
    """Second moments of a layer's input and of what its weights leave of the target, summed up batch by batch.

    Takes ``8 * columns * (columns + outputs)`` bytes, however many rows come.

    Args:
        weight: The layer's, shape (outputs, columns).
        centered: Whether there is a free intercept.
        movable: Whether the weight may change; where not, only the intercept is solved for.
    """

    def __init__(self, weight: torch.Tensor, *, centered: bool, movable: bool = True) -> None:
        self.weight, self._centered, self._movable = weight.double(), centered, movable
        outputs, columns = weight.shape
        zeros = self.weight.new_zeros
        self._rows = 0
        self._gram, self._cross = zeros(columns, columns), zeros(columns, outputs)
        self._inputs, self._rest, self._targets = zeros(columns), zeros(outputs), zeros(outputs)
        self._rest_squares = self._target_squares = 0.0

    def add(self, inputs: torch.Tensor, target: torch.Tensor) -> None:
        """Take in rows: shapes (rows, columns) and (rows, outputs)."""
        size = max(1, _BYTES_AT_ONCE // (8 * max(1, inputs.shape[1])))
        for x, y in zip(torch.split(inputs, size), torch.split(target, size), strict=True):
            self._add(x.double(), y.double())

    def _add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        rest = y - x @ self.weight.T
        self._rows += len(x)
        if self._movable:
            self._gram += x.T @ x
            self._cross += x.T @ rest
        self._inputs += x.sum(0)
        self._rest += rest.sum(0)
        self._targets += y.sum(0)
        self._rest_squares += float((rest**2).sum())
        self._target_squares += float((y**2).sum())

    def solve(self, ridge: float) -> tuple[torch.Tensor, torch.Tensor, tuple[float, float]]:
        """The new weight, the intercept (0 where none is free), and the relative squared errors before and after.

        Args:
            ridge: See `edgeprune.recovery.reconstruction.reconstruct`.
        """
        gram, cross = self._gram, self._cross
        if self._centered and self._movable:
            gram = gram - torch.outer(self._inputs, self._inputs) / self._rows
            cross = cross - torch.outer(self._inputs, self._rest) / self._rows
        level = max(float(gram.diagonal().mean()), 1e-12)
        eye = torch.eye(len(gram), dtype=torch.float64, device=gram.device)
        change = torch.zeros_like(cross)
        if self._movable:
            change = torch.linalg.solve(gram + (ridge * level + 1e-9 * level) * eye, cross)
        new = self.weight + change.T
        intercept = torch.zeros_like(self._rest)
        explained = 2 * float((change * cross).sum()) - float((change * (gram @ change)).sum())
        left = self._rest_squares
        if self._centered:
            intercept = (self._rest - change.T @ self._inputs) / self._rows
            left -= float((self._rest**2).sum()) / self._rows
        variance = self._target_squares - float((self._targets**2).sum()) / self._rows
        scale = max(variance, 1e-12)
        return new, intercept, (self._rest_squares / scale, max(0.0, left - explained) / scale)
