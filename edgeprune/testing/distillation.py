"""Conformance suite of distillation losses.

::

    class TestMine(DistillationConformance):
        def distillation(self):
            return Mine()
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from edgeprune.recovery.distillation._base import Distillation


class DistillationConformance(ABC):
    """What every distillation loss must do."""

    @abstractmethod
    def distillation(self) -> Distillation:
        """The loss to test."""

    def _pair(self, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        shape = (3, 5) if self.distillation().reads == "outputs" else (3, 5, 12)
        return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)

    def test_it_is_zero_where_both_are_the_same(self) -> None:
        student, _ = self._pair()
        assert abs(float(self.distillation().loss(student, student.clone()))) < 1e-6

    def test_it_is_above_zero_where_they_differ(self) -> None:
        for seed in range(5):
            assert float(self.distillation().loss(*self._pair(seed))) > 1e-4

    def test_a_step_along_its_gradient_brings_them_closer(self) -> None:
        student, teacher = self._pair()
        student.requires_grad_(True)
        loss = self.distillation().loss(student, teacher)
        assert loss.ndim == 0
        (gradient,) = torch.autograd.grad(loss, student)
        assert bool(gradient.isfinite().all())
        nearer = student.detach() - 1e-2 / gradient.norm() * gradient
        assert float(self.distillation().loss(nearer, teacher)) < float(loss.detach())

    def test_values_without_anything_in_them_give_a_finite_loss(self) -> None:
        student, teacher = (torch.zeros_like(one) for one in self._pair())
        student.requires_grad_(True)
        loss = self.distillation().loss(student, teacher)
        (gradient,) = torch.autograd.grad(loss, student)
        assert bool(loss.isfinite())
        assert bool(gradient.isfinite().all())
