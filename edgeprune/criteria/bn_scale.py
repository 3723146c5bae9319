"""Absolute scale of the batch norms that a unit passes through."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import numpy.typing as npt
from torch.nn.modules.batchnorm import _BatchNorm

from edgeprune.criteria._base import Criterion, Normalization
from edgeprune.criteria.slices import parameter_members, selected, unit_sums
from edgeprune.errors import ModelError

if TYPE_CHECKING:
    from torch import nn

    from edgeprune.graph.channel_graph import ChannelGraph
    from edgeprune.tasks.task import Task


class BnScale(Criterion):
    """``sum over the group's batch norms of |gamma|`` of the unit.

    Source: Z. Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", ICCV 2017; meaningful where
    training pushed scales toward zero.
    """

    name: ClassVar[str] = "bn_scale"
    needs_task: ClassVar[bool] = False
    normalization: ClassVar[Normalization] = "log_share"

    def score(
        self, graph: ChannelGraph, model: nn.Module, task: Task | None = None, *, groups: Sequence[str] | None = None
    ) -> dict[str, npt.NDArray[np.float64]]:
        """See `Criterion.score`; `task` is not used."""
        chosen = selected(graph, groups)
        parameters, members = parameter_members(chosen, model)
        scales = {
            f"{name}.weight" if name else "weight"
            for name, module in model.named_modules(remove_duplicate=False)
            if isinstance(module, _BatchNorm) and module.weight is not None
        }
        scores: dict[str, npt.NDArray[np.float64]] = {}
        missing: list[str] = []
        for group in chosen:
            norms = [member for member in members[group.name] if member.parameter in scales]
            if not norms:
                missing.append(group.name)
                continue
            scores[group.name] = np.sum(
                [unit_sums(parameters[member.parameter].detach().abs(), member) for member in norms], axis=0
            )
        if missing:
            raise ModelError(
                f"the bn_scale criterion needs a batch norm in every group, found none in {', '.join(missing)}.",
                hint="the criterion l2 or taylor, or keep these groups with constraints",
            )
        return scores
