"""What a run with tiles begins with: how layers are cut, what removing their tiles costs, and what chooses among them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from edgeprune.allocation.tiles.costs import layer_tokens
from edgeprune.allocation.tiles.exact import ExactTiles
from edgeprune.allocation.tiles.problem import TileProblem
from edgeprune.criteria.tiles.curves import tile_curves
from edgeprune.criteria.tiles.scores import tile_damage
from edgeprune.criteria.tiles.sums import gradient_sums
from edgeprune.errors import ConfigError
from edgeprune.loop.tile_choosing import TileChoosing
from edgeprune.loop.tile_costs import priced
from edgeprune.loop.tile_sizes import Auto, Tile, chosen_sizes, sizes_in, sizes_note
from edgeprune.surgery.tiles import tile_grids

if TYPE_CHECKING:
    from torch import nn

    from edgeprune.allocation.tiles.problem import TileSearch
    from edgeprune.budget import Budget
    from edgeprune.criteria.tiles.sums import TileSums
    from edgeprune.latency.predictor import Predictor
    from edgeprune.loop.joint.choosing import Channels
    from edgeprune.loop.planning import Progress
    from edgeprune.loop.tile_choosing import Choosing
    from edgeprune.lowering.kernel_graph import KernelGraph
    from edgeprune.surgery.tiles import TileGrid
    from edgeprune.tasks.task import Task


@dataclass(frozen=True)
class Cutting:
    """How linear layers are cut into tiles.

    Attributes:
        tile: Outputs and inputs of a tile; ``"auto"`` for each layer's by its predicted latency; None for no tiles.
        sizes: Other sizes for single weights.
        classifiers: Whether layers whose outputs are those of the model are cut, too.
    """

    tile: Tile | Auto | None
    sizes: Mapping[str, Tile] | None = None
    classifiers: bool = False

    def grids(self, model: nn.Module, kernel_graph: KernelGraph, tile: Tile) -> dict[str, TileGrid]:
        """The grids of all layers, those without a size of their own with a given one.

        Raises:
            ConfigError: No layer can be cut; says why.
        """
        return tile_grids(model, kernel_graph.graph, tile, sizes=self.sizes, classifiers=self.classifiers)


@dataclass(frozen=True)
class Started:
    """What is chosen from, and the sizes that were chosen before.

    Attributes:
        choosing: Makes plans.
        sizes: Name of the weight to the size of its tiles, where these were chosen by latency.
        notes: Sentences on them.
    """

    choosing: Choosing
    sizes: Mapping[str, Tile] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Sized:
    """Tiles of one size in all layers."""

    grids: dict[str, TileGrid]
    sums: dict[str, TileSums]
    problem: TileProblem


def started(
    model: nn.Module,
    example_inputs: Any,
    kernel_graph: KernelGraph,
    predictor: Predictor | None,
    task: Task,
    cutting: Cutting,
    budget: Budget,
    *,
    channels: Channels | None = None,
    search: TileSearch | None = None,
    power_weight: float = 0.0,
    batches: int = 64,
    progress: Progress | None = None,
) -> Started:
    """Cut the layers, score their tiles, and price them.

    Args:
        model: The dense model.
        example_inputs: As the model was traced with.
        kernel_graph: The same model, lowered.
        predictor: Of the device, or None.
        task: Batches and losses.
        cutting: How layers are cut.
        budget: Of latency, multiply-accumulates or energy; sizes are chosen for it.
        channels: How channels are chosen beside tiles; None leaves them as they are.
        search: How many tiles each layer keeps.
        power_weight: See `edgeprune.prune_tiles`.
        batches: Most training batches of each objective.
        progress: Called with (step, done, in all).

    Raises:
        ConfigError: No layer can be cut, or sizes are to be chosen by a latency that is not bounded.
        TableMismatchError: The table cannot price the kernels of tiles.
        TaskError: The task cannot be used.
    """
    sized: dict[Tile, _Sized] = {}
    picked: dict[str, Tile] = {}
    notes: tuple[str, ...] = ()
    if isinstance(cutting.tile, str):
        sized = _compared(model, kernel_graph, predictor, task, cutting, batches, progress)
        assert predictor is not None
        at_most = budget.resolve_ms(predictor.network_ms(kernel_graph.at({})))
        picked = chosen_sizes({tile: one.problem for tile, one in sized.items()}, at_most)
        notes = (sizes_note(picked, sized),)
        grids = {name: sized[tile].grids[name] for name, tile in picked.items()}
    else:
        grids = {} if cutting.tile is None else cutting.grids(model, kernel_graph, cutting.tile)
    tokens = layer_tokens(model, example_inputs, grids) if grids else {}
    latency = budget.bounds_latency
    if channels is not None:
        from edgeprune.loop.joint.choosing import JointChoosing

        joint = JointChoosing(
            model,
            kernel_graph,
            predictor,
            grids,
            tokens,
            task,
            channels,
            batches=batches,
            latency=latency,
            progress=progress,
        )
        return Started(joint, picked, notes)
    if picked:
        sums = {name: sized[tile].sums[name] for name, tile in picked.items()}
    else:
        sums = _sums(model, grids, task, batches, progress)
    choosing = TileChoosing(
        kernel_graph,
        predictor,
        tile_curves(sums),
        tokens,
        search or ExactTiles(),
        damages={name: tile_damage(one) for name, one in sums.items()},
        latency=latency,
        energy=budget.energy_mj is not None or budget.energy_ratio is not None,
        power_weight=power_weight,
        progress=progress,
    )
    return Started(choosing, picked, notes)


def _compared(
    model: nn.Module,
    kernel_graph: KernelGraph,
    predictor: Predictor | None,
    task: Task,
    cutting: Cutting,
    batches: int,
    progress: Progress | None,
) -> dict[Tile, _Sized]:
    """Tiles of each size that is compared; sizes that cut no layer are left out, unless none does."""
    if predictor is None:
        raise ConfigError(
            "sizes of tiles are chosen by their predicted latency, found no predictor.",
            hint="--tiles 64x128, or a table of edgeprune profile --tiles 64x128 --tiles 32x64",
        )
    every = sizes_in(predictor.table.header, kernel_graph.graph.signature)
    grids = {tile: cutting.grids(model, kernel_graph, tile) for tile in every}
    cutting_some = [tile for tile in every if any(grid.weights().size > 1 for grid in grids[tile].values())]
    found = {}
    for tile in cutting_some or [min(every, key=lambda size: size[0] * size[1])]:
        sums = _sums(model, grids[tile], task, batches, progress)
        found[tile] = _Sized(grids[tile], sums, priced(kernel_graph, predictor, tile_curves(sums), progress=progress))
    return found


def _sums(
    model: nn.Module, grids: Mapping[str, TileGrid], task: Task, batches: int, progress: Progress | None
) -> dict[str, TileSums]:
    if progress is not None:
        progress("scoring tiles", 0, 1)
    sums = gradient_sums(model, grids, task, batches=batches)
    if progress is not None:
        progress("scoring tiles", 1, 1)
    return sums
