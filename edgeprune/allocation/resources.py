"""Costs that need no board, as sums of terms over widths: the number of parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from edgeprune.allocation._base import Widths
from edgeprune.allocation.terms import CostTerm, Floats
from edgeprune.graph.forms import SizeForm

if TYPE_CHECKING:
    from edgeprune.graph.channel_graph import ChannelGraph


class Parameters:
    """Number of parameters of a model at any widths; buffers do not count.

    Args:
        graph: From `edgeprune.trace`.
    """

    def __init__(self, graph: ChannelGraph) -> None:
        axes = graph.size_forms()
        self.sizes = graph.widths()
        named = dict(graph.model.named_parameters())
        self.shapes = tuple(axes[name] for name in named if name in axes)
        # What is in no program cannot change.
        self.constant = sum(parameter.numel() for name, parameter in named.items() if name not in axes)

    def value(self, widths: Widths) -> float:
        """Parameters at these widths; groups left out are dense."""
        every = {**self.sizes, **widths}
        return float(self.constant + sum(math.prod(form.at(every) for form in shape) for shape in self.shapes))

    def terms(self) -> list[CostTerm]:
        """One per parameter."""
        fixed = float(self.constant)
        return [CostTerm((), lambda: np.array(fixed)), *(product(shape) for shape in self.shapes)]


def product(shape: Sequence[SizeForm], factor: float = 1.0) -> CostTerm:
    """The term of a product of sizes, of which at most two change with widths.

    Args:
        shape: The sizes.
        factor: What they are multiplied by.

    Raises:
        ConfigError: More than two of them change.
    """
    changing = tuple(form for form in shape if form.terms)
    constant = factor * math.prod(form.constant for form in shape if not form.terms)

    def at(*sizes: npt.NDArray[np.int64]) -> Floats:
        total = np.asarray(constant, dtype=np.float64)
        for size in sizes:
            total = total * size
        return total

    return CostTerm(changing, at)
