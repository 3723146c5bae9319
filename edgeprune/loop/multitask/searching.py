"""The search of `edgeprune.loop.multitask.pagcp`, from the dense model to a plan under all limits."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from edgeprune.allocation._base import rounded_up_ms, unproven
from edgeprune.errors import BudgetInfeasibleError
from edgeprune.loop.multitask.calibration_data import CalibrationData
from edgeprune.loop.multitask.commits import Commit, State
from edgeprune.loop.multitask.journal import Journal, identity_of_search
from edgeprune.loop.multitask.layers import Layers, energy_limit, evenly_cut, narrowed
from edgeprune.loop.multitask.looking import Looking
from edgeprune.loop.multitask.magnitudes import mean_magnitudes
from edgeprune.loop.multitask.narrowing import Narrowing
from edgeprune.loop.multitask.pagcp import PUBLISHED_RATE
from edgeprune.loop.multitask.rooms import Rooms
from edgeprune.loop.multitask.tolerances import Tolerances, tolerances
from edgeprune.loop.searched import Searched
from edgeprune.loop.serving import served
from edgeprune.recovery.evaluation import RecoveryRecord, evaluate
from edgeprune.recovery.fine_tuning import FineTuning, fine_tune
from edgeprune.recovery.generators import Generators
from edgeprune.surgery.writing_back import write_back
from edgeprune.tasks.batches import device_of
from edgeprune.tasks.task import Task

if TYPE_CHECKING:
    from edgeprune.allocation.choices import Choice
    from edgeprune.criteria._base import Scores
    from edgeprune.loop.multitask.pagcp import Pagcp
    from edgeprune.loop.planning import Planner, Progress, Proposal
    from edgeprune.recovery.distillation._base import Distillation

_LEAST_SHARE = 1e-12
"""Of the largest score: what units that are worth nothing have, so that those that are kept can be told from the others."""

_log = logging.getLogger("edgeprune.loop")


class LimitedSearch:
    """One search.

    Args:
        settings: How.
        planner: Of the dense model, with a task.
        tuning: How the model is tuned between rounds.
        distill: Losses on the outputs by which the dense model teaches then.
        checkpoint: Folder for what an interrupted search goes on from.
        progress: Called with (step, layers done, in all).

    Raises:
        TaskError: The task cannot be used, or an objective depends on nothing that can be pruned.
    """

    def __init__(
        self,
        settings: Pagcp,
        planner: Planner,
        tuning: FineTuning,
        *,
        distill: Sequence[Distillation],
        checkpoint: Path | None,
        progress: Progress | None,
    ) -> None:
        assert planner.task is not None
        self.settings, self.planner, self.tuning, self.progress = settings, planner, tuning, progress
        self.task, self.graph, self.cost = planner.task, planner.graph, planner.cost
        self.teacher, self.distill = planner.model if distill else None, tuple(distill)
        self.model = copy.deepcopy(planner.model)
        self.layers = Layers(planner, compat=settings.compat)
        self.choices = self.layers.choices
        self.names = [one.name for one in self.task.objectives]
        # Per decision, by its first group, the objectives that it matters to.
        self.serves = served(self.task, planner.model, self.graph, self.choices)
        self.data = CalibrationData(
            self.task, device_of(self.model), settings.batches, settings.metric_batches, tuning.seed
        )
        self.journal = Journal(
            checkpoint,
            identity_of_search(settings, planner, tuning, self.distill),
            Generators.of(self.task, device_of(self.model)),
        )
        self.looking = Looking(
            self.model,
            self.graph,
            self.data,
            batch_statistics=not settings.compat,
            journal=self.journal,
            seed=tuning.seed,
        )
        self.history: list[dict[str, Any]] = []
        self.used: list[dict[str, float]] = []
        self.stopped = dict.fromkeys(self.names, 0)
        self.done = 0

    def run(self, proposal: Proposal) -> Searched:
        """See `Pagcp.search`."""
        validation = evaluate(self.planner.model, self.task)
        widths = self.graph.widths()
        kept = {name: tuple(range(size)) for name, size in widths.items()}
        aim_ms, scores, rounds = proposal.aim_ms, self._scores(self.model, 0), 0
        state = self._begun(State(widths, kept, {}), scores)
        self.one_pass = self.looking.multiply_accumulates or 1.0
        limited = any(one.limit is not None for one in self.task.objectives)
        dense = self.looking.metrics(kept) if limited else {}
        self.rooms = Rooms(self.task, validation, dense, self.settings.epsilon)
        while True:
            rounds += 1
            state = self._round(state, scores, aim_ms, rounds)
            if self.rooms.limited:
                self.used.append(self.rooms.used(self.looking.metrics(state.kept)))
            if self.layers.met(state.widths, aim_ms) or rounds == self.settings.rounds or not self.settings.trains:
                break
            tuned = self._tuned(state, rounds)
            if tuned is None:
                break
            state, scores = tuned
        if not self.layers.met(state.widths, aim_ms):
            return self._otherwise(state, proposal, validation)
        return self._found(state, scores, aim_ms, validation, rounds)

    def _round(self, state: State, scores: Scores, aim_ms: float, number: int) -> State:
        """Cut each layer once, as far as it may; then give back what is not needed."""
        contributions = {choice.groups[0]: self.layers.contribution(choice, state.widths) for choice in self.choices}
        layers = [one for one in self.choices if contributions[one.groups[0]] > 0 and self.serves[one.groups[0]]]
        if not layers:
            return state
        if self.settings.compat:
            self.rooms.multiply(state.losses)
            totals = dict.fromkeys(self.names, self.settings.tolerance)
        else:
            self.rooms.fit(state.losses, self._pairs(state, scores, layers))
            totals = self.rooms.totals(state.losses)
        rate = self.settings.initial_rate or (PUBLISHED_RATE if self.settings.compat else math.inf)
        allowed = {name: tolerances(total, len(layers), rate) for name, total in totals.items()}
        # Where tolerances fall from layer to layer, those that contribute most come first.
        falling = allowed[min(totals, key=lambda name: totals[name])].factor <= 1
        layers.sort(key=lambda one: contributions[one.groups[0]], reverse=falling)
        found = [*self._sweep(state, layers, scores, allowed, number)]
        while not (self.settings.compat or self.layers.met(self._last(found, state).widths, aim_ms)):
            # What is left of the rooms may go to any layer.
            more = [*self._sweep(self._last(found, state), layers, scores, None, number)]
            if not more:
                break
            found += more
        state = self._filtered(self._last(found, state), state, [commit for commit, _ in found], scores, aim_ms)
        _log.info("round %d: %.4g ms under the limits, aimed at %.4g ms", number, self.cost.ms(state.widths), aim_ms)
        return state

    @staticmethod
    def _last(found: Sequence[tuple[Commit, State]], begun: State) -> State:
        return found[-1][1] if found else begun

    def _sweep(
        self,
        state: State,
        layers: Sequence[Choice],
        scores: Scores,
        allowed: Mapping[str, Tolerances] | None,
        number: int,
    ) -> Iterator[tuple[Commit, State]]:
        """Cut each layer as far as it may; without tolerances as far as its limits allow.

        As published, a tolerance is for the loss as the commit before has left it, and is lost where a layer does not use it up.
        Otherwise what layers may add counts from the beginning, so that the next ones have what is left.
        """
        compat = self.settings.compat
        base, tolerated, place = dict(state.losses), dict.fromkeys(self.names, 1.0), 0
        for choice in layers:
            if allowed is None:
                tolerated = dict.fromkeys(self.names, math.inf)
            else:
                tolerated = {
                    name: (1.0 if compat else tolerated[name]) * (1 + several[place])
                    for name, several in allowed.items()
                }
            after = Narrowing(
                self.settings,
                self.looking,
                self.rooms,
                state,
                choice,
                self.layers.narrower(choice, state.widths),
                scores,
                self.serves[choice.groups[0]],
                base,
                tolerated,
                self.stopped,
            ).run()
            if after is not None:
                yield self._commit(choice, state, after, number), after
                state = after
                if compat:
                    base = {name: max(base[name], loss) for name, loss in state.losses.items()}
            # As published, a layer of which nothing can go hands its tolerance on.
            place += after is not None or not compat
            self.done += 1
            if self.progress is not None:
                total = self.settings.rounds * len(layers)
                self.progress("searching under the limits", self.done, max(self.done, total))

    def _commit(self, choice: Choice, before: State, after: State, number: int) -> Commit:
        name = choice.groups[0]
        found = Commit(
            choice,
            before.widths[name],
            self.rooms.increase(before.losses, after.losses),
            self.layers.cost(before.widths) - self.layers.cost(after.widths),
        )
        self.history.append(
            {
                "round": number,
                "group": name,
                "width": after.widths[name],
                "predicted_ms": self.cost.ms(after.widths),
                "losses": dict(after.losses),
                "widths": dict(after.widths),
            }
        )
        _log.info(
            "%s goes to %d: %.4g ms, losses %s", name, after.widths[name], self.cost.ms(after.widths), after.losses
        )
        return found

    def _filtered(self, state: State, begun: State, commits: Sequence[Commit], scores: Scores, aim_ms: float) -> State:
        """Without the cuts that cost most per what they save: a share of them, or as many as the latency does not need."""
        layers: dict[str, Commit] = {}
        for commit in commits:
            name = commit.choice.groups[0]
            layers[name] = layers[name].with_more(commit) if name in layers else commit
        worst_first = sorted(layers.values(), key=lambda one: one.price, reverse=True)
        widths = dict(state.widths)
        if self.settings.compat:
            for one in worst_first[: len(layers) - math.ceil(self.settings.top * len(layers))]:
                widths |= dict.fromkeys(one.choice.groups, one.before)
        elif self.layers.met(widths, aim_ms):
            for one in worst_first:
                now = widths[one.choice.groups[0]]
                whole = {**widths, **dict.fromkeys(one.choice.groups, one.before)}
                wider = [width for width in self.layers.narrower(one.choice, whole) if width > now]
                for width in (one.before, *wider):
                    tried = {**widths, **dict.fromkeys(one.choice.groups, width)}
                    if self.layers.met(tried, aim_ms):
                        widths = tried
                        break
        if widths == state.widths:
            return state
        kept = narrowed(begun.kept, scores, widths)
        if self.rooms.limited and self.rooms.broken(self.looking.metrics(kept)):
            return state
        return State(widths, kept, {})

    def _tuned(self, state: State, number: int) -> tuple[State, dict[str, npt.NDArray[np.float64]]] | None:
        """The cut model tuned for a while, and new scores; None where that does not help."""
        plan, module = self.looking.plan(state.kept), self.looking.cut(state.kept)
        second = self.data.metrics
        # The validation data are not even looked at on the way.
        task = Task(
            tuple(replace(one, validation=second.objective(one.name).validation) for one in self.task.objectives)
        )
        path = self.journal.checkpoint(f"round-{number}")
        fine_tune(module, task, self.tuning, teacher=self.teacher, distillation=self.distill, checkpoint=path)
        if self.rooms.broken(self.looking.metrics_of(module)):
            return None
        write_back(self.model, module, plan)
        left = copy.deepcopy(self.model)
        with torch.no_grad():
            for parameter in left.parameters():
                parameter.zero_()
        write_back(left, module, plan)
        scores = self._scores(left, number)
        return self._begun(state, scores), scores

    def _begun(self, state: State, scores: Scores) -> State:
        """The model as a round finds it, looked at whole; others are looked at beside it from here on."""
        others = []
        for choice in self.choices if self.settings.cached else ():
            narrower = self.layers.narrower(choice, state.widths)
            if narrower and self.serves[choice.groups[0]]:
                others.append(narrowed(state.kept, scores, dict.fromkeys(choice.groups, narrower[-1])))
        looked = self.looking.begin(state.kept, others, stops=self.settings.early_stop > 0)
        return replace(state, losses=looked.losses)

    def _scores(self, model: torch.nn.Module, number: int) -> dict[str, npt.NDArray[np.float64]]:
        """What a model's units are worth; in one that was tuned, those that were cut are 0."""
        movable = [name for choice in self.choices for name in choice.groups]
        if self.settings.compat:
            return mean_magnitudes(self.graph, model, movable)

        def score() -> dict[str, list[float]]:
            found = (
                self.planner.scores
                if number == 0
                else self.planner.criterion.score(self.graph, model, self.task, groups=movable)
            )
            return {name: [float(value) for value in found[name]] for name in found}

        found = self.journal.recall(["scores", number], score, draws=True)
        return {name: np.array(values, dtype=np.float64) for name, values in found.items()}

    def _found(
        self, state: State, scores: Scores, aim_ms: float, validation: dict[str, float], rounds: int
    ) -> Searched:
        """The plan, and a planner that keeps first what it keeps."""
        ranked = {}
        for name, values in scores.items():
            gone = np.ones(len(values), dtype=bool)
            gone[list(state.kept[name])] = False
            ranked[name] = np.maximum(values, _LEAST_SHARE * (values.max() or 1.0))
            if gone.any():
                ranked[name][gone] *= 0.5 * ranked[name][~gone].min() / ranked[name][gone].max()
        criterion = "l1" if self.settings.compat else self.planner.criterion
        planner = self.planner.rescored(self.model, ranked, criterion=criterion)
        predicted_ms = self.cost.ms(state.widths)
        allocation = unproven(
            "pagcp",
            dict(state.widths),
            budget_ms=aim_ms,
            predicted_ms=predicted_ms,
            damage=sum(float(planner.damage[name][state.widths[name]]) for name in ranked),
            evaluations=self.looking.looks,
            note=f"layers were narrowed one after another under the limits, by {self.looking.looks} looks; nothing is proven.",
        )
        proposal = planner.proposal(allocation, aim_ms, self.looking.plan(state.kept))
        details = {
            "rounds": rounds,
            "looks": self.looking.looks,
            "stopped_looks": self.looking.stops,
            "multiply_accumulates": self.looking.multiply_accumulates,
            "passes": self.looking.multiply_accumulates / self.one_pass,
            "steps": self.history,
            "stopped": self.stopped,
            "used_by_round": self.used,
        }
        record = RecoveryRecord("pagcp", validation, evaluate(self.looking.cut(state.kept), self.task), details)
        stopped = ", ".join(f"{name} {count}" for name, count in self.stopped.items())
        looking = self.looking
        note = (
            f"PAGCP: {len(self.history)} cuts in {rounds} round{'s' if rounds > 1 else ''}, by {looking.looks} looks "
            f"({looking.stops} stopped early), which took {looking.multiply_accumulates:.3g} multiply-accumulates, as many as "
            f"{looking.multiply_accumulates / self.one_pass:.1f} passes of the dense model over their data; how often each "
            f"objective stopped a layer: {stopped}."
        )
        return Searched(planner, proposal, record, (note,))

    def _otherwise(self, state: State, proposal: Proposal, validation: dict[str, float]) -> Searched:
        """The plan by damage alone, if it happens to keep all limits; the search is no proof.

        Raises:
            BudgetInfeasibleError: It does not.
        """
        dense = {name: tuple(range(size)) for name, size in self.graph.widths().items()}
        kept = dense | {name: tuple(group["kept"]) for name, group in proposal.plan.groups.items()}
        first = Looking(self.planner.model, self.graph, self.data, batch_statistics=not self.settings.compat)
        metrics = first.metrics(kept)
        broken = self.rooms.broken(metrics)
        if not broken and not self.settings.compat:
            record = RecoveryRecord(
                "pagcp", validation, evaluate(first.cut(kept), self.task), {"looks": self.looking.looks}
            )
            note = "PAGCP did not reach the latency under the limits; the plan by damage alone does, and was taken."
            return Searched(self.planner, proposal, record, (note,))
        best_ms = self.cost.ms(state.widths)
        binding = max(self.stopped, key=lambda name: self.stopped[name])
        why = f"{binding} stopped most layers" if self.stopped[binding] else "no objective stopped a layer"
        would_do = " ".join(f"--limit {name}={self.rooms.needed(name, metrics[name])}" for name in broken)
        asked = ", ".join(f"{one.name}={one.limit}" for one in self.task.objectives if one.limit is not None)
        energy = energy_limit(self.planner)
        if energy is not None and best_ms <= proposal.aim_ms:
            best = energy.cost.value(state.widths)
            must, found, option = f"energy must be <= {energy.at_most:.4g} mJ", f"{best:.4g} mJ", "--energy {}mJ"
        else:
            # A plan aims somewhat below its budget.
            best = 1.03 * best_ms
            must, found, option = f"latency must be <= {proposal.aim_ms:.4g} ms", f"{best_ms:.4g} ms", "--latency {}ms"
        raise BudgetInfeasibleError(
            f"{must}, the smallest plan found under the limits ({asked or f'a tolerance of {self.settings.tolerance:g}'}) "
            f"takes {found}; {why}.",
            best_ms=best_ms,
            widths=state.widths,
            hint=f"{option.format(rounded_up_ms(best))}{f', or {would_do}, or more rounds' if would_do else ''}",
        )

    def _pairs(
        self, state: State, scores: Scores, layers: Sequence[Choice]
    ) -> list[tuple[dict[str, float], dict[str, float]]]:
        """Losses and metrics of models whose layers are all cut by the same share, more and more until every limit is broken."""
        found = list[tuple[dict[str, float], dict[str, float]]]()
        for widths in evenly_cut(layers, state.widths):
            found.append(self.looking.pairs(narrowed(state.kept, scores, widths)))
            if self.rooms.all_broken(found[-1][1], found[0][1]):
                break
        return found
