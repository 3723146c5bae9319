"""Losses and metrics of cut models, per objective, and what looking at them took."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from edgeprune.criteria.batch_statistics import by_batch
from edgeprune.errors import TaskError
from edgeprune.loop.multitask.beside import MOST_BYTES, Beside, Cut
from edgeprune.loop.multitask.journal import Journal
from edgeprune.loop.multitask.look import Kept, Look, named
from edgeprune.loop.multitask.samples import losses_by_sample
from edgeprune.loop.multitask.stops import Stops, Units
from edgeprune.recovery.evaluation import evaluate
from edgeprune.surgery.cutting import cut_program
from edgeprune.surgery.plan import make_plan
from edgeprune.tasks.batches import call, labeled_samples, loss_of, mode, sample_count, sharing
from edgeprune.tasks.task import Objective, Task

if TYPE_CHECKING:
    from edgeprune.graph.channel_graph import ChannelGraph
    from edgeprune.loop.multitask.calibration_data import CalibrationData
    from edgeprune.surgery.plan import PruningPlan
    from edgeprune.surgery.program_module import ProgramModule


class Looking:
    """Looks at a model with some units cut.

    Args:
        model: Its weights; they may change between looks (`begin` after that).
        graph: Its channel groups.
        data: The batches.
        batch_statistics: Whether batch norms normalize by the batch, as if their statistics had been estimated anew after each
            cut; running ones describe what is no longer there.
        journal: Tells what was measured before an interruption.
        seed: Of the order in which batches are looked at.

    Attributes:
        looks: How many cut models were looked at.
        multiply_accumulates: What all looks took, and what was computed for them (convolutions and matrix products).
        stops: How many looks were stopped.
        state: The model that others are looked at beside, looked at whole.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: ChannelGraph,
        data: CalibrationData,
        *,
        batch_statistics: bool,
        journal: Journal | None = None,
        seed: int = 0,
    ) -> None:
        self._model, self._graph, self._data, self._by_batch = model, graph, data, batch_statistics
        self._journal = Journal(None, {}) if journal is None else journal
        self._random = random.Random(seed)
        self._order: list[int] = []
        self._groups = [(several, list(several[0].train)) for several in sharing(data.losses.objectives, "train")]
        self.batches = max(len(batches) for _, batches in self._groups)
        self.reorder()
        normed = any(isinstance(one, _BatchNorm) and one.track_running_stats for one in model.modules())
        # Where batch norms normalize by the batch, its samples go up and down together.
        self._units: Units = "batches" if batch_statistics and normed else "samples"
        self._beside: Beside | None = None
        self._around: tuple[Kept, ...] = ()
        self._metrics: dict[str, dict[str, float]] = {}
        self.state: Look | None = None
        self.looks = self.stops = 0
        self.multiply_accumulates = 0.0

    def plan(self, kept: Kept) -> PruningPlan:
        """The plan that keeps these units."""
        dense = self._graph.widths()
        return make_plan(
            self._graph, {name: units for name, units in kept.items() if len(units) < dense[name]}, allow_empty=True
        )

    def cut(self, kept: Kept) -> ProgramModule:
        """The model with only these units, in eval form.

        Raises:
            SurgeryError: The cut program cannot be written down.
        """
        return cut_program(self._model, self.plan(kept)).eval()

    def reorder(self) -> None:
        """Draw the order in which batches are looked at from here on: what was looked at before tells nothing of it."""
        self._order = self._random.sample(range(self.batches), self.batches)

    def begin(self, kept: Kept, others: Sequence[Kept], *, stops: bool) -> Look:
        """Look at a model whole; others are looked at beside it from now on, until `take`.

        Args:
            kept: Its units.
            others: Some of the others: what they have in common with it is kept. None: nothing is.
            stops: Whether looks may be stopped.
        """
        self._beside, self._around, self._metrics = None, tuple(others), {}
        self.state = Look(kept, {}, {}, {})  # there, so that its values are kept
        found = self.look(kept, every=True, samples=stops)
        self.state = found
        return found

    def take(self, look: Look) -> None:
        """A model that was looked at whole takes the place of the one that others are looked at beside."""
        assert self.state is not None
        if self._beside is not None and isinstance(look.cut, Cut):
            self._beside.take(look.cut)
        else:
            self._beside = None
        # What an objective does not depend on has not changed it.
        parts = (
            {**before, **after}
            for before, after in (
                (self.state.sums, look.sums),
                (self.state.counts, look.counts),
                (self.state.samples, look.samples),
            )
        )
        sums, counts, samples = parts
        self.state = Look(look.kept, sums, counts, samples, look.places)  # type: ignore[arg-type]

    def losses(self, kept: Kept) -> dict[str, float]:
        """Loss per objective on the first part, averaged over samples with labels.

        Raises:
            TaskError: A loss cannot be used, or no sample has labels.
        """
        return self.look(kept).losses

    def look(
        self,
        kept: Kept,
        objectives: Iterable[str] | None = None,
        *,
        batches: int | None = None,
        earlier: Look | None = None,
        every: bool = False,
        samples: bool = False,
        most: Mapping[str, float] | None = None,
        alpha: float = 0.0,
    ) -> Look:
        """Look at a cut model.

        Args:
            kept: The units that stay.
            objectives: Of which; all when None.
            batches: At how many of its batches; at all when None.
            earlier: What was seen of it already, which is gone on with.
            every: Whether it is the model that others are looked at beside.
            samples: Whether losses of single samples are needed.
            most: Bounds of losses: where one is exceeded, as far as can be told by the batches so far, the others are left out.
            alpha: How likely that may be told wrongly, at most.

        Raises:
            TaskError: A loss cannot be used, or no sample has labels.
        """
        chosen = None if objectives is None else sorted(objectives)
        self.looks += earlier is None
        asked = [one for one in self._data.losses.objectives if chosen is None or one.name in chosen]
        found = earlier or Look.nothing(kept, [one.name for one in asked], self.batches)
        until = batches or self.batches
        order = self._order[len(found.places) : until]
        request = ["look", named(kept), chosen, order, sorted((most or {}).items()), alpha, samples]

        def measure() -> list[Any]:
            if found.cut is None:
                found.cut = self._runnable(kept, own=every)
            self._look(found, asked, order, most or {}, alpha, samples=samples)
            return [found.sums, found.counts, found.samples, found.places, found.stopped]

        found.sums, found.counts, found.samples, found.places, found.stopped = self._recalled(request, measure)
        self.stops += found.stopped
        if until == self.batches and not found.stopped:
            for name, counts in found.counts.items():
                if not sum(counts):
                    raise TaskError(
                        f"the training batches that a search reads must have labels for objective {name!r}, found none.",
                        hint="larger batches in the task; Pagcp(batches=...) in Python",
                    )
        return found

    def metrics(self, kept: Kept, look: Look | None = None) -> dict[str, float]:
        """Metric per objective of a cut model on the second part.

        Args:
            kept: Its units.
            look: What was seen of it, where it was looked at.
        """
        name = named(kept)
        if name not in self._metrics:

            def measure() -> dict[str, float]:
                own = self.state is not None and self.state.kept == kept
                module = look.cut if look is not None else None
                return self.metrics_of(module if module is not None else self._runnable(kept, own=own))

            self._metrics[name] = self._recalled(["metrics", name], measure)
        return self._metrics[name]

    def metrics_of(self, module: nn.Module) -> dict[str, float]:
        """As `metrics`, of a model that is cut already."""
        with self._norms(module), self._counted():
            return evaluate(module, self._data.metrics)

    def first_metrics(self, kept: Kept) -> dict[str, float]:
        """Metric per objective of a cut model on the first part."""
        return dict(self._recalled(["first metrics", named(kept)], lambda: self._first_metrics(self.cut(kept))))

    def pairs(self, kept: Kept) -> tuple[dict[str, float], dict[str, float]]:
        """Loss and metric per objective, both on the first part: how they go together."""
        self.looks += 1

        def measure() -> list[dict[str, float]]:
            # Both from the same outputs.
            own = self.state is not None and self.state.kept == kept
            module = _Remembering(self._runnable(kept, own=True) if own else self.cut(kept))
            asked = self._data.losses.objectives
            found = Look.nothing(kept, [one.name for one in asked], self.batches)
            found.cut = module
            self._look(found, asked, range(self.batches), {}, 0.0, samples=False)
            return [found.losses, self._first_metrics(module)]

        losses, metrics = self._recalled(["pairs", named(kept)], measure)
        return losses, metrics

    def _first_metrics(self, module: nn.Module) -> dict[str, float]:
        first = Task(tuple(replace(one, validation=one.train) for one in self._data.losses.objectives))
        with self._norms(module), self._counted():
            return evaluate(module, first)

    def _recalled(self, request: Any, measure: Callable[[], Any]) -> Any:
        """From the journal, with what it took."""

        def counted() -> list[Any]:
            before = self.multiply_accumulates
            value = measure()
            took, self.multiply_accumulates = self.multiply_accumulates - before, before
            return [value, took]

        value, took = self._journal.recall(request, counted)
        self.multiply_accumulates += took
        return value

    def _runnable(self, kept: Kept, *, own: bool) -> nn.Module:
        """A cut model; where there is one that it can be computed beside, so that it takes as little as possible."""
        if self.state is None or not self._around:
            return self.cut(kept)
        if self._beside is None:
            module = self.cut(self.state.kept)
            if module.works_in_place:
                self._around = ()
                return self.cut(kept)
            self._beside = Beside(module, (self.cut(one) for one in self._around), self._ready, MOST_BYTES)
        return self._beside.model(self._beside.module if own else self.cut(kept))

    def _look(
        self,
        found: Look,
        objectives: Sequence[Objective],
        order: Iterable[int],
        most: Mapping[str, float],
        alpha: float,
        *,
        samples: bool,
    ) -> None:
        assert found.cut is not None
        stops = Stops(None if alpha <= 0 else self.state, found, most, alpha, self._units)
        names = {one.name for one in objectives}
        with self._ready(found.cut):
            for place in order:
                for several, batches in self._groups:
                    together = [one for one in several if one.name in names]
                    if not together or place >= len(batches):
                        continue
                    inputs, targets = batches[place]
                    with self._counted():
                        outputs = call(found.cut, inputs)
                    count = sample_count(inputs)
                    for one in together:
                        own = labeled_samples(one, outputs, targets, count)[2]
                        found.counts[one.name][place] = own
                        found.sums[one.name][place] = own * float(loss_of(one, outputs, targets)) if own else 0.0
                        apart = self._units == "samples" and one.name in self._data.shuffled
                        if apart and (samples or one.name in stops.names):
                            found.samples[one.name][place] = losses_by_sample(one, outputs, targets, count)
                        stops.add(one.name, place)
                found.places.append(place)
                if len(found.places) < self.batches and stops.certain:
                    found.stopped = True
                    return

    @contextmanager
    def _counted(self) -> Iterator[None]:
        with FlopCounterMode(display=False) as counter:
            yield
        # A multiplication and an addition are two of what it counts.
        self.multiply_accumulates += counter.get_total_flops() / 2

    @contextmanager
    def _ready(self, module: nn.Module) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(mode(module, training=False))
            stack.enter_context(torch.no_grad())
            stack.enter_context(self._norms(module))
            yield

    def _norms(self, module: nn.Module) -> Any:
        return by_batch(module) if self._by_batch else nullcontext()


class _Remembering(nn.Module):
    """A model that computes each batch once; for as long as the batches are there."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._known: dict[tuple[int, ...], Any] = {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model returns."""
        batch = tuple(id(leaf) for leaf in pytree.tree_leaves((args, kwargs)))
        if batch not in self._known:
            self._known[batch] = self.model(*args, **kwargs)
        return self._known[batch]
