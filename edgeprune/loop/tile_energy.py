"""Energies in the place of latencies, so that one search serves budgets of either."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from edgeprune.latency.arrays import Floats
from edgeprune.latency.energy import required
from edgeprune.spec import Kernel

if TYPE_CHECKING:
    from edgeprune.latency.predictor import Predictor


class Pricing(Protocol):
    """What prices kernels and networks; `edgeprune.Predictor` does, in milliseconds."""

    def kernel_ms(self, kernels: Sequence[Kernel]) -> Floats:
        """Of each kernel, milliseconds; raises where one cannot be judged."""

    def network_ms(self, kernels: Sequence[Kernel]) -> float:
        """Of a network that executes these kernels."""


class Energies:
    """Millijoules of one inference above idle, as predicted.

    A search only compares what networks cost: what it calls milliseconds of a network are its millijoules here.

    Args:
        predictor: Of a table that holds energies.

    Raises:
        TableMismatchError: The table holds none; says how to measure them.
    """

    def __init__(self, predictor: Predictor) -> None:
        required(predictor.energy, predictor.table.header)
        self._predictor = predictor

    def kernel_ms(self, kernels: Sequence[Kernel]) -> Floats:
        """Of each kernel, milliseconds: what cannot be judged by latency cannot by energy."""
        return self._predictor.kernel_ms(kernels)

    def network_ms(self, kernels: Sequence[Kernel]) -> float:
        """Millijoules of a network that executes these kernels."""
        return self._predictor.network_energy(kernels)[0]
