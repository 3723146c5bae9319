"""Losses and metrics of cut models, per objective, and what looking at them took."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from edgeprune.criteria.batch_statistics import by_batch
from edgeprune.errors import TaskError
from edgeprune.loop.multitask.early_stopping import MeanAbove
from edgeprune.recovery.evaluation import evaluate
from edgeprune.surgery.cutting import cut_program
from edgeprune.surgery.plan import make_plan
from edgeprune.tasks.batches import (
    call,
    device_of,
    labeled_samples,
    loss_of,
    mode,
    objective_batches,
    sample_count,
    sharing,
)
from edgeprune.tasks.task import Objective, Task

if TYPE_CHECKING:
    from edgeprune.graph.channel_graph import ChannelGraph
    from edgeprune.loop.multitask.calibration_data import CalibrationData
    from edgeprune.surgery.plan import PruningPlan
    from edgeprune.surgery.program_module import ProgramModule

Kept = Mapping[str, tuple[int, ...]]
"""Group name to the units that stay, for every group."""

_SAME = 1e-3
"""Relative difference between the loss of a batch and the mean of those of its samples, up to which the two are one."""
_MOST_BYTES = 2**30
"""Activations that are kept at most."""


@dataclass(frozen=True)
class Looked:
    """Losses of a cut model.

    Attributes:
        losses: By objective, averaged over samples with labels; where it was stopped, over those that were looked at.
        stopped: Whether one of them is above its bound, as could be told before all samples were looked at.
    """

    losses: dict[str, float]
    stopped: bool = False


@dataclass
class Beside:
    """A cut model, and its activations before the first operation in which others differ from it.

    Attributes:
        module: The model.
        count: Of operations up to there; None while none was compared with it.
        values: By batch; what is not there was too large to keep.
    """

    module: ProgramModule
    count: int | None = None
    values: dict[tuple[int, int], dict[str, Any]] = field(default_factory=dict)
    size_bytes: int = 0

    def compared(self, other: ProgramModule) -> None:
        """Another one is to be looked at."""
        if self.module.works_in_place:
            self.count = 0
            return
        same = self.module.same_until(other)
        if self.count is None or same < self.count:
            self.count, self.values, self.size_bytes = same, {}, 0


@dataclass(frozen=True)
class _Reference:
    """What stops are told by: the losses of the samples of a model that was looked at whole.

    Attributes:
        samples: By objective, in the order of its batches.
    """

    samples: Mapping[str, list[list[float]]]


class Looking:
    """Looks at a model with some units cut.

    Args:
        model: Its weights; they may change between looks.
        graph: Its channel groups.
        data: The batches.
        batch_statistics: Whether batch norms normalize by the batch, as if their statistics had been estimated anew after each
            cut; running ones describe what is no longer there.

    Attributes:
        looks: How many cut models were looked at.
        multiply_accumulates: What all looks took, and what was computed for them (convolutions and matrix products).
        stops: How many looks were stopped.
    """

    def __init__(self, model: nn.Module, graph: ChannelGraph, data: CalibrationData, *, batch_statistics: bool) -> None:
        self._model, self._graph, self._data, self._by_batch = model, graph, data, batch_statistics
        self._reference = _Reference({})
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

    def losses(self, kept: Kept, objectives: Iterable[str] | None = None) -> dict[str, float]:
        """Loss per objective on the first part, averaged over samples with labels.

        Args:
            kept: The units that stay.
            objectives: Of which; all when None.

        Raises:
            TaskError: A loss cannot be used, or no sample has labels.
        """
        return self.look(kept, objectives).losses

    def look(
        self,
        kept: Kept,
        objectives: Iterable[str] | None = None,
        *,
        beside: Beside | None = None,
        most: Mapping[str, float] | None = None,
        alpha: float = 0.0,
    ) -> Looked:
        """As `losses`, for less.

        Args:
            kept: The units that stay.
            objectives: Of which; all when None.
            beside: A model that is cut alike but for some layers: what lies before them is computed once.
            most: Bounds of losses: where one is exceeded, as far as can be told by the batches so far, the others are left out.
            alpha: How likely that may be told wrongly, at most.
        """
        self.looks += 1
        module = self.cut(kept)
        if beside is not None:
            beside.compared(module)
        found = self._looked(module, self._chosen(objectives), beside, most or {}, alpha)
        self.stops += found.stopped
        return found

    def losses_of(self, module: nn.Module, objectives: Iterable[str] | None = None) -> dict[str, float]:
        """As `losses`, of a model that is cut already."""
        return self._looked(module, self._chosen(objectives), None, {}, 0.0).losses

    def refer(self, kept: Kept) -> None:
        """Stops are told by the differences from this model, sample by sample; until then no look is stopped.

        Objectives whose samples are in no random order, or whose loss of a batch is not the mean of those of its samples, or
        below 0, never stop one.
        """
        module, samples = self.cut(kept), dict[str, list[list[float]]]()
        eligible = [one for one in self._data.losses.objectives if one.name in self._data.shuffled]
        odd: set[str] = set()
        with self._ready(module):
            for together in sharing(eligible, "train"):
                for inputs, targets in objective_batches(together[0], "train", device_of(module)):
                    with self._counted():
                        outputs = call(module, inputs)
                    for one in together:
                        own = _by_sample(one, outputs, targets, sample_count(inputs))
                        if own is None:
                            odd.add(one.name)
                        else:
                            samples.setdefault(one.name, []).append(own)
        self._reference = _Reference({name: found for name, found in samples.items() if name not in odd})

    def metrics(self, module: nn.Module) -> dict[str, float]:
        """Metric per objective of a cut model on the second part."""
        with self._norms(module), self._counted():
            return evaluate(module, self._data.metrics)

    def first_metrics(self, module: nn.Module) -> dict[str, float]:
        """The same on the first part."""
        first = Task(tuple(replace(one, validation=one.train) for one in self._data.losses.objectives))
        with self._norms(module), self._counted():
            return evaluate(module, first)

    def pairs(self, kept: Kept) -> tuple[dict[str, float], dict[str, float]]:
        """Loss and metric per objective, both on the first part: how they go together."""
        self.looks += 1
        # Both from the same outputs.
        module = _Remembering(self.cut(kept))
        return self.losses_of(module), self.first_metrics(module)

    def _chosen(self, objectives: Iterable[str] | None) -> list[Objective]:
        wanted = None if objectives is None else set(objectives)
        return [one for one in self._data.losses.objectives if wanted is None or one.name in wanted]

    def _looked(
        self,
        module: nn.Module,
        objectives: Sequence[Objective],
        beside: Beside | None,
        most: Mapping[str, float],
        alpha: float,
    ) -> Looked:
        sums = {one.name: 0.0 for one in objectives}
        counts = {one.name: 0 for one in objectives}
        tests = self._tests(most, alpha)
        stopped = False
        with self._ready(module):
            for together in sharing(objectives, "train"):
                batches = list(objective_batches(together[0], "train", device_of(module)))
                for number, (inputs, targets) in enumerate(batches):
                    outputs = self._outputs(module, inputs, beside, (id(together[0].train), number))
                    count = sample_count(inputs)
                    for one in together:
                        own = labeled_samples(one, outputs, targets, count)[2]
                        if own:
                            sums[one.name] += own * float(loss_of(one, outputs, targets))
                            counts[one.name] += own
                        if one.name in tests and number + 1 < len(batches):
                            stopped |= self._exceeds(tests, one, number, outputs, targets, count)
                    if stopped:
                        means = {name: total / counts[name] for name, total in sums.items() if counts[name]}
                        return Looked(means, stopped=True)
        for name, count in counts.items():
            if not count:
                raise TaskError(
                    f"the training batches that a search reads must have labels for objective {name!r}, found none.",
                    hint="more batches: Pagcp(batches=...)",
                )
        return Looked({name: total / counts[name] for name, total in sums.items()})

    def _tests(self, most: Mapping[str, float], alpha: float) -> dict[str, MeanAbove]:
        """Per objective whether its mean difference from the reference is above what its bound leaves."""
        known = {name: found for name, found in self._reference.samples.items() if name in most and any(found)}
        tests = {}
        for name, batches in known.items() if alpha > 0 else ():
            values = [value for batch in batches for value in batch]
            room = most[name] - sum(values) / len(values)
            # No loss is below 0, so none falls by more than it was.
            tests[name] = MeanAbove(len(values), room, -max(values), alpha / len(known))
        return tests

    def _exceeds(
        self, tests: dict[str, MeanAbove], one: Objective, number: int, outputs: Any, targets: Any, count: int
    ) -> bool:
        found, before = _by_sample(one, outputs, targets, count), self._reference.samples[one.name][number]
        if found is None or len(found) != len(before):
            del tests[one.name]
            return False
        return tests[one.name].add(value - base for value, base in zip(found, before, strict=True))

    def _outputs(self, module: nn.Module, inputs: Any, beside: Beside | None, batch: tuple[int, int]) -> Any:
        """What a model returns for a batch; what lies before its first difference from another one comes from there."""
        if beside is None or not beside.count:
            with self._counted():
                return call(module, inputs)
        begun = beside.values.get(batch)
        if begun is None:
            args, kwargs = ((), inputs) if isinstance(inputs, Mapping) else (inputs, {})
            args = args if isinstance(args, tuple | list) else (args,)
            with self._ready(beside.module), self._counted():
                begun = beside.module.begun(beside.count, *args, **kwargs)
            held = [leaf for leaf in pytree.tree_leaves(begun) if isinstance(leaf, torch.Tensor)]
            size_bytes = sum(leaf.numel() * leaf.element_size() for leaf in held)
            if beside.size_bytes + size_bytes <= _MOST_BYTES:
                beside.values[batch] = begun
                beside.size_bytes += size_bytes
        with self._counted():
            return module.finished(begun, beside.count)  # type: ignore[operator]

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


def _by_sample(one: Objective, outputs: Any, targets: Any, count: int) -> list[float] | None:
    """The loss of each sample that has labels; None where the loss of the batch is not their mean, or one is below 0."""
    found = []
    for place in range(count):

        def only(leaf: torch.Tensor, place: int = place) -> torch.Tensor:
            return leaf[place : place + 1] if leaf.ndim and len(leaf) == count else leaf

        own, wanted = (pytree.tree_map_only(torch.Tensor, only, tree) for tree in (outputs, targets))
        if labeled_samples(one, own, wanted, 1)[2]:
            found.append(float(loss_of(one, own, wanted)))
    if not found:
        return found
    whole, mean = float(loss_of(one, outputs, targets)), sum(found) / len(found)
    return found if min(found) >= 0 and abs(whole - mean) <= _SAME * max(abs(whole), abs(mean)) else None
