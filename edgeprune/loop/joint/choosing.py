"""Tiles and channels in one allocation: heads, head dimensions, hidden units, whole branches, and the tiles of what is left.

Within a section (a residual branch) widths and numbers of tiles are combined; sections then share the budget. All damage is on
the scale of the loss: that of widths by `edgeprune.criteria.calibration`, that of tiles by
`edgeprune.criteria.tiles.loss_scales`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from edgeprune.allocation.tiles.problem import TileAllocation, least_kept
from edgeprune.criteria import registry as criteria
from edgeprune.criteria.calibration import DamageCalibration
from edgeprune.criteria.damage import damage_curves
from edgeprune.criteria.tiles.curves import TileCurve, narrow_curve
from edgeprune.criteria.tiles.loss_scales import loss_scales
from edgeprune.criteria.tiles.scores import tile_damage
from edgeprune.criteria.tiles.sums import gradient_sums
from edgeprune.errors import EmptyPlanError
from edgeprune.loop.joint.candidates import Candidates, forms_of
from edgeprune.loop.joint.prices import Counted, Prices, Timed
from edgeprune.loop.joint.searching import JointSearch
from edgeprune.loop.joint.sections import sections
from edgeprune.loop.joint.settling import CutLoss, settled
from edgeprune.loop.tile_choosing import Choosing, Chosen
from edgeprune.loop.tile_costs import plan_of, require_kernels
from edgeprune.spec import Constraints
from edgeprune.surgery.constraints import resolve, with_removable

if TYPE_CHECKING:
    from torch import nn

    from edgeprune.criteria._base import Criterion
    from edgeprune.latency.predictor import Predictor
    from edgeprune.loop.planning import Progress
    from edgeprune.lowering.kernel_graph import KernelGraph
    from edgeprune.surgery.tiles import TileGrid
    from edgeprune.tasks.task import Task


@dataclass(frozen=True)
class Channels:
    """How channels are chosen beside tiles.

    Attributes:
        constraints: What widths must respect.
        criterion: Importance of units.
        calibration: How the damage of widths is put on the scale of the loss.
        blocks: Whether whole residual branches may go.
        turns: How often damage is measured beside the plan (`edgeprune.loop.joint.settling`); 0 only compares the plan with one
            of channels alone.
    """

    constraints: Constraints = field(default_factory=Constraints)
    criterion: str | Criterion = "taylor"
    calibration: DamageCalibration = field(default_factory=DamageCalibration)
    blocks: bool = False
    turns: int = 3


class JointChoosing(Choosing):
    """Plans of tiles and channels.

    Args:
        model: The dense model.
        kernel_graph: The same, lowered.
        predictor: Of the device, or None.
        grids: Of the weights that are cut into tiles; none leaves channels alone.
        tokens: Rows that enter each of these layers.
        task: Batches and losses.
        channels: How channels are chosen.
        batches: Most training batches of each objective whose gradients say what tiles are worth.
        latency: Whether costs are milliseconds.
        progress: Called with (step, done, in all).

    Raises:
        ConstraintError: A constraint matches nothing.
        TableMismatchError: The table cannot price the kernels of tiles; names them.
        EmptyPlanError: Nothing can be decided.
    """

    what = "tiles and channels"

    def __init__(
        self,
        model: nn.Module,
        kernel_graph: KernelGraph,
        predictor: Predictor | None,
        grids: Mapping[str, TileGrid],
        tokens: Mapping[str, int],
        task: Task,
        channels: Channels,
        *,
        batches: int,
        latency: bool,
        progress: Progress | None = None,
    ) -> None:
        super().__init__(kernel_graph, predictor, latency=latency)
        graph, self._grids = kernel_graph.graph, grids
        rules = resolve(channels.constraints, graph)
        if channels.blocks:
            rules = with_removable(rules, kernel_graph.removable)
        every, self.outside = sections(graph, rules, list(grids))
        if not every:
            raise EmptyPlanError(
                "a model must have residual branches with channels, or linear layers with tiles, to choose from, found none.",
                hint="edgeprune explain MODEL",
            )

        def tell(step: str) -> None:
            if progress is not None:
                progress(step, 0, 1)

        def told(step: str, done: int, total: int) -> None:
            if progress is not None:
                progress(step, done, total)

        tell("scoring")
        movable = [group for section in every for choice in section.choices for group in choice.groups]
        criterion = criteria.get(channels.criterion)
        scores = criterion.score(graph, model, task, groups=movable) if movable else {}
        damage = damage_curves(scores, criterion.normalization)
        if damage:
            leads = {section.lead for section in every} - {None}
            damage = channels.calibration.calibrate(
                damage,
                scores,
                graph,
                model,
                task,
                branches=[branch for branch in graph.branches if branch.lead in leads],
                progress=lambda done, total: told("calibrating damage", done, total),
            ).curves
        sums = gradient_sums(model, grids, task, batches=batches) if grids else {}
        self._curves = {name: narrow_curve(one, grids[name].weights().astype(np.float64)) for name, one in sums.items()}
        scales = (
            loss_scales(
                model,
                self._curves,
                task,
                batches=channels.calibration.batches,
                progress=lambda done, total: told("measuring tiles", done, total),
            )
            if grids
            else {}
        )
        if predictor is not None and grids:
            fewest = {name: least_kept(curve) for name, curve in self._curves.items()}
            if any(count < self._curves[name].tiles for name, count in fewest.items()):
                require_kernels(kernel_graph, predictor, plan_of(kernel_graph, self._curves, fewest))
        timed = Timed(kernel_graph, predictor, rules) if latency and predictor is not None else None
        self._prices: Prices = timed or Counted(kernel_graph)
        forms = [forms_of(section, damage, self._prices, graph) for section in every]
        candidates = Candidates(model, graph, grids, scores, tokens, scales, self._prices)
        options = candidates.of(every, forms, task, batches=batches, progress=progress)
        worth = {name: scales[name](tile_damage(one)) for name, one in sums.items()}
        self._search = JointSearch(candidates, options, self._prices, timed, worth if timed is not None else None)
        self._loss = CutLoss(model, task, channels.calibration.batches)
        self._turns, self._progress = channels.turns, progress

    @property
    def dense(self) -> float:
        """See `Choosing.dense`."""
        return self._prices.dense

    @property
    def curves(self) -> Mapping[str, TileCurve]:
        """See `Choosing.curves`."""
        return self._curves

    def choose(self, at_most: float) -> Chosen:
        """See `Choosing.choose`."""
        found, _ = settled(self._search, at_most, self._loss, turns=self._turns, progress=self._progress)
        gone = {name for branch in found.plan.removed for name in branch["tensors"]}
        kept = {
            name: np.zeros(curve.grid.shape, dtype=bool)
            if name in gone
            else found.plan.kept_tiles[name].array()
            if name in found.plan.kept_tiles
            else np.ones(curve.grid.shape, dtype=bool)
            for name, curve in self._curves.items()
        }
        note = (
            "proven among the widths and tiles that were combined, as costs add up."
            if self._prices.exact
            else "proven where latencies add up; then corrected by what the plan is predicted to take as a whole."
        )
        allocation = TileAllocation(
            kept=kept,
            method="joint",
            budget=at_most,
            cost=found.cost,
            unit=self._prices.unit,
            damage=found.damage,
            power=0.0,
            objective=found.damage,
            bound=found.bound,
            note=note,
        )
        return Chosen(allocation, found.plan, found.cost, at_most, found.merged)

    def notes(self, chosen: Chosen) -> tuple[str, ...]:
        """See `Choosing.notes`."""
        found = [f"Widths and tiles, chosen together: {chosen.allocation.note}"]
        if self._grids and not chosen.plan.kept_tiles:
            found.append("No tile goes: widths alone were measured to lose less.")
        if self.outside:
            found.append(f"Channels outside of residual branches stay whole: {', '.join(self.outside)}.")
        return (*found, *self._merged(chosen))
