"""What `edgeprune.prune_tiles` returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from edgeprune.loop.pruned import Pruned

if TYPE_CHECKING:
    from edgeprune.allocation.tiles.problem import TileAllocation
    from edgeprune.criteria.tiles.curves import TileCurve
    from edgeprune.surgery.plan import PruningPlan


@dataclass(frozen=True)
class TiledLayer:
    """What a plan leaves of one linear layer: `kept` of `tiles` tiles, and `weights` of `dense_weights` weights."""

    kept: int
    tiles: int
    weights: int
    dense_weights: int


def tiled_layers_of(curves: Mapping[str, TileCurve], plan: PruningPlan) -> dict[str, TiledLayer]:
    """What a plan leaves of each layer that is cut into tiles.

    Args:
        curves: By weight.
        plan: Of tiles, channels or both.
    """
    gone = {name for branch in plan.removed for name in branch["tensors"]}
    found = {}
    for name, curve in curves.items():
        kept = plan.kept_tiles[name].array() if name in plan.kept_tiles else np.ones(curve.grid.shape, dtype=bool)
        if name in gone:
            kept = np.zeros(curve.grid.shape, dtype=bool)
        left = []
        for axis, edges in enumerate((curve.grid.row_edges, curve.grid.column_edges)):
            stays = np.array(plan.kept.get(name, {}).get(axis, range(edges[-1])), dtype=np.int64)
            left.append(np.histogram(stays, np.array(edges))[0] if len(edges) > 2 else np.array([len(stays)]))
        weights = int(np.outer(left[0], left[1])[kept].sum())
        found[name] = TiledLayer(int(kept.sum()), curve.tiles, weights, int(curve.grid.weights().sum()))
    return found


@dataclass(frozen=True, kw_only=True)
class TiledResult(Pruned):
    """A model without some tiles of its linear layers: what `edgeprune.loop.pruned.Pruned` has, and what is left of each layer.

    Its `rounds` are there where a board tried plans for a budget of latency. Of its `recovery`, ``"tile_reconstruction"`` says in
    its details whether it was taken.

    Attributes:
        allocation: Of the search; the plan has the tiles of layers that are faster dense back, and some products merged.
        share: What the plan keeps of the budgeted cost, as predicted: of the model's multiply-accumulates, or of its predicted
            latency.
        layers: Name of each weight that was cut into tiles to what is left of it.
        dense: Name of the weights of linear layers that keep everything, with the reason.
        refitted: Whether the layers refitted by least squares were taken.
        dense_predicted_ms: Predicted latency of the dense model, milliseconds; None without a predictor.
        predicted_ms: The same of `module`.
        sizes: Size of each weight's tiles, outputs and inputs, where these were chosen by latency; else empty.
        power_share: Power as a share of the dense model's; None where it did not count.
        power_of: What that is the power of, and how it is known: *modelled*, or predicted from energies that were measured.
        dense_ms: Latency of the dense model that a budget tried on a board refers to, milliseconds; else None.
        budget_ms: That budget, milliseconds.
    """

    allocation: TileAllocation
    share: float
    layers: Mapping[str, TiledLayer]
    dense: Mapping[str, str]
    refitted: bool
    dense_predicted_ms: float | None = None
    predicted_ms: float | None = None
    sizes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    power_share: float | None = None
    power_of: str = ""
    dense_ms: float | None = None
    budget_ms: float | None = None

    @property
    def widths(self) -> dict[str, tuple[int, int]]:
        """Channel groups: units that are kept, and of how many."""
        return {name: (len(group["kept"]), int(group["size"])) for name, group in self.plan.groups.items()}
