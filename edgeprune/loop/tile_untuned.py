"""All that a run with tiles came to before it began to tune, so that an interrupted one need not do it again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeprune.allocation.tiles.problem import TileAllocation
from edgeprune.loop.interruption import Begun
from edgeprune.loop.realizing import Realized
from edgeprune.loop.tile_sizes import Tile
from edgeprune.loop.tiled_result import TiledLayer
from edgeprune.recovery.evaluation import RecoveryRecord

if TYPE_CHECKING:
    from torch import nn

    from edgeprune.loop.result import PruningRound
    from edgeprune.recovery.fine_tuning import FineTuning
    from edgeprune.surgery.plan import PruningPlan


@dataclass(frozen=True)
class Choice:
    """What was chosen, without the plan itself.

    Attributes:
        allocation: Of the search.
        cost: Of the plan as a whole, in the unit of the budget.
        share: That as a share of the dense model's.
        layers: What is left of each weight that is cut into tiles.
        dense: Weights that keep everything, with the reason.
        sizes: Size of each weight's tiles, where these were chosen by latency.
        power_share: Power as a share of the dense model's; None where it did not count.
        power_of: What that is the power of, and how it is known.
        dense_predicted_ms: Predicted latency of the dense model, milliseconds; None without a predictor.
        predicted_ms: The same of the plan.
        refitted: Whether the refitted layers were taken.
        round_notes: Sentences on the rounds on a board.
        notes: Sentences on the choice.
    """

    allocation: TileAllocation
    cost: float
    share: float
    layers: Mapping[str, TiledLayer]
    dense: Mapping[str, str]
    sizes: Mapping[str, Tile]
    power_share: float | None
    power_of: str
    dense_predicted_ms: float | None
    predicted_ms: float | None
    refitted: bool
    round_notes: tuple[str, ...]
    notes: tuple[str, ...]

    def record(self) -> dict[str, Any]:
        """As JSON values."""
        kept = {name: tiles.tolist() for name, tiles in self.allocation.kept.items()}
        allocation = {**{name: getattr(self.allocation, name) for name in _NUMBERS}, "kept": kept}
        values = {name: getattr(self, name) for name in _PLAIN}
        return {
            **values,
            "allocation": allocation,
            "layers": {name: asdict(layer) for name, layer in self.layers.items()},
            "dense": dict(self.dense),
            "sizes": {name: list(tile) for name, tile in self.sizes.items()},
            "round_notes": list(self.round_notes),
            "notes": list(self.notes),
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Choice:
        """From JSON values."""
        told = dict(record["allocation"])
        kept = {name: np.array(tiles, dtype=np.bool_) for name, tiles in told.pop("kept").items()}
        return cls(
            **{name: record[name] for name in _PLAIN},
            allocation=TileAllocation(kept=kept, **told),
            layers={name: TiledLayer(**layer) for name, layer in record["layers"].items()},
            dense=dict(record["dense"]),
            sizes={name: (int(rows), int(columns)) for name, (rows, columns) in record["sizes"].items()},
            round_notes=tuple(record["round_notes"]),
            notes=tuple(record["notes"]),
        )


_NUMBERS = ("method", "budget", "cost", "unit", "damage", "power", "objective", "bound", "note")
_PLAIN = ("cost", "share", "power_share", "power_of", "dense_predicted_ms", "predicted_ms", "refitted")


@dataclass(frozen=True)
class Untuned:
    """A model without some tiles, before it is tuned.

    Attributes:
        module: The model; refitted where that was taken.
        plan: What was cut.
        choice: What else is known of it.
        difference: Largest difference between cut and masked model.
        notes: Sentences on the cut and the refitting.
        recovery: What the steps so far did.
        metrics_before: Validation metric of the dense model by objective.
        rounds: Plans that were tried on a board.
        chosen: Index of the one that was taken.
        level_ms: What the dense engine usually takes on that board, milliseconds; None where this process has tried none.
    """

    module: nn.Module
    plan: PruningPlan
    choice: Choice
    difference: float
    notes: tuple[str, ...]
    recovery: tuple[RecoveryRecord, ...]
    metrics_before: Mapping[str, float]
    rounds: tuple[PruningRound, ...]
    chosen: int
    level_ms: float | None = None

    def begun(self, left: FineTuning, generators: Mapping[str, Any]) -> Begun:
        """As an interrupted run is kept."""
        realized = Realized(self.module, self.difference, self.recovery, self.notes)
        return Begun(
            plan=self.plan,
            rounds=self.rounds,
            chosen=self.chosen,
            lost="",
            ended="",
            metrics_before=self.metrics_before,
            realized=realized,
            left=left,
            generators=generators,
            more={"tiles": self.choice.record()},
        )

    @classmethod
    def of(cls, begun: Begun) -> Untuned:
        """What an interrupted run kept."""
        realized = begun.realized
        return cls(
            module=realized.module,
            plan=begun.plan,
            choice=Choice.from_record(begun.more["tiles"]),
            difference=realized.check_max_abs,
            notes=realized.notes,
            recovery=realized.recovery,
            metrics_before=begun.metrics_before,
            rounds=begun.rounds,
            chosen=begun.chosen,
        )

    def noting(self, sentence: str) -> Untuned:
        """With one more sentence in front."""
        return replace(self, notes=(sentence, *self.notes)) if sentence else self
