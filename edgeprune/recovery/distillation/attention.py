"""Where in the image the dense model has its energy, over all channels together."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch.nn import functional

from edgeprune.recovery.distillation._base import Distillation


class Attention(Distillation):
    """Mean squared difference of spatial attention maps: the mean square over channels, scaled to length 1 per sample.

    The maps have no channels, so the dense model's comes from all of its own.

    Source: S. Zagoruyko, N. Komodakis, "Paying More Attention to Attention", ICLR 2017, section 3.1, activation-based with
    ``p = 2``; averaged over positions with a weight of 1000, as in the authors' code.
    """

    name = "attention"
    whole_teacher: ClassVar[bool] = True
    weight: ClassVar[float] = 1000.0

    def loss(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """See `Distillation.loss`."""
        return (_attention(student) - _attention(teacher)).square().mean()


def _attention(values: torch.Tensor) -> torch.Tensor:
    return functional.normalize(values.square().mean(dim=1), dim=1)
