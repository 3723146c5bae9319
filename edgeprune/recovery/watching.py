"""Seeing what a model computes inside while it runs as always."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from edgeprune.parts import tensors_of
from edgeprune.surgery.program_module import ProgramModule


@dataclass(frozen=True)
class Place:
    """Where a value passes by in a model of the user's class.

    Attributes:
        path: Of a module.
        call: Which of its calls in one forward, from 0.
        given: Whether the module gets the value; otherwise it returns it.
        leaf: Which tensor of its arguments or results.
    """

    path: str
    call: int
    given: bool
    leaf: int


@dataclass(frozen=True)
class Tap:
    """One value that both models compute.

    Attributes:
        name: Its node in the dense program, and its operation in a cut one.
        axis: Axis of its channels.
        kept: Channels of the dense model that the cut one has; None where it has all.
        place: Where the value passes by in the model's own class.
    """

    name: str
    axis: int
    kept: tuple[int, ...] | None
    place: Place


class Watch:
    """Values of the forward that runs now, by their number among the places; they are the tensors themselves, not copies."""

    def __init__(self) -> None:
        self.values: dict[int, torch.Tensor] = {}
        self._calls: Counter[tuple[str, bool]] = Counter()

    def begin(self) -> None:
        """Forget the forward before."""
        self.values.clear()
        self._calls.clear()

    def take(self, path: str, given: bool, wanted: dict[tuple[int, int], int], tree: Any) -> None:
        """Look at the arguments or results of one call."""
        call = self._calls[path, given]
        self._calls[path, given] += 1
        if any(number == call for number, _ in wanted):
            for leaf, tensor in enumerate(tensors_of(tree)):
                if (call, leaf) in wanted:
                    self.values[wanted[call, leaf]] = tensor


@contextmanager
def watched(model: nn.Module, places: Sequence[Place] | Sequence[str]) -> Iterator[Watch]:
    """Watch a model for a block; `Watch.begin` before each forward.

    Args:
        model: A `ProgramModule`, or one of any other class.
        places: Names of the program's operations for the former, places for the latter.
    """
    watch = Watch()
    with ExitStack() as stack:
        if isinstance(model, ProgramModule):
            numbers = {place: number for number, place in enumerate(places) if isinstance(place, str)}
            stack.enter_context(model.seen(numbers, lambda name, value: watch.values.update({numbers[name]: value})))
        else:
            wanted: dict[tuple[str, bool], dict[tuple[int, int], int]] = {}
            for number, place in enumerate(places):
                if isinstance(place, Place):
                    wanted.setdefault((place.path, place.given), {})[place.call, place.leaf] = number
            for (path, given), leaves in wanted.items():
                take = partial(watch.take, path, given, leaves)
                stack.callback(_hook(model.get_submodule(path), given, take))
        yield watch


@contextmanager
def everything(model: nn.Module) -> Iterator[list[tuple[Place, torch.Tensor]]]:
    """Every place of one forward with its value, in the order in which they pass by."""
    found: list[tuple[Place, torch.Tensor]] = []
    calls: Counter[tuple[str, bool]] = Counter()

    def take(path: str, given: bool, tree: Any) -> None:
        call = calls[path, given]
        calls[path, given] += 1
        found.extend((Place(path, call, given, leaf), tensor) for leaf, tensor in enumerate(tensors_of(tree)))

    with ExitStack() as stack:
        for path, module in model.named_modules():
            for given in (True, False) if path else ():
                stack.callback(_hook(module, given, partial(take, path, given)))
        yield found


def _hook(module: nn.Module, given: bool, take: Any) -> Any:
    """Register a look at what a module gets or returns; what comes back takes it away again."""
    if given:
        return module.register_forward_pre_hook(lambda _, args, kwargs: take((args, kwargs)), with_kwargs=True).remove
    return module.register_forward_hook(lambda _, args, output: take(output)).remove


def canonical(value: torch.Tensor, axis: int) -> torch.Tensor:
    """A value as float32 of shape (batch, channels, positions)."""
    return value.movedim(axis, 1).flatten(2).float()


def places_in(model: nn.Module, taps: Sequence[Tap]) -> list[Place] | list[str]:
    """Where the taps are in a model: operations of a cut program, places in any other class."""
    return [tap.name for tap in taps] if isinstance(model, ProgramModule) else [tap.place for tap in taps]
