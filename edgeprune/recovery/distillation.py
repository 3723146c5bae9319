"""Losses that pull a pruned model toward the dense one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from edgeprune.errors import ConfigError, TaskError

Distillation = Callable[[Any, Any], torch.Tensor]
"""``(outputs of the student, outputs of the teacher)`` to a scalar tensor."""


def logit_distillation(temperature: float = 4.0) -> Distillation:
    """Kullback-Leibler divergence of softened class probabilities, times the temperature squared, averaged over positions.

    Outputs have shape (batch, classes, ...). The factor keeps the gradient's size independent of the temperature.

    Source: G. Hinton, O. Vinyals, J. Dean, "Distilling the Knowledge in a Neural Network", 2015.

    Args:
        temperature: Above 0; larger looks more at the unlikely classes.

    Raises:
        ConfigError: The temperature is not above 0.
    """
    if not temperature > 0:
        raise ConfigError(f"the distillation temperature must be above 0, found {temperature}.")

    def loss(student: Any, teacher: Any) -> torch.Tensor:
        for outputs in (student, teacher):
            if not isinstance(outputs, torch.Tensor) or outputs.ndim < 2 or outputs.shape[1] < 2:
                found = f"shape {tuple(outputs.shape)}" if isinstance(outputs, torch.Tensor) else type(outputs).__name__
                raise TaskError(
                    f"logit distillation needs outputs of shape (batch, classes, ...), found {found}.",
                    hint="teacher=None, or a distillation loss of your own",
                )
        if student.shape != teacher.shape:
            raise TaskError(
                f"student and teacher must have outputs of one shape, found {tuple(student.shape)} and {tuple(teacher.shape)}."
            )
        log_student = functional.log_softmax(student.float() / temperature, dim=1)
        log_teacher = functional.log_softmax(teacher.float() / temperature, dim=1)
        divergence = (log_teacher.exp() * (log_teacher - log_student)).sum(dim=1)
        return divergence.mean() * temperature**2

    return loss
