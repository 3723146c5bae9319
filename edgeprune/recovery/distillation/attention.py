"""Where in the image the dense model has its energy, over all channels together."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch.nn import functional

from edgeprune.recovery.distillation._base import Distillation


class Attention(Distillation):
    """Squared distance of spatial attention maps, averaged over samples: the mean square over channels, scaled to length 1.

    It lies between 0 and 2 whatever the number of positions. The maps have no channels, so the dense model's comes from all of
    its own.

    Source: S. Zagoruyko, N. Komodakis, "Paying More Attention to Attention", ICLR 2017, section 3.1, activation-based with
    ``p = 2``. Their code averages over positions and weights by 1000, which is a weight of 1000 / positions here.
    """

    name = "attention"
    whole_teacher: ClassVar[bool] = True

    def loss(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """See `Distillation.loss`."""
        return (_attention(student) - _attention(teacher)).square().sum(dim=1).mean()


def _attention(values: torch.Tensor) -> torch.Tensor:
    return functional.normalize(values.square().mean(dim=1), dim=1)
