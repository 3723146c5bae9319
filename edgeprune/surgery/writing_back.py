"""What a cut model learned, back into the dense one that it was cut from."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import nn

    from edgeprune.surgery.plan import PruningPlan


def write_back(model: nn.Module, cut: nn.Module, plan: PruningPlan) -> None:
    """Put the tensors of a cut model where they were cut from; all else of the model stays.

    Args:
        model: The dense model, whose parameters and buffers are written in place.
        cut: What became of it: the same names, but for those of branches that were removed.
        plan: What was cut.
    """
    found = {**dict(cut.named_parameters(remove_duplicate=False)), **dict(cut.named_buffers(remove_duplicate=False))}
    known = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    with torch.no_grad():
        for name, whole in known.items():
            if name not in found:
                continue  # of a branch that was removed
            axes = plan.kept.get(name)
            if axes is None:
                whole.copy_(found[name])
                continue
            places = [
                torch.tensor(axes.get(axis, range(size)), device=whole.device) for axis, size in enumerate(whole.shape)
            ]
            whole[torch.meshgrid(*places, indexing="ij")] = found[name].detach()
