"""The stages of a run with tiles: choose, cut, refit, tune, measure; the tuning goes on from an interrupted run."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.errors import ReconstructionError
from edgeprune.loop.dense import dense_latency
from edgeprune.loop.interruption import Interruption, common_identity
from edgeprune.loop.notes import limit_notes, missed_notes, round_notes, unverified_note
from edgeprune.loop.realizing import checked
from edgeprune.loop.tile_refit import calibration_of, refitted
from edgeprune.loop.tile_rounds import TilePlans, TriedPlans, tried_on
from edgeprune.loop.tile_ruin import known_loss, ruin_notes
from edgeprune.loop.tile_start import Cutting, Started, started
from edgeprune.loop.tile_untuned import Choice, Untuned
from edgeprune.loop.tiled_result import TiledResult, tiled_layers_of
from edgeprune.loop.verdicts import verdicts
from edgeprune.recovery.evaluation import RecoveryRecord, evaluate
from edgeprune.recovery.fine_tuning import FineTuning, fine_tune
from edgeprune.recovery.generators import Generators
from edgeprune.surgery.cutting import apply
from edgeprune.tasks.batches import device_of

if TYPE_CHECKING:
    from torch import nn

    from edgeprune.allocation.tiles.problem import TileAllocation, TileSearch
    from edgeprune.boards.board import Board
    from edgeprune.budget import Budget
    from edgeprune.criteria.tiles.curves import TileCurve
    from edgeprune.graph.channel_graph import ChannelGraph
    from edgeprune.latency.predictor import Predictor
    from edgeprune.loop.joint.choosing import Channels
    from edgeprune.loop.planning import Progress
    from edgeprune.loop.result import LatencyCheck
    from edgeprune.loop.tile_choosing import Chosen
    from edgeprune.lowering.kernel_graph import KernelGraph
    from edgeprune.surgery.plan import PruningPlan
    from edgeprune.tasks.task import Task

_log = logging.getLogger("edgeprune.loop")


@dataclass(frozen=True)
class TileSettings:
    """What steers a run with tiles; see `edgeprune.prune_tiles`.

    Attributes:
        budget: Of latency or multiply-accumulates.
        cutting: How layers are cut into tiles.
        channels: How channels are chosen beside them, or None.
        search: How many tiles each layer keeps, or None.
        power_weight: What power is worth beside damage.
        batches: Most training batches of each objective for scores and refitting.
        refit: Whether least squares is tried.
        fine_tuning: How the cut model is tuned, or None.
        distill: Whether the dense model teaches.
        threads: Of the board, or None for those of the table.
        most_rounds: Most plans that are tried on the board.
        measuring_rounds: Rounds of each comparison on the board.
    """

    budget: Budget
    cutting: Cutting
    channels: Channels | None
    search: TileSearch | None
    power_weight: float
    batches: int
    refit: bool
    fine_tuning: FineTuning | None
    distill: bool
    threads: int | None
    most_rounds: int
    measuring_rounds: int

    @property
    def tunes(self) -> bool:
        """Whether anything is tuned."""
        return self.fine_tuning is not None and self.fine_tuning.epochs > 0


class TileStages:
    """One run.

    Args:
        model: The dense model.
        example_inputs: As it was traced with.
        task: Data, loss and metric.
        kernel_graph: The model, lowered.
        predictor: Of the device, or None.
        board: Where engines are compared, or None.
        settings: What steers it.
        interruption: Folder for what an interrupted tuning goes on from, or None.
        plan_path: Where plans are written, or None.
        progress: Called with (step, done, in all).
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        task: Task,
        kernel_graph: KernelGraph,
        predictor: Predictor | None,
        board: Board | None,
        settings: TileSettings,
        *,
        interruption: Interruption | None = None,
        plan_path: Path | None = None,
        progress: Progress | None = None,
    ) -> None:
        self._model, self._example_inputs, self._task = model, example_inputs, task
        self._kernel_graph, self._predictor, self._board = kernel_graph, predictor, board
        self._settings, self._plan_path, self._progress = settings, plan_path, progress
        # Without tuning nothing can be interrupted that takes long.
        self._kept = interruption if settings.tunes else None

    def run(self) -> TiledResult:
        """All stages; raises what `edgeprune.prune_tiles` does."""
        identity = {} if self._kept is None else self._identity()
        begun, replaced = (None, "") if self._kept is None else self._kept.load(self._model, identity)
        if replaced:
            _log.warning("%s", replaced)
        generators = Generators.of(self._task, device_of(self._model))
        if begun is not None:
            untuned = Untuned.of(begun)
            self._write(untuned.plan)
            # Scores and metrics, which drew from them on the way, are there already.
            generators.restore(begun.generators)
        else:
            untuned = self._untuned().noting(replaced)
            if self._kept is not None and self._settings.fine_tuning is not None:
                self._kept.save(untuned.begun(self._settings.fine_tuning, generators.states()), identity)
        recovery = untuned.recovery
        if self._settings.tunes:
            tuned = fine_tune(
                untuned.module,
                self._task,
                self._settings.fine_tuning,
                teacher=self._model if self._settings.distill else None,
                checkpoint=None if self._kept is None else self._kept.checkpoint,
                progress=self._progress,
            )
            recovery = (*recovery, tuned)
        return self._result(untuned, recovery)

    def _identity(self) -> dict[str, Any]:
        """What makes a run the same as an interrupted one."""
        settings, examples = self._settings, self._kernel_graph.graph.example_inputs
        channels = settings.channels
        if channels is not None and not isinstance(channels.criterion, str):
            channels = replace(channels, criterion=channels.criterion.name)
        assert settings.fine_tuning is not None
        return {
            **common_identity(self._model, examples, settings.budget, self._predictor, self._task),
            "tiles": repr(settings.cutting),
            "channels": repr(channels),
            "search": None if settings.search is None else settings.search.name,
            "power": settings.power_weight,
            "calibration batches": settings.batches,
            "refit": settings.refit,
            "fine-tuning": asdict(settings.fine_tuning),
            "distillation": settings.distill,
            "most rounds": settings.most_rounds,
            "measuring rounds": settings.measuring_rounds,
            "board": self._board is not None,
        }

    def _untuned(self) -> Untuned:
        """Choose, try on the board, cut and refit."""
        settings, model, task = self._settings, self._model, self._task
        calibration = calibration_of(model, task, settings.batches)
        begin = started(
            model,
            self._example_inputs,
            self._kernel_graph,
            self._predictor,
            calibration.fitting,
            settings.cutting,
            settings.budget,
            channels=settings.channels,
            search=settings.search,
            power_weight=settings.power_weight,
            batches=settings.batches,
            progress=self._progress,
        )
        chosen = begin.choosing.choose(begin.choosing.at_most(settings.budget))
        self._write(chosen.plan)
        known = known_loss(model, calibration.fitting)
        for sentence in ruin_notes(chosen.allocation.damage, known):
            _log.warning("%s", sentence)
        tried, module = self._tried(begin, chosen)
        if tried is not None:
            chosen = tried.chosen
        self._write(chosen.plan)
        cut = apply(model, chosen.plan) if module is None else module
        difference, notes = checked(model, chosen.plan, self._example_inputs)
        before, after = evaluate(model, task), evaluate(cut, task)
        recovery = [RecoveryRecord("cut", before, after)]
        taken = False
        if settings.refit:
            try:
                better = refitted(model, chosen.plan, cut, task, calibration, after, progress=self._progress)
            except ReconstructionError as error:
                notes += (f"Layers were not refitted: {error.message}",)
            else:
                cut, taken = better.module, better.taken
                recovery.append(better.record)
                notes += (better.note,)
        return Untuned(
            module=cut,
            plan=chosen.plan,
            choice=self._choice(begin, chosen, tried, known, refitted=taken),
            difference=difference,
            notes=notes,
            recovery=tuple(recovery),
            metrics_before=before,
            rounds=() if tried is None else tried.closed.rounds,
            chosen=0 if tried is None else tried.closed.chosen,
            level_ms=None if tried is None else tried.closed.level_ms,
        )

    def _tried(self, begin: Started, chosen: Chosen) -> tuple[TriedPlans | None, nn.Module | None]:
        """The rounds on the board, where a latency is the budget and there is a board; and the cut model."""
        settings = self._settings
        if not settings.budget.bounds_latency or self._predictor is None or self._board is None:
            return None, None
        tried = tried_on(
            self._board,
            TilePlans(self._model, begin.choosing, self._predictor),
            chosen,
            settings.budget,
            most_rounds=settings.most_rounds,
            measuring_rounds=settings.measuring_rounds,
            progress=self._progress,
        )
        return tried, tried.closed.module

    def _choice(
        self, begin: Started, chosen: Chosen, tried: TriedPlans | None, known: float, *, refitted: bool
    ) -> Choice:
        choosing, allocation = begin.choosing, chosen.allocation
        dense_ms, ms, guesses = choosing.latencies(chosen.plan)
        rounds: tuple[str, ...] = ()
        if tried is not None:
            budget_ms = self._settings.budget.resolve_ms(tried.dense.ms)
            rounds = tuple(round_notes(tried.closed, tried.dense, budget_ms))
        return Choice(
            allocation=allocation,
            cost=chosen.cost,
            share=chosen.cost / choosing.dense,
            layers=tiled_layers_of(choosing.curves, chosen.plan),
            dense=_dense(self._model, self._kernel_graph.graph, choosing.curves, allocation, chosen.plan),
            sizes=begin.sizes,
            power_share=choosing.power_share(chosen.plan),
            power_of=choosing.power_of,
            dense_predicted_ms=dense_ms,
            predicted_ms=ms,
            refitted=refitted,
            round_notes=rounds,
            notes=(*begin.notes, *choosing.notes(chosen), *ruin_notes(allocation.damage, known), *guesses),
        )

    def _result(self, untuned: Untuned, recovery: tuple[RecoveryRecord, ...]) -> TiledResult:
        settings, choice = self._settings, untuned.choice
        metrics: Mapping[str, float] = recovery[0].after
        if len(recovery) > 1:
            metrics = evaluate(untuned.module, self._task)
        measured, lost = self._measured(untuned.module, untuned.level_ms)
        judged = verdicts(self._task, untuned.metrics_before, metrics)
        missed: Iterator[str] = iter(())
        dense_ms = budget_ms = None
        if untuned.rounds and self._predictor is not None:
            dense = dense_latency(self._predictor, self._kernel_graph)
            dense_ms, budget_ms = dense.ms, settings.budget.resolve_ms(dense.ms)
            if measured is not None:
                missed = missed_notes(settings.budget, dense, measured, choice.cost)
        return TiledResult(
            module=untuned.module,
            plan=untuned.plan,
            allocation=choice.allocation,
            share=choice.share,
            layers=choice.layers,
            dense=choice.dense,
            sizes=choice.sizes,
            power_share=choice.power_share,
            power_of=choice.power_of,
            check_max_abs=untuned.difference,
            metrics_before=untuned.metrics_before,
            metrics_after=metrics,
            recovery=recovery,
            refitted=choice.refitted,
            verdicts=judged,
            dense_predicted_ms=choice.dense_predicted_ms,
            predicted_ms=choice.predicted_ms,
            measured=measured,
            rounds=untuned.rounds,
            chosen=untuned.chosen,
            dense_ms=dense_ms,
            budget_ms=budget_ms,
            notes=(
                *untuned.notes,
                *choice.round_notes,
                *missed,
                *choice.notes,
                *limit_notes(judged),
                *_latency_notes(measured, lost, choice.predicted_ms),
            ),
        )

    def _write(self, plan: PruningPlan) -> None:
        if self._plan_path is not None:
            plan.save(self._plan_path)

    def _measured(self, pruned: nn.Module, level_ms: float | None) -> tuple[LatencyCheck | None, str]:
        """What the board says, or a clause on why it did not; none without a board."""
        if self._board is None:
            return None, ""
        from edgeprune.latency.chosen import Chosen as Meant
        from edgeprune.loop.verification import measure_ratio, ratio_or_lost

        board, header = self._board, None if self._predictor is None else self._predictor.table.header
        count = self._settings.threads or (1 if header is None else int(header["threads"]))
        which = None if header is None else Meant.of(header)
        return ratio_or_lost(
            board,
            lambda: measure_ratio(
                board,
                self._kernel_graph,
                pruned,
                threads=count,
                rounds=self._settings.measuring_rounds,
                chosen=which,
                level_ms=level_ms,
                progress=self._progress,
            ),
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


def _latency_notes(measured: LatencyCheck | None, lost: str, predicted_ms: float | None) -> Iterator[str]:
    if measured is None:
        yield unverified_note(lost, predicted=predicted_ms is not None)
    elif measured.ratio_low > 1:
        yield f"The tiled engine is slower than the dense one on {measured.board}: {measured.ratio:.1%} of its latency."
