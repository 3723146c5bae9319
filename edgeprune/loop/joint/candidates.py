"""The options of each section: some widths, and with them some numbers of tiles; nothing at all where a branch may go."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from edgeprune.allocation.tiles.options import efficient, front_of, thinned
from edgeprune.allocation.tiles.problem import least_kept
from edgeprune.criteria.damage import DamageCurves, best_units
from edgeprune.criteria.tiles.curves import TileCurve, narrow_curve
from edgeprune.criteria.tiles.loss_scales import LossScale
from edgeprune.criteria.tiles.sums import Bools, Floats, Kept, narrow_sums
from edgeprune.graph.branches import emptied
from edgeprune.graph.editing import masks_of
from edgeprune.loop.joint.sections import Section
from edgeprune.surgery.kept_tiles import KeptTiles
from edgeprune.surgery.plan import PruningPlan, make_plan

if TYPE_CHECKING:
    from torch import nn

    from edgeprune.criteria._base import Scores
    from edgeprune.graph.channel_graph import ChannelGraph
    from edgeprune.loop.joint.prices import Prices
    from edgeprune.loop.planning import Progress
    from edgeprune.surgery.tiles import TileGrid
    from edgeprune.tasks.task import Task

MOST_FORMS = 12
"""Sets of widths per section that are combined with tiles."""


@dataclass(frozen=True)
class Form:
    """Widths of one section.

    Attributes:
        widths: By group; 0 for all groups of a branch that goes.
        cost: Of the model with these widths and all else dense.
        damage: Of the widths, as increase of the loss.
    """

    widths: Mapping[str, int]
    cost: float
    damage: float

    @property
    def removed(self) -> bool:
        """Whether the branch is gone."""
        return any(width == 0 for width in self.widths.values())


@dataclass(frozen=True)
class Option:
    """What a section may become.

    Attributes:
        widths: By group; those that are left out are whole.
        tiles: Weight to the tiles that stay; weights that are left out keep theirs.
        cost: Of the model with this section so and all else dense.
        narrowing: Increase of the loss by the widths, as estimated.
        tiling: That by the tiles, on top of it.
    """

    widths: Mapping[str, int]
    tiles: Mapping[str, KeptTiles]
    cost: float
    narrowing: float
    tiling: float = 0.0


def forms_of(section: Section, damage: DamageCurves, prices: Prices, graph: ChannelGraph) -> list[Form]:
    """Widths of a section none of which is beaten in cost and damage, at most `MOST_FORMS`, the dense ones last.

    Args:
        section: Whose.
        damage: By group and width.
        prices: Of candidates.
        graph: The traced model.
    """
    curves = [choice.damage(damage) for choice in section.choices]
    every = [
        {group: width for choice, width in zip(section.choices, picked, strict=True) for group in choice.groups}
        for picked in itertools.product(*(prices.candidates(choice) for choice in section.choices))
    ]
    costs = prices.narrow(every)
    lost = np.array(
        [
            sum(curve[widths[choice.groups[0]]] for choice, curve in zip(section.choices, curves, strict=True))
            for widths in every
        ]
    )
    kept = efficient(costs, lost)
    kept = kept[thinned(costs[kept], MOST_FORMS)]
    found = [Form(every[at], float(costs[at]), float(lost[at])) for at in kept]
    if section.lead is not None:
        widths = emptied(graph.branches, {section.lead: 0})
        found.append(Form(widths, float(prices.narrow([widths])[0]), float(damage[section.lead][0])))
    return sorted(found, key=lambda form: -form.damage)


class Candidates:
    """Options of all sections.

    Args:
        model: The dense model.
        graph: Its trace.
        grids: Of the weights that are cut into tiles; without any, options are widths alone.
        scores: By which units of a group stay.
        tokens: Rows that enter each tiled layer.
        scales: From estimated damage of tiles to increase of the loss, by weight.
        prices: Of candidates.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: ChannelGraph,
        grids: Mapping[str, TileGrid],
        scores: Scores,
        tokens: Mapping[str, int],
        scales: Mapping[str, LossScale],
        prices: Prices,
    ) -> None:
        self.model, self.graph, self.grids, self.scores = model, graph, grids, scores
        self.tokens, self.scales, self.prices = tokens, scales, prices

    def of(
        self,
        every: Sequence[Section],
        forms: Sequence[Sequence[Form]],
        task: Task,
        *,
        batches: int,
        progress: Progress | None = None,
    ) -> list[list[Option]]:
        """Options of each section, among them the dense one.

        Args:
            every: The sections.
            forms: Widths of each, from `forms_of`.
            task: Its gradients say what tiles are worth, at all widths at once.
            batches: Most training batches of each objective.
            progress: Told the sections done.
        """
        kept: dict[str, list[Kept]] = {}
        for section, some in zip(every, forms, strict=True):
            for name in section.layers:
                kept[name] = [self._kept(name, form) for form in some if not form.removed]
        sums = (
            narrow_sums(self.model, {name: self.grids[name] for name in kept}, task, kept, batches=batches)
            if kept
            else {}
        )
        found = []
        for done, (section, some) in enumerate(zip(every, forms, strict=True)):
            if progress is not None:
                progress("pricing widths and tiles", done, len(every))
            options = []
            place = 0
            for form in some:
                options.append(Option(form.widths, {}, form.cost, form.damage))
                if form.removed:
                    continue
                curves = {}
                for name in section.layers:
                    rows, columns = kept[name][place]
                    sizes = _sizes(self.grids[name], rows, columns)
                    curves[name] = narrow_curve(sums[name][place], sizes)
                place += 1
                options += self._tiled(form, curves)
            damages = np.array([one.narrowing + one.tiling for one in options])
            best = set(efficient(np.array([one.cost for one in options]), damages).tolist())
            # Widths alone stay, whatever tiles seem to be worth: that may turn out to be less.
            found.append([one for at, one in enumerate(options) if at in best or not one.tiles])
        return found

    def plan(self, options: Sequence[Option]) -> PruningPlan:
        """The plan of one option per section; it may be empty."""
        widths = {group: width for option in options for group, width in option.widths.items()}
        tiles = {name: kept for option in options for name, kept in option.tiles.items()}
        return make_plan(self.graph, self.units(widths), kept_tiles=tiles, allow_empty=True)

    def units(self, widths: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        """Units that stay, of groups that do not stay whole."""
        sizes = self.graph.widths()
        return {
            name: best_units(self.scores[name], width) if width else ()
            for name, width in widths.items()
            if width < sizes[name]
        }

    def removed(self, option: Option) -> float:
        """Multiply-accumulates that go with an option's tiles, beyond what its widths take."""
        form = Form(option.widths, 0.0, 0.0)
        total = 0.0
        for name, tiles in option.tiles.items():
            sizes = _sizes(self.grids[name], *self._kept(name, form))
            total += self.tokens[name] * float(sizes[~tiles.array()].sum())
        return total

    def _kept(self, name: str, form: Form) -> Kept:
        sizes = self.graph.widths()
        masks = {}
        for group, units in self.units(form.widths).items():
            masks[group] = np.zeros(sizes[group], dtype=bool)
            masks[group][list(units)] = True
        kept = masks_of(self.graph, masks)
        return kept.masks(name, 0), kept.masks(name, 1)

    def _tiled(self, form: Form, curves: Mapping[str, TileCurve]) -> list[Option]:
        if not curves:
            return []
        counts, costs, lost = [], [], []
        for name, curve in curves.items():
            # Tiles that channels have emptied go first, and are none that a layer could be left with.
            filled = curve.tiles if curve.sizes is None else int((curve.sizes > 0).sum())
            some = np.arange(min(max(1, least_kept(curve)), filled), curve.tiles + 1)
            counts.append(some)
            costs.append(self.tokens[name] * curve.weights[some])
            lost.append(self.scales[name](curve.estimate[some]))
        front = front_of(costs, lost, self.prices.most_points if self.prices.exact else 4 * self.prices.most_points)
        points = thinned(front.cost, self.prices.most_points)
        smallest = self._plan(form, curves, [int(some[0]) for some in counts])
        dense = sum(float(cost[-1]) for cost in costs)
        found = []
        for point in points:
            picked = [int(some[at]) for some, at in zip(counts, front.options[point], strict=True)]
            tiles = {
                name: KeptTiles.of(curve.grid, curve.kept(count))
                for (name, curve), count in zip(curves.items(), picked, strict=True)
                if count < curve.tiles
            }
            if not tiles:
                continue
            cost = self.prices.tiled(with_tiles(smallest, tiles), form.widths, dense - float(front.cost[point]))
            found.append(Option(form.widths, tiles, cost, form.damage, float(front.damage[point])))
        return found

    def _plan(self, form: Form, curves: Mapping[str, TileCurve], counts: Sequence[int]) -> PruningPlan:
        tiles = {
            name: KeptTiles.of(curve.grid, curve.kept(count))
            for (name, curve), count in zip(curves.items(), counts, strict=True)
        }
        return make_plan(self.graph, self.units(form.widths), kept_tiles=tiles, allow_empty=True)


def with_tiles(plan: PruningPlan, tiles: Mapping[str, KeptTiles]) -> PruningPlan:
    """The same plan with other tiles, of weights some or all of which have tiles in it: quicker than another one."""
    folds = tuple(fold for fold in plan.folds if fold["producer"] in tiles or fold["consumer"] in tiles)
    return replace(plan, kept_tiles=dict(tiles), folds=folds)


def _sizes(grid: TileGrid, rows: Bools, columns: Bools) -> Floats:
    """Weights that are left in each tile, shape [block rows, block columns]."""
    counts = [
        np.add.reduceat(mask.astype(np.float64), np.array(edges[:-1]))
        for mask, edges in ((rows, grid.row_edges), (columns, grid.column_edges))
    ]
    found: Floats = np.outer(counts[0], counts[1])
    return found
