"""The one interface of all distillation losses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

import torch

from edgeprune.errors import ConfigError


class Distillation(ABC):
    """A loss of the pruned model against the dense one.

    Attributes:
        name: What it is called in settings and records.
        reads: ``"outputs"``: `loss` gets what the two models return. ``"features"``: it gets their values at each tap
            (`edgeprune.recovery.taps`), float32, shape (batch, channels, positions), and is averaged over the taps.
        whole_teacher: Whether the dense model's values come with all of its channels; otherwise with those that the plan
            kept, so that channel ``c`` of one is channel ``c`` of the other.
        temperature: See the constructor.
        weight: The same.
    """

    name: ClassVar[str]
    reads: ClassVar[Literal["outputs", "features"]] = "features"
    whole_teacher: ClassVar[bool] = False

    def __init__(self, temperature: float = 4.0, weight: float = 1.0) -> None:
        """Make the loss.

        Args:
            temperature: Of those that soften by one: above 0; larger looks more at what is unlikely. Others ignore it.
            weight: What `loss` is multiplied by beside other losses; at least 0.

        Raises:
            ConfigError: The temperature is not above 0, or the weight below it.
        """
        if not temperature > 0:
            raise ConfigError(f"the distillation temperature must be above 0, found {temperature}.")
        if not weight >= 0:
            raise ConfigError(f"the weight of a distillation must be at least 0, found {weight}.")
        self.temperature, self.weight = temperature, weight

    @abstractmethod
    def loss(self, student: Any, teacher: Any) -> torch.Tensor:
        """A scalar tensor, 0 where both are the same; the gradient goes to the student.

        Raises:
            TaskError: The values are nothing that this loss is defined for.
        """
