"""Values of the channels that were kept, as the dense model has them."""

from __future__ import annotations

import torch

from edgeprune.recovery.distillation._base import Distillation

_LEAST = 1e-12


class Features(Distillation):
    """Mean squared difference over the mean square of the dense values, so that taps of any scale weigh the same.

    Source of the idea: A. Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015, equation 3. The regressor there maps
    the student's channels to the teacher's; here the plan says which are the same.
    """

    name = "features"

    def loss(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """See `Distillation.loss`."""
        return (student - teacher).square().mean() / teacher.square().mean().clamp_min(_LEAST)
