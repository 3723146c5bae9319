"""`prune`: choose widths for a latency budget, cut, recover, and let the board have the last word."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.budget import Budget
from edgeprune.errors import ConfigError, TableMissingError
from edgeprune.loop.closing import MOST_ROUNDS
from edgeprune.loop.dense import dense_latency
from edgeprune.loop.interruption import Interruption
from edgeprune.loop.limits import limits_of
from edgeprune.loop.lowering import lowered, require_runtime
from edgeprune.loop.planning import ALLOCATOR, Planner, Progress
from edgeprune.loop.realizing import CALIBRATION_BATCHES, Refit
from edgeprune.loop.result import Result
from edgeprune.loop.settings import Settings
from edgeprune.loop.stages import Stages
from edgeprune.recovery.fine_tuning import FineTuning
from edgeprune.recovery.precision import MixedPrecision
from edgeprune.recovery.taps import require_known
from edgeprune.recovery.teaching import Distillations, made
from edgeprune.spec import Constraints
from edgeprune.surgery.constraints import require_possible
from edgeprune.tasks import ranks
from edgeprune.tasks.batches import device_of

if TYPE_CHECKING:
    from torch import nn

    from edgeprune.allocation._base import Allocator
    from edgeprune.boards.board import Board
    from edgeprune.criteria._base import Criterion
    from edgeprune.criteria.calibration import DamageCalibration
    from edgeprune.graph.channel_graph import ChannelGraph
    from edgeprune.latency.predictor import Predictor
    from edgeprune.loop.multitask.pagcp import Pagcp
    from edgeprune.loop.multitask.per_task import PerTask
    from edgeprune.loop.netadapt import NetAdapt
    from edgeprune.loop.searched import Search
    from edgeprune.loop.soft_masking import SoftMasking
    from edgeprune.lowering.kernel_graph import KernelGraph
    from edgeprune.recovery.distillation._base import Distillation
    from edgeprune.tasks.task import Task

MARGIN = 0.02
"""Share of the budget that the aim stays below it, because predictions and measurements scatter."""


def prune(
    model: nn.Module,
    example_inputs: Any,
    budget: Budget | str,
    board: Board | str | None = None,
    predictor: Predictor | None = None,
    task: Task | None = None,
    constraints: Constraints | None = None,
    *,
    criterion: str | Criterion | None = None,
    allocator: str | Allocator = ALLOCATOR,
    calibrate_damage: DamageCalibration | None = None,
    blocks: bool = False,
    backend: str = "onnxruntime",
    margin: float = MARGIN,
    fine_tuning: FineTuning | None = None,
    distill: bool | Distillations = False,
    taps: Sequence[str] = (),
    refit: Refit = False,
    calibration_batches: int | None = CALIBRATION_BATCHES,
    soft_masking: SoftMasking | None = None,
    netadapt: NetAdapt | None = None,
    pagcp: Pagcp | None = None,
    per_task: PerTask | None = None,
    graph: ChannelGraph | None = None,
    kernel_graph: KernelGraph | None = None,
    planner: Planner | None = None,
    plan_path: Path | str | None = None,
    most_rounds: int = MOST_ROUNDS,
    measuring_rounds: int = 20,
    earlier: Result | None = None,
    checkpoint: Interruption | Path | str | None = None,
    progress: Progress | None = None,
) -> Result:
    """Prune a model to a budget: of latency, and of other costs at the same time.

    The first plan, with its prediction, is made and (with `plan_path`) written before any pruned model is compiled or timed.
    With a board the loop is closed: the cut model is timed there, interleaved with the dense one; what it took corrects the
    predictions, and a plan that misses the budget, or leaves more of it unused than 3 %, is followed by another one. Latency
    does not depend on the values of weights, so only the plan that is taken is tuned, and what is handed over is measured once
    more. The model itself is not changed.

    Args:
        model: The dense model.
        example_inputs: Tensor, tuple or dict; fixes the deployment batch.
        budget: Upper bound of the latency; a share is one of the dense model's latency, measured where the predictor's table
            holds it (`dense_latency`), of the median, percentile or state that the table was chosen for
            (`LatencyTable.chosen`). Text as in `Budget.parse`. Parameters, multiply-accumulates and memory are counted, energy
            is predicted; none is measured, and only the exact allocator keeps them.
        board: Where dense and pruned engines are compared; None leaves the latency predicted only.
        predictor: Fitted on a table of the board.
        task: Data, loss and metric, of one objective or several. Without it scores are data-free, nothing is recovered, and
            accuracy is not measured. Limits of objectives are judged in the end (`Result.verdicts`); `pagcp` and `per_task`
            choose widths by them.
        constraints: What widths must respect.
        criterion: Importance of channels; ``"taylor"`` with a task and ``"l2"`` without one when None.
        allocator: How widths are chosen.
        calibrate_damage: How damage is put on the scale of a few measured losses (``DamageCalibration()``), which makes groups
            comparable under any criterion; needs a task. None leaves it as the criterion gives it.
        blocks: Whether whole residual branches may go too. What that costs is the loss measured without each of them, and all
            damage is put on that scale, so it needs a task; it is then measured once more beside the plan
            (`edgeprune.loop.in_context`), which takes some minutes for a network of fifty layers, or with `refit` by refitting
            a few plans (`edgeprune.loop.after_refit`).
        backend: Runtime of the engines, where there is no `kernel_graph`.
        margin: Share of the budget that the predicted latency stays below it.
        fine_tuning: How the cut model is tuned on the task; ``FineTuning(epochs=0)`` only re-estimates batch norm.
        distill: By which losses the dense model teaches the cut one: ``"logits"``, ``"features"``, ``"channelwise"``,
            ``"attention"``, several of them, or objects (`edgeprune.recovery.distillation`); True is its logits.
        taps: Modules whose values are compared by all but the logits; the ends of stages where there are none.
        refit: Whether the layers of the cut model are refitted by least squares before they are tuned
            (`edgeprune.recovery.reconstruction`), or, with ``"biases"``, given the biases that make up for the mean of what was
            removed (`edgeprune.recovery.bias_compensation`); needs a task, and no labels.
        calibration_batches: Most training batches for batch-norm re-estimation.
        soft_masking: Whether some of the epochs of `fine_tuning` are trained under masks before the cut, while widths and units
            are chosen again and again (`edgeprune.loop.soft_masking`). The first plan is made without it, sets the latency to aim
            at, and is replaced.
        netadapt: Whether the first plan is replaced by one that is found by a greedy search with short tunings
            (`edgeprune.loop.netadapt`), a baseline that takes long.
        pagcp: Whether the first plan is replaced by one that is found layer by layer under the limits of the task's objectives
            (`edgeprune.loop.multitask.pagcp`).
        per_task: Whether the first plan is replaced by one from the exact allocator with a damage curve per objective, in which
            the worst objective, in units of its limit, loses least (`edgeprune.loop.multitask.per_task`).
        graph: The traced model, where the caller has it.
        kernel_graph: The lowered model, where the caller has it.
        planner: Where the caller has one of this model: with its scores, predictor, task and everything else that it
            holds, none of which may then be given too. It serves many budgets, each at prices of its own (`Planner.about`),
            with its damage as it is: where blocks may go, `Planner.settled` is for the caller to ask.
        plan_path: Where the plan is written.
        most_rounds: Most plans that are tried on the board.
        measuring_rounds: Rounds of each comparison on the board.
        earlier: What an earlier call of this model, budget and settings came to whose last plan was not measured: the loop goes
            on with that plan, and a model that was tuned for the plan that is taken is not tuned again.
        checkpoint: Folder of its own for what an interrupted tuning goes on from. The same call then takes the plan that was
            measured, and tunes on from the last finished epoch, to the weights that it would have come to without the
            interruption. It is there from the beginning of the tuning on; whoever has stored the result removes it.
        progress: Called with (step, done, in all).

    Raises:
        ConfigError: The budget or margin is none, settings do not go together, the checkpoint's folder holds something else, a
            planner comes with what it holds already, the earlier result is of another model or budget, or has nothing left to
            measure, or several processes (``torchrun``) prune at once.
        TableMissingError: There is no predictor.
        TableMismatchError: The predictor is of another device or runtime than the board or backend.
        BudgetInfeasibleError: No widths meet the budget; says what the smallest plan found reaches.
        EmptyPlanError: The model has nothing that can be pruned.
        ConstraintError: A constraint matches nothing.
        TaskError: The task cannot be used.
        SurgeryError: The cut model does not equal the masked one.
        RemoteError: The board is not there at the start; one that is lost later leaves a result that says so.
    """
    from edgeprune.boards.board import Board
    from edgeprune.latency.predictor import Predictor

    if ranks.count() > 1:
        raise ConfigError(
            f"pruning must run in one process, found {ranks.count()}; what several can do together is the tuning.",
            hint="prune with FineTuning(epochs=0), then edgeprune.recovery.fine_tuning.fine_tune under torchrun",
        )
    chosen = Budget.parse(budget) if isinstance(budget, str) else budget
    if not 0 <= margin < 1:
        raise ConfigError(f"the margin must be a share in [0, 1), found {margin}.")
    if planner is not None:
        if chosen.bounds_more:
            raise ConfigError("a planner must be made with limits besides the latency, found some in the budget too.")
        given = (predictor, task, constraints, criterion, calibrate_damage, graph, kernel_graph)
        set_otherwise = any(option is not None for option in given) or allocator != ALLOCATOR or blocks
        if planner.model is not model or set_otherwise:
            raise ConfigError(
                "a planner must be given with its own model and without predictor, task, constraints, criterion, allocator, "
                "calibrate_damage, blocks, graph and kernel_graph, which it holds, found another model or one of these."
            )
        predictor, task, kernel_graph = planner.predictor, planner.task, planner.kernel_graph
    if predictor is None:
        raise TableMissingError(
            "pruning to a latency needs a predictor of the board, found none.",
            hint="edgeprune profile, then edgeprune fit",
        )
    if not isinstance(predictor, Predictor):
        raise ConfigError(
            f"the predictor must be one that was fitted to a latency table, found {type(predictor).__name__}.",
            hint="predictor=edgeprune.fit(table)",
        )
    if earlier is not None and board is None:
        raise ConfigError("going on with an earlier result needs a board to measure on, found none.")
    if refit not in (True, False, "biases"):
        raise ConfigError(f"refit must be True, False or 'biases', found {refit!r}.")
    if refit and task is None:
        raise ConfigError("refitting layers needs a task, for its data, found none.", hint="--task FILE.py:FACTORY")
    interruption = Interruption(Path(checkpoint)) if isinstance(checkpoint, Path | str) else checkpoint
    if interruption is not None:
        interruption.require_own()
    losses = _losses(distill, fine_tuning)
    if losses and task is None:
        raise ConfigError("the dense model teaches by a task's data, found no task.", hint="--task FILE.py:FACTORY")
    if taps and not any(one.reads == "features" for one in losses):
        raise ConfigError(
            "taps are where features are compared, found taps and no distillation that compares them.",
            hint="--distill features",
        )
    searches: dict[str, SoftMasking | NetAdapt | Pagcp | PerTask | None] = {
        "soft masking": soft_masking,
        "netadapt": netadapt,
        "pagcp": pagcp,
        "damage per objective": per_task,
    }
    search = _search(searches, task, refit=bool(refit))
    if task is not None:
        from edgeprune.tasks.batches import validate

        validate(task, model)
    settings = Settings(
        budget=chosen,
        margin=margin,
        fine_tuning=fine_tuning or FineTuning(),
        distillations=losses,
        taps=tuple(taps),
        refit=refit,
        blocks=blocks,
        search=search,
        calibration_batches=calibration_batches,
        most_rounds=most_rounds,
        measuring_rounds=measuring_rounds,
    )
    with ExitStack() as stack:
        target = None
        if board is not None:
            from edgeprune.loop.verification import require_same_device

            target = stack.enter_context(Board.open(board)) if isinstance(board, str) else board
            require_same_device(predictor.table, target)
        if constraints is not None:
            require_possible(constraints, model)
        if kernel_graph is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="edgeprune-lower-")))
            kernel_graph = lowered(
                model, example_inputs, backend, predictor, graph=graph, folder=folder, progress=progress
            )
        require_runtime(predictor, kernel_graph)
        if blocks and kernel_graph.backend.precision != "fp32":
            raise ConfigError(
                f"what removing whole blocks saves is known of fp32 engines, found {kernel_graph.backend.precision}.",
                hint="without --blocks, or a table of fp32",
            )
        if planner is None:
            planner = Planner(
                model,
                kernel_graph,
                predictor,
                task=task,
                constraints=constraints,
                criterion=criterion,
                allocator=allocator,
                calibrate_damage=calibrate_damage,
                blocks=blocks,
                limits=limits_of(chosen, kernel_graph, predictor),
                about_ms=_about_ms(chosen, predictor, kernel_graph),
                progress=progress,
            )
        elif (about_ms := _about_ms(chosen, predictor, kernel_graph)) is not None:
            planner = planner.about(about_ms)
        # Refused now rather than when the tuning begins.
        require_known(planner.graph, taps)
        MixedPrecision(settings.fine_tuning.precision, device_of(model))
        stages = Stages(
            planner,
            settings,
            example_inputs,
            board=target,
            earlier=earlier,
            interruption=interruption,
            plan_path=None if plan_path is None else Path(plan_path),
            progress=progress,
        )
        return stages.run()


def _about_ms(budget: Budget, predictor: Predictor, kernel_graph: KernelGraph) -> float | None:
    """What the predictor is to say of plans that meet the budget; None where the dense model does."""
    dense = dense_latency(predictor, kernel_graph)
    budget_ms = budget.resolve_ms(dense.ms)
    return None if budget_ms >= dense.ms else dense.predicted_ms * budget_ms / dense.ms


def _losses(distill: bool | Distillations, settings: FineTuning | None) -> tuple[Distillation, ...]:
    if not distill:
        return ()
    return made("logits" if distill is True else distill, (settings or FineTuning()).temperature)


def _search(
    searches: Mapping[str, SoftMasking | NetAdapt | Pagcp | PerTask | None], task: Task | None, *, refit: bool
) -> Search | None:
    """What chooses widths while it looks at data, or trains, if anything does."""
    asked = {name: search for name, search in searches.items() if search is not None}
    if not asked:
        return None
    if len(asked) > 1:
        raise ConfigError(
            f"{' and '.join(asked)} each choose the widths, found that both are asked for.",
            hint=f"{next(iter(asked))} alone",
        )
    (name, search), *_ = asked.items()
    if task is None:
        raise ConfigError(f"{name} needs a task, for its data, found none.", hint="--task FILE.py:FACTORY")
    if refit and search.trains:
        raise ConfigError(
            f"layers are refitted to the dense model's outputs, which {name} has trained away from, found both asked for.",
            hint=f"{name} without --refit and --refit-biases",
        )
    return search
