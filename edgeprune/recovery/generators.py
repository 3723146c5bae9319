"""Everything random that a training draws from, so that it can go on from where it was."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from edgeprune.errors import ConfigError

if TYPE_CHECKING:
    from edgeprune.tasks.task import Task


class Generators:
    """The generators of torch, Python and NumPy, and those that the loaders bring along.

    Args:
        loaders: Data that training reads.
        device: Where the model is.
    """

    def __init__(self, loaders: Iterable[Any], device: torch.device) -> None:
        self._device = device
        found: dict[int, torch.Generator] = {}
        for loader in loaders:
            batches = getattr(loader, "batch_sampler", None)
            owners = (loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None))
            for owner in owners:
                generator = getattr(owner, "generator", None)
                if isinstance(generator, torch.Generator):
                    found.setdefault(id(generator), generator)
        self._own = list(found.values())

    @classmethod
    def of(cls, task: Task, device: torch.device) -> Generators:
        """Those that a training on a task draws from."""
        return cls((loader for one in task.objectives for loader in (one.train, one.validation)), device)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """After the block all of them are where they were before it."""
        before = self.states()
        try:
            yield
        finally:
            self.restore(before)

    def states(self) -> dict[str, Any]:
        """Where all of them are, as JSON values."""
        version, numbers, following = random.getstate()
        name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
        states: dict[str, Any] = {
            "torch": _hex(torch.get_rng_state()),
            "loaders": [_hex(generator.get_state()) for generator in self._own],
            "python": [version, list(numbers), following],
            "numpy": [str(name), np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
        }
        if self._device.type == "cuda":
            states["cuda"] = _hex(torch.cuda.get_rng_state(self._device))
        return states

    def restore(self, states: Mapping[str, Any]) -> None:
        """Set all of them to where they were.

        Raises:
            ConfigError: The loaders bring more or fewer generators along than they did.
        """
        if len(states["loaders"]) != len(self._own):
            raise ConfigError(
                f"the loaders must bring as many generators along as when the training began, found {len(self._own)} instead "
                f"of {len(states['loaders'])}.",
                hint="the task of that run, or begin anew without its checkpoint",
            )
        torch.set_rng_state(_bytes(states["torch"]))
        for generator, state in zip(self._own, states["loaders"], strict=True):
            generator.set_state(_bytes(state))
        version, numbers, following = states["python"]
        random.setstate((version, tuple(numbers), following))
        name, keys, position, has_gauss, cached = states["numpy"]
        np.random.set_state((name, np.array(keys, np.uint32), position, has_gauss, cached))
        if "cuda" in states:
            torch.cuda.set_rng_state(_bytes(states["cuda"]), self._device)


def _hex(state: torch.Tensor) -> str:
    return state.numpy().tobytes().hex()


def _bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
