"""`prune_tiles`: from a trained model with linear layers, and its task, to a model that some tiles of them are gone from."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.budget import Budget
from edgeprune.errors import ConfigError, TableMissingError
from edgeprune.loop.closing import MOST_ROUNDS
from edgeprune.loop.interruption import Interruption
from edgeprune.loop.lowering import require_runtime
from edgeprune.loop.tile_sizes import Auto, Tile
from edgeprune.loop.tile_stages import TileSettings, TileStages
from edgeprune.loop.tile_start import Cutting
from edgeprune.loop.tiled_result import TiledResult
from edgeprune.tasks.batches import validate

if TYPE_CHECKING:
    from torch import nn

    from edgeprune.allocation.tiles.problem import TileSearch
    from edgeprune.boards.board import Board
    from edgeprune.graph.channel_graph import ChannelGraph
    from edgeprune.latency.predictor import Predictor
    from edgeprune.loop.joint.choosing import Channels
    from edgeprune.loop.planning import Progress
    from edgeprune.lowering.kernel_graph import KernelGraph
    from edgeprune.recovery.fine_tuning import FineTuning
    from edgeprune.tasks.task import Task

TILE = (64, 128)


def prune_tiles(
    model: nn.Module,
    example_inputs: Any,
    budget: Budget | str,
    task: Task,
    board: Board | str | None = None,
    predictor: Predictor | None = None,
    *,
    tile: Tile | Auto | None = TILE,
    sizes: Mapping[str, Tile] | None = None,
    classifiers: bool = False,
    channels: Channels | None = None,
    search: TileSearch | None = None,
    power_weight: float = 0.0,
    batches: int = 64,
    refit: bool = True,
    fine_tuning: FineTuning | None = None,
    distill: bool = False,
    backend: str = "onnxruntime",
    threads: int | None = None,
    most_rounds: int = MOST_ROUNDS,
    measuring_rounds: int = 20,
    graph: ChannelGraph | None = None,
    kernel_graph: KernelGraph | None = None,
    plan_path: Path | str | None = None,
    checkpoint: Interruption | Path | str | None = None,
    progress: Progress | None = None,
) -> TiledResult:
    """Remove the tiles of linear layers that the task needs least, within a budget; refit, check, tune, measure.

    Which tiles go is chosen by the estimated damage to the loss (`edgeprune.criteria.tiles`). The kept ones are refitted by
    least squares, and that is taken only where training batches that the fit did not see say that it helps. The model itself is
    not changed.

    Args:
        model: The dense model, trained.
        example_inputs: Tensor, tuple or dict; fixes the deployment batch.
        budget: Multiply-accumulates (``Budget.of(macs="50%")``), which need no predictor; or a latency (text as in
            `Budget.parse`), as predicted, where each layer costs what it makes the whole network slower; or the same of energy
            (``Budget.of(energy="60%")``), for which the predictor's table must hold energies. One of them.
        task: Data, loss and metric. Training batches score, refit and tune, labels as the loss needs them.
        board: Where dense and pruned engines are compared; None leaves the latency unverified. With a latency as the budget
            what plans take there corrects the predictions, and a plan that misses the budget, or leaves more than 3 % of it
            unused, is followed by another one, as by `edgeprune.prune`.
        predictor: Fitted on a table of the board; needed by a latency or an energy.
        tile: Rows and columns of a tile, see `edgeprune.surgery.tiles.tile_grids`, as the next two. ``"auto"``, with a latency:
            of the sizes that the predictor's table was profiled with (`tiles` of `edgeprune.profile`), or of a few usual ones,
            each layer gets the one that loses least at what it is predicted to take (`edgeprune.loop.tile_sizes`). None, beside
            `channels`: no tiles, so that what channels alone come to is found by the same search.
        sizes: Other sizes for single weights.
        classifiers: Whether layers whose outputs are those of the model are cut, too.
        channels: How heads, head dimensions, hidden units and whole residual branches are chosen together with the tiles
            (`edgeprune.loop.joint.choosing`); None leaves channels as they are.
        search: How many tiles each layer keeps; `ExactTiles` when None. With `channels` there is one search for both.
        power_weight: Least is ``damage + beta * power`` within the budget, with beta as many times the paper's balance between
            the two (`edgeprune.allocation.tiles.published.balanced_beta`). Power is the energy that the predictor gives where its
            table holds energies, else *modelled* by kept tiles and the rows that stream through them. 0 leaves power out. Tiles
            alone, not beside `channels`.
        batches: Most training batches of each objective for scores and refitting; they are in memory together.
        refit: Whether least squares is tried.
        fine_tuning: How the cut model is tuned on the task; None does not. Removed tiles are no parameters, and stay gone.
        distill: Whether the dense model's outputs are a second target of the tuning.
        backend: Runtime of the engines, where there is no `kernel_graph`.
        threads: Threads inside one operation while the board measures; those of the predictor's table when None, else 1.
        most_rounds: Most plans that are tried on the board, where a latency is the budget.
        measuring_rounds: Rounds of each comparison on the board.
        graph: The traced model, where the caller has it.
        kernel_graph: The lowered model, where the caller has it.
        plan_path: Where the plan is written before anything is compiled or timed.
        checkpoint: Folder of its own for what an interrupted tuning goes on from, as of `edgeprune.prune`; it stays.
        progress: Called with (step, done, in all).

    Raises:
        ConfigError: The budget is another one, the model has no linear layer that can be cut into tiles (says why), options do
            not go together, or the checkpoint's folder holds something else.
        TableMissingError: A latency is asked for without a predictor.
        TableMismatchError: The predictor is of another device or runtime, or its table cannot price the kernels of tiles; names
            them.
        BudgetInfeasibleError: Even the fewest tiles cost more; says what they cost.
        EmptyPlanError: The dense model is within the budget.
        TaskError: The task cannot be used.
        SurgeryError: The cut model does not equal the masked one.
        RemoteError: The board is not there at the start; one that is lost later leaves a result that says so.
    """
    wanted = Budget.parse(budget) if isinstance(budget, str) else budget
    _require_one(wanted, predictor)
    if channels is None and tile is None:
        raise ConfigError("something must be chosen, found neither a tile nor channels.", hint="tile=(64, 128)")
    if channels is not None and _bounds_energy(wanted):
        raise ConfigError(
            f"tiles and channels share a budget of multiply-accumulates or latency, found {wanted}.",
            hint="--latency 60%, or --energy without --channels",
        )
    if channels is not None and search is not None:
        raise ConfigError("tiles and channels are chosen by one search of their own, found search= too.")
    if distill and fine_tuning is None:
        raise ConfigError("the dense model teaches while the cut one is tuned, found no fine_tuning.")
    _require_weight(power_weight, channels)
    if tile == "auto" and not wanted.bounds_latency:
        raise ConfigError(
            f"sizes of tiles are chosen by their predicted latency, which the budget must bound, found {wanted}.",
            hint="--latency 60% with a table, or --tiles 64x128",
        )
    interruption = Interruption(Path(checkpoint)) if isinstance(checkpoint, Path | str) else checkpoint
    if interruption is not None:
        interruption.require_own()
    validate(task, model)
    settings = TileSettings(
        budget=wanted,
        cutting=Cutting(tile, sizes, classifiers),
        channels=channels,
        search=search,
        power_weight=power_weight,
        batches=batches,
        refit=refit,
        fine_tuning=fine_tuning,
        distill=distill,
        threads=threads,
        most_rounds=most_rounds,
        measuring_rounds=measuring_rounds,
    )
    with ExitStack() as stack:
        target = _opened(board, predictor, stack)
        if kernel_graph is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="edgeprune-lower-")))
            kernel_graph = _lowered(model, example_inputs, backend, graph, predictor, target, folder)
        if predictor is not None:
            require_runtime(predictor, kernel_graph)
        stages = TileStages(
            model,
            example_inputs,
            task,
            kernel_graph,
            predictor,
            target,
            settings,
            interruption=interruption,
            plan_path=None if plan_path is None else Path(plan_path),
            progress=progress,
        )
        return stages.run()


def _require_weight(power_weight: float, channels: Channels | None) -> None:
    if not (math.isfinite(power_weight) and power_weight >= 0):
        raise ConfigError(f"the weight of power must be at least 0, found {power_weight}.")
    if power_weight and channels is not None:
        raise ConfigError(
            f"power is weighed where tiles alone are chosen, found channels beside them and a weight of {power_weight:g}.",
            hint="--power-weight without --channels",
        )


def _require_one(budget: Budget, predictor: Predictor | None) -> None:
    counted = budget.macs is not None or budget.macs_ratio is not None
    energy = _bounds_energy(budget)
    others = (budget.parameters, budget.parameters_ratio, budget.memory_bytes, budget.memory_ratio)
    if budget.bounds_latency + counted + energy != 1 or any(others):
        raise ConfigError(
            f"a budget of tiles must be one of multiply-accumulates, latency or energy, and nothing else, found {budget}.",
            hint="--macs 50%, or --latency 60% with a table",
        )
    if not counted and predictor is None:
        raise TableMissingError(
            f"tiles for {'an energy' if energy else 'a latency'} need a predictor of the board, found none.",
            hint="edgeprune profile, or a budget of multiply-accumulates",
        )


def _bounds_energy(budget: Budget) -> bool:
    return budget.energy_mj is not None or budget.energy_ratio is not None


def _opened(board: Board | str | None, predictor: Predictor | None, stack: ExitStack) -> Board | None:
    if board is None:
        return None
    from edgeprune.boards.board import Board
    from edgeprune.loop.verification import require_same_device

    target = stack.enter_context(Board.open(board)) if isinstance(board, str) else board
    if predictor is not None:
        require_same_device(predictor.table, target)
    return target


def _lowered(
    model: nn.Module,
    example_inputs: Any,
    backend: str,
    graph: ChannelGraph | None,
    predictor: Predictor | None,
    board: Board | None,
    folder: Path,
) -> KernelGraph:
    from edgeprune.graph.tracing import trace
    from edgeprune.lowering.kernel_graph import lower

    device = predictor.table.target() if predictor is not None else None if board is None else board.probe()
    return lower(graph or trace(model, example_inputs), backend, model=model, device=device, workdir=folder)
