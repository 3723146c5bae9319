"""The dense latency: what a share is a share of, and what a ratio is multiplied by."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgeprune.latency.predictor import Predictor
    from edgeprune.lowering.kernel_graph import KernelGraph


@dataclass(frozen=True)
class DenseLatency:
    """Latency of the dense model.

    Attributes:
        ms: Milliseconds.
        predicted_ms: What the predictor says, milliseconds.
        measured: Whether `ms` was measured as a whole while profiling; otherwise it is `predicted_ms`.
    """

    ms: float
    predicted_ms: float
    measured: bool


def dense_latency(predictor: Predictor, kernel_graph: KernelGraph) -> DenseLatency:
    """The measured latency where the predictor's table holds the dense network of this very model, else the predicted one.

    It does when a network of the table runs the same kernels equally often.

    Raises:
        UnsupportedKernelError: The table holds nothing to judge a kernel by.
    """
    kernels = kernel_graph.at(kernel_graph.graph.widths())
    predicted_ms = predictor.network_ms(kernels)
    wanted = Counter(kernel.key for kernel in kernels)
    for network in predictor.table.networks:
        if network.kernels == wanted:
            return DenseLatency(network.measurement.median_ms, predicted_ms, measured=True)
    return DenseLatency(predicted_ms, predicted_ms, measured=False)
