"""Predicted energy of candidate widths, in parts, so that it can be bounded beside the latency."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from edgeprune.allocation._base import Widths
from edgeprune.allocation.cost import CostModel
from edgeprune.allocation.terms import Floats
from edgeprune.graph.forms import SizeForm
from edgeprune.latency.energy import required

if TYPE_CHECKING:
    from edgeprune.latency.predictor import Predictor
    from edgeprune.lowering.kernel_graph import KernelGraph


class Energy:
    """Millijoules of one inference above idle at any widths, as a predictor sees the kernels of a kernel graph.

    Args:
        kernel_graph: Kernels of the model at any widths.
        predictor: Fitted on a table that holds energies.

    Raises:
        TableMismatchError: The table holds none.
    """

    def __init__(self, kernel_graph: KernelGraph, predictor: Predictor) -> None:
        self.model = required(predictor.energy, predictor.table.header)
        self.cost = CostModel(kernel_graph, predictor)
        self._dynamic: dict[object, float] = {}

    def value(self, widths: Widths) -> float:
        """Millijoules at these widths; groups left out are dense."""
        return sum(self._parts(widths).values())

    def many_ms(self, many: Sequence[Widths]) -> Floats:
        """`value` of each, millijoules, shape (len(many),)."""
        return np.array([self.value(widths) for widths in many], dtype=np.float64)

    def parts_ms(self, many: Sequence[Widths]) -> list[dict[str, float]]:
        """Per widths, the millijoules of each part of the network; they add up to `value`."""
        return [self._parts(widths) for widths in many]

    def forms_of(self, part: str) -> tuple[SizeForm, ...]:
        """The sizes in the shapes of the operators that a part consists of, as forms in group widths."""
        return self.cost.forms_of(part)

    def held_by(self, widths: Widths) -> str:
        """What the energy at these widths consists of."""
        total, ms = self.value(widths), self.cost.ms(widths)
        share = self.model.static_mj(ms) / total if total > 0 else 0.0
        return f"the board's {self.model.busy_mw:.4g} mW above idle over {ms:.4g} ms hold {share:.0%} of it"

    def _parts(self, widths: Widths) -> dict[str, float]:
        kernels = self.cost.kernels(widths)
        parts = {part: self.model.static_mj(ms) for part, ms in self.cost.shared_out(kernels).items()}
        unseen = [kernel for kernel in dict.fromkeys(kernels) if kernel not in self._dynamic]
        self._dynamic.update(zip(unseen, self.model.dynamic_mj(unseen).tolist(), strict=True))
        for kernel in kernels:
            part = kernel.origin[0] if kernel.origin else ""
            parts[part] = parts.get(part, 0.0) + self._dynamic[kernel]
        return parts
