"""Where in the image each channel looks, compared channel by channel."""

from __future__ import annotations

import torch
from torch.nn import functional

from edgeprune.recovery.distillation._base import Distillation


class Channelwise(Distillation):
    """Divergence of each channel's spatial softmax, times the temperature squared, averaged over channels and samples.

    With ``p_c(i) = softmax over positions i of value_c(i) / T``::

        T ** 2 / C * sum over c, i of p_teacher * log(p_teacher / p_student)

    Source: C. Shu et al., "Channel-wise Knowledge Distillation for Dense Prediction", ICCV 2021 (arXiv 2011.13256), equations
    4 and 5, with their ``T = 4``. Their weight of 50 on features is for dense prediction; beside the loss of a classifier it
    leaves that one no say, so it is 1 here.
    """

    name = "channelwise"

    def loss(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """See `Distillation.loss`."""
        log_student = functional.log_softmax(student / self.temperature, dim=2)
        log_teacher = functional.log_softmax(teacher / self.temperature, dim=2)
        divergence = (log_teacher.exp() * (log_teacher - log_student)).sum(dim=2)
        return divergence.mean() * self.temperature**2
