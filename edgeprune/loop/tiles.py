"""`prune_tiles`: from a trained model with linear layers, and its task, to a model that some tiles of them are gone from."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.allocation.tiles.exact import ExactTiles
from edgeprune.budget import Budget
from edgeprune.errors import ConfigError, ReconstructionError, TableMissingError
from edgeprune.loop.closing import MOST_ROUNDS
from edgeprune.loop.lowering import require_runtime
from edgeprune.loop.notes import limit_notes, unverified_note
from edgeprune.loop.realizing import checked
from edgeprune.loop.tile_choosing import TileChoosing
from edgeprune.loop.tile_refit import calibration_of, refitted
from edgeprune.loop.tile_rounds import TilePlans, tried_on
from edgeprune.loop.tiled_result import TiledResult, tiled_layers_of
from edgeprune.loop.verdicts import verdicts
from edgeprune.recovery.evaluation import RecoveryRecord, evaluate
from edgeprune.recovery.fine_tuning import FineTuning, fine_tune
from edgeprune.surgery.cutting import apply
from edgeprune.tasks.batches import validate

if TYPE_CHECKING:
    from torch import nn

    from edgeprune.allocation.tiles.problem import TileAllocation, TileSearch
    from edgeprune.boards.board import Board
    from edgeprune.criteria.tiles.curves import TileCurve
    from edgeprune.graph.channel_graph import ChannelGraph
    from edgeprune.latency.predictor import Predictor
    from edgeprune.loop.joint.choosing import Channels
    from edgeprune.loop.planning import Progress
    from edgeprune.loop.result import LatencyCheck
    from edgeprune.loop.tile_choosing import Choosing
    from edgeprune.lowering.kernel_graph import KernelGraph
    from edgeprune.surgery.plan import PruningPlan
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
    tile: tuple[int, int] | None = TILE,
    sizes: Mapping[str, tuple[int, int]] | None = None,
    classifiers: bool = False,
    channels: Channels | None = None,
    search: TileSearch | None = None,
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
            `Budget.parse`), as predicted, where each layer costs what it makes the whole network slower. One of the two.
        task: Data, loss and metric. Training batches score, refit and tune, labels as the loss needs them.
        board: Where dense and pruned engines are compared; None leaves the latency unverified. With a latency as the budget
            what plans take there corrects the predictions, and a plan that misses the budget, or leaves more than 3 % of it
            unused, is followed by another one, as by `edgeprune.prune`.
        predictor: Fitted on a table of the board; needed by a latency.
        tile: Rows and columns of a tile, see `edgeprune.surgery.tiles.tile_grids`, as the next two. None, beside `channels`:
            no tiles, so that what channels alone come to is found by the same search.
        sizes: Other sizes for single weights.
        classifiers: Whether layers whose outputs are those of the model are cut, too.
        channels: How heads, head dimensions, hidden units and whole residual branches are chosen together with the tiles
            (`edgeprune.loop.joint.choosing`); None leaves channels as they are.
        search: How many tiles each layer keeps; `ExactTiles` when None. With `channels` there is one search for both.
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
        progress: Called with (step, done, in all).

    Raises:
        ConfigError: The budget is another one, or the model has no linear layer that can be cut into tiles; says why.
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
    if channels is not None and search is not None:
        raise ConfigError("tiles and channels are chosen by one search of their own, found search= too.")
    if distill and fine_tuning is None:
        raise ConfigError("the dense model teaches while the cut one is tuned, found no fine_tuning.")
    validate(task, model)
    with ExitStack() as stack:
        target = _opened(board, predictor, stack)
        if kernel_graph is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="edgeprune-lower-")))
            kernel_graph = _lowered(model, example_inputs, backend, graph, predictor, target, folder)
        if predictor is not None:
            require_runtime(predictor, kernel_graph)
        calibration = calibration_of(model, task, batches)
        choosing = _choosing(
            model,
            example_inputs,
            kernel_graph,
            predictor,
            calibration.fitting,
            (tile, sizes, classifiers),
            channels,
            search,
            batches=batches,
            latency=wanted.bounds_latency,
            progress=progress,
        )
        chosen = choosing.choose(choosing.at_most(wanted))
        if plan_path is not None:
            chosen.plan.save(plan_path)
        tried, module = None, None
        if wanted.bounds_latency and predictor is not None and target is not None:
            tried = tried_on(
                target,
                TilePlans(model, choosing, predictor),
                chosen,
                wanted,
                most_rounds=most_rounds,
                measuring_rounds=measuring_rounds,
                progress=progress,
            )
            chosen, module = tried.chosen, tried.closed.module
        plan = chosen.plan
        if plan_path is not None:
            plan.save(plan_path)
        cut = apply(model, plan) if module is None else module
        difference, notes = checked(model, plan, example_inputs)
        before, after = evaluate(model, task), evaluate(cut, task)
        recovery = [RecoveryRecord("cut", before, after)]
        taken = False
        if refit:
            try:
                better = refitted(model, plan, cut, task, calibration, after, progress=progress)
            except ReconstructionError as error:
                notes += (f"Layers were not refitted: {error.message}",)
            else:
                cut, taken = better.module, better.taken
                recovery.append(better.record)
                notes += (better.note,)
        if fine_tuning is not None and fine_tuning.epochs > 0:
            recovery.append(
                fine_tune(cut, task, fine_tuning, teacher=model if distill else None, progress=progress),
            )
        metrics = evaluate(cut, task) if len(recovery) > 1 else after
        level_ms = None if tried is None else tried.closed.level_ms
        measured, lost = _measured(target, kernel_graph, cut, predictor, threads, measuring_rounds, level_ms, progress)
        dense_ms, ms, guesses = choosing.latencies(plan)
        judged = verdicts(task, before, metrics)
        return TiledResult(
            module=cut,
            plan=plan,
            allocation=chosen.allocation,
            share=chosen.cost / choosing.dense,
            layers=tiled_layers_of(choosing.curves, plan),
            dense=_dense(model, kernel_graph.graph, choosing.curves, chosen.allocation, plan),
            check_max_abs=difference,
            metrics_before=before,
            metrics_after=metrics,
            recovery=tuple(recovery),
            refitted=taken,
            verdicts=judged,
            dense_predicted_ms=dense_ms,
            predicted_ms=ms,
            measured=measured,
            rounds=() if tried is None else tried.closed.rounds,
            chosen=0 if tried is None else tried.closed.chosen,
            notes=(
                *notes,
                *(() if tried is None else tried.notes(measured)),
                *choosing.notes(chosen),
                *guesses,
                *limit_notes(judged),
                *_latency_notes(measured, lost, ms),
            ),
        )


def _require_one(budget: Budget, predictor: Predictor | None) -> None:
    counted = budget.macs is not None or budget.macs_ratio is not None
    others = (budget.parameters, budget.parameters_ratio, budget.energy_mj, budget.energy_ratio)
    if budget.bounds_latency == counted or any((*others, budget.memory_bytes, budget.memory_ratio)):
        raise ConfigError(
            f"a budget of tiles must be one of multiply-accumulates or latency, and nothing else, found {budget}.",
            hint="--macs 50%, or --latency 60% with a table",
        )
    if budget.bounds_latency and predictor is None:
        raise TableMissingError(
            "tiles for a latency need a predictor of the board, found none.",
            hint="edgeprune profile, or a budget of multiply-accumulates",
        )


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


def _choosing(
    model: nn.Module,
    example_inputs: Any,
    kernel_graph: KernelGraph,
    predictor: Predictor | None,
    task: Task,
    tiles: tuple[tuple[int, int] | None, Mapping[str, tuple[int, int]] | None, bool],
    channels: Channels | None,
    search: TileSearch | None,
    *,
    batches: int,
    latency: bool,
    progress: Progress | None,
) -> Choosing:
    from edgeprune.allocation.tiles.costs import layer_tokens
    from edgeprune.criteria.tiles.curves import tile_curves
    from edgeprune.criteria.tiles.scores import tile_damage
    from edgeprune.criteria.tiles.sums import gradient_sums
    from edgeprune.surgery.tiles import tile_grids

    tile, sizes, classifiers = tiles
    grids = {} if tile is None else tile_grids(model, kernel_graph.graph, tile, sizes=sizes, classifiers=classifiers)
    tokens = layer_tokens(model, example_inputs, grids) if grids else {}
    if channels is not None:
        from edgeprune.loop.joint.choosing import JointChoosing

        return JointChoosing(
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
    if progress is not None:
        progress("scoring tiles", 0, 1)
    sums = gradient_sums(model, grids, task, batches=batches)
    curves = tile_curves(sums)
    if progress is not None:
        progress("scoring tiles", 1, 1)
    return TileChoosing(
        kernel_graph,
        predictor,
        curves,
        tokens,
        search or ExactTiles(),
        damages={name: tile_damage(one) for name, one in sums.items()},
        latency=latency,
        progress=progress,
    )


def _dense(
    model: nn.Module,
    graph: ChannelGraph,
    curves: Mapping[str, TileCurve],
    allocation: TileAllocation,
    plan: PruningPlan,
) -> dict[str, str]:
    from edgeprune.surgery.tiles import untiled

    gone = {name for branch in plan.removed for name in branch["tensors"]}
    found = {}
    for name, curve in curves.items():
        if name in plan.kept_tiles or name in plan.kept or name in gone:
            continue
        if curve.tiles == 1:
            found[name] = "it is no larger than a tile"
        elif allocation.counts[name] < curve.tiles:
            found[name] = "it is predicted to be no slower with all of its tiles"
        else:
            found[name] = "the removal of its tiles costs the task more than that of others within the budget"
    return {**found, **{name: why for name, why in untiled(model, graph).items() if name not in curves}}


def _measured(
    board: Board | None,
    kernel_graph: KernelGraph,
    pruned: nn.Module,
    predictor: Predictor | None,
    threads: int | None,
    rounds: int,
    level_ms: float | None,
    progress: Progress | None,
) -> tuple[LatencyCheck | None, str]:
    """What the board says, or a clause on why it did not; none without a board."""
    if board is None:
        return None, ""
    from edgeprune.latency.chosen import Chosen
    from edgeprune.loop.verification import measure_ratio, ratio_or_lost

    header = None if predictor is None else predictor.table.header
    count = threads or (1 if header is None else int(header["threads"]))
    which = None if header is None else Chosen.of(header)
    return ratio_or_lost(
        board,
        lambda: measure_ratio(
            board,
            kernel_graph,
            pruned,
            threads=count,
            rounds=rounds,
            chosen=which,
            level_ms=level_ms,
            progress=progress,
        ),
    )


def _latency_notes(measured: LatencyCheck | None, lost: str, predicted_ms: float | None) -> Iterator[str]:
    if measured is None:
        yield unverified_note(lost, predicted=predicted_ms is not None)
    elif measured.ratio_low > 1:
        yield f"The tiled engine is slower than the dense one on {measured.board}: {measured.ratio:.1%} of its latency."
