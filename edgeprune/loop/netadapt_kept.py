"""What a NetAdapt search that was interrupted goes on from: the network after its last step, and the cuts tried since.

Two checkpoints in the search's folder, each written whole or not at all: ``step.safetensors`` holds the weights after the last
finished step, ``cuts.safetensors`` how the cuts of the step after it did so far, with the tuned tensors of the best one. Both
hold the state of all random generators, so that the next cut is tuned as it would have been.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edgeprune.recovery import checkpoint as checkpoints
from edgeprune.recovery.generators import Generators

_STEP, _CUTS = "step.safetensors", "cuts.safetensors"

_log = logging.getLogger("edgeprune.loop")


@dataclass
class Tried:
    """The cuts of one step so far.

    Attributes:
        ranks: Of each cut that was tuned, in the order of trying: its metric, higher is better, and minus its latency.
        tensors: Of the best of them, as tuned.
    """

    ranks: list[tuple[float, float]]
    tensors: dict[str, torch.Tensor]


class Kept:
    """The two checkpoints of one search.

    Args:
        folder: Where they lie; None keeps nothing.
        identity: What the search is, JSON values.
        generators: Everything random that a tuning may draw from.
    """

    def __init__(self, folder: Path | None, identity: Mapping[str, Any], generators: Generators) -> None:
        self._folder, self._identity, self._generators = folder, identity, generators

    def step(self, model: nn.Module) -> dict[str, Any] | None:
        """Put the weights after the last finished step into a model; what else was kept then, or None where there is none."""
        found = self._read(_STEP)
        if found is None:
            return None
        tensors, values = found
        put_into(model, tensors)
        self._generators.restore(values["generators"])
        _log.info("going on with NetAdapt after %d steps", values["steps"])
        return dict(values)

    def keep_step(self, model: nn.Module, values: Mapping[str, Any]) -> None:
        """Keep the weights after a step, and JSON values beside them, one of which is ``steps``."""
        # The cuts of that step stay until this is whole; they know which step they are of.
        self._write(_STEP, tensors_of(model), values)

    def cuts(self, step: int) -> Tried:
        """The cuts that were tuned of a step that was not finished; none of any other."""
        found = self._read(_CUTS)
        if found is None or found[1]["step"] != step:
            return Tried([], {})
        tensors, values = found
        self._generators.restore(values["generators"])
        return Tried([(float(metric), float(speed)) for metric, speed in values["ranks"]], tensors)

    def keep_cuts(self, step: int, ranks: Sequence[tuple[float, float]], best: nn.Module) -> None:
        """Keep how the cuts of a step did so far, and the tensors of the best one."""
        self._write(_CUTS, tensors_of(best), {"step": step, "ranks": [list(rank) for rank in ranks]})

    def _read(self, name: str) -> tuple[dict[str, torch.Tensor], Any] | None:
        return None if self._folder is None else checkpoints.read(self._folder / name, self._identity)

    def _write(self, name: str, tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any]) -> None:
        if self._folder is not None:
            whole = {**values, "generators": self._generators.states()}
            checkpoints.write(self._folder / name, self._identity, tensors, whole)


def tensors_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """All parameters and buffers by name, tied ones under each of their names."""
    named = {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }
    return {name: tensor.detach() for name, tensor in named.items()}


def put_into(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Copy tensors into the parameters and buffers of these names."""
    with torch.no_grad():
        for name, tensor in tensors_of(module).items():
            tensor.copy_(tensors[name])
