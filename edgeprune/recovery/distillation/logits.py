"""Class probabilities of the dense model as soft targets."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch.nn import functional

from edgeprune.errors import TaskError
from edgeprune.recovery.distillation._base import Distillation


class Logits(Distillation):
    """Kullback-Leibler divergence of softened class probabilities, times the temperature squared, averaged over positions.

    Outputs have shape (batch, classes, ...). The factor keeps the gradient's size independent of the temperature.

    Source: G. Hinton, O. Vinyals, J. Dean, "Distilling the Knowledge in a Neural Network", 2015.
    """

    name = "logits"
    reads: ClassVar[Literal["outputs", "features"]] = "outputs"

    def loss(self, student: Any, teacher: Any) -> torch.Tensor:
        """See `Distillation.loss`."""
        for outputs in (student, teacher):
            if not isinstance(outputs, torch.Tensor) or outputs.ndim < 2 or outputs.shape[1] < 2:
                found = f"shape {tuple(outputs.shape)}" if isinstance(outputs, torch.Tensor) else type(outputs).__name__
                raise TaskError(
                    f"logit distillation needs outputs of shape (batch, classes, ...), found {found}.",
                    hint="another distillation, which reads features instead of outputs, or none",
                )
        if student.shape != teacher.shape:
            raise TaskError(
                f"student and teacher must have outputs of one shape, found {tuple(student.shape)} and {tuple(teacher.shape)}."
            )
        log_student = functional.log_softmax(student.float() / self.temperature, dim=1)
        log_teacher = functional.log_softmax(teacher.float() / self.temperature, dim=1)
        divergence = (log_teacher.exp() * (log_teacher - log_student)).sum(dim=1)
        return divergence.mean() * self.temperature**2
