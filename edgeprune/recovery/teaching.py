"""The dense model as a teacher: it runs beside the cut one, and what both compute is compared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from edgeprune.errors import ConfigError, TaskError
from edgeprune.recovery.distillation import registry
from edgeprune.recovery.distillation._base import Distillation
from edgeprune.recovery.watching import Tap, Watch, canonical, places_in, watched
from edgeprune.tasks.batches import call, device_of, mode

Distillations = str | Distillation | Sequence[str | Distillation]
"""One distillation or several, by name or as objects."""


def made(distillations: Distillations, temperature: float) -> tuple[Distillation, ...]:
    """The losses of these names.

    Raises:
        ConfigError: A name is unknown, or one comes twice.
    """
    several = [distillations] if isinstance(distillations, str | Distillation) else list(distillations)
    found = tuple(
        one if isinstance(one, Distillation) else registry.get(one, temperature=temperature) for one in several
    )
    names = [one.name for one in found]
    if len(set(names)) != len(names):
        raise ConfigError(f"each distillation must be named once, found {', '.join(names)}.")
    return found


class Teaching:
    """What the dense model adds to the loss.

    Args:
        teacher: The dense model; it stays as it is.
        student: The cut model.
        distillations: The losses, which are added up, each times its weight.
        taps: Where features are compared.

    Raises:
        ConfigError: A distillation reads features, and there are no taps.
    """

    def __init__(
        self, teacher: nn.Module, student: nn.Module, distillations: Sequence[Distillation], taps: Sequence[Tap]
    ) -> None:
        by_features = [one for one in distillations if one.reads == "features"]
        if by_features and not taps:
            raise ConfigError(
                f"{by_features[0].name} distillation needs taps, found none.",
                hint="taps=edgeprune.recovery.taps.find_taps(graph, plan, module)",
            )
        self._teacher, self._student, self._distillations = teacher, student, tuple(distillations)
        # Nothing is watched that nothing compares.
        self._taps = tuple(taps) if by_features else ()
        self._kept = [
            None if tap.kept is None else torch.tensor(tap.kept, device=device_of(student)) for tap in self._taps
        ]
        self._watches: tuple[Watch, Watch] = (Watch(), Watch())

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Watch both models for a block, the teacher in eval form."""
        with (
            mode(self._teacher, training=False),
            watched(self._student, places_in(self._student, self._taps)) as student,
            watched(self._teacher, places_in(self._teacher, self._taps)) as teacher,
        ):
            self._watches = student, teacher
            yield

    def described(self) -> dict[str, Any]:
        """What it does, as JSON values."""
        return {
            "losses": [[one.name, one.temperature, one.weight] for one in self._distillations],
            "taps": [tap.name for tap in self._taps],
        }

    def begin(self) -> None:
        """Before each forward of the student."""
        self._watches[0].begin()

    def wanted(self, inputs: Any) -> Any:
        """What the teacher returns for inputs."""
        self._watches[1].begin()
        with torch.no_grad():
            return call(self._teacher, inputs)

    def loss(self, outputs: Any, wanted: Any) -> torch.Tensor:
        """The sum of all losses, after a forward of both models.

        Args:
            outputs: What the student returned.
            wanted: What the teacher returned for the same inputs.

        Raises:
            TaskError: Outputs or features are nothing that a loss is defined for, or a tap's value did not pass by.
        """
        features = [self._features(number, tap) for number, tap in enumerate(self._taps)]
        total = torch.zeros((), device=device_of(self._student))
        for one in self._distillations:
            if one.reads == "outputs":
                value = one.loss(outputs, wanted)
            else:
                losses = [one.loss(student, whole if one.whole_teacher else kept) for student, kept, whole in features]
                value = torch.stack(losses).mean()
            total = total + one.weight * value
        return total

    def _features(self, number: int, tap: Tap) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Values at a tap: the student's, the teacher's with the kept channels, and with all; (batch, channels, positions)."""
        values = [watch.values.get(number) for watch in self._watches]
        found = [None if value is None else canonical(value, tap.axis) for value in values]
        student, whole = found
        if student is None or whole is None:
            raise TaskError(f"both models must compute the tap {tap.name!r} in every forward, found one that did not.")
        kept = self._kept[number]
        same = whole if kept is None else whole.index_select(1, kept)
        if student.shape != same.shape:
            raise TaskError(
                f"the features at {tap.name!r} must have the shape that the plan says, found {tuple(student.shape)} instead of "
                f"{tuple(same.shape)}.",
                hint="taps of this graph, plan and module",
            )
        return student, same, whole
