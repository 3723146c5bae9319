"""Torch-Pruning on a vision transformer, with the settings of its example for those of timm, at a ratio.

Two of them: one ratio for every layer, the width of the embeddings and head dimensions included (what the example does by
default, scored by Taylor); and its `--bottleneck`, which leaves the embeddings alone, with whole heads going
(`--prune_num_heads`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import nn
from torch.nn import functional as F

METHODS = ("torch-pruning uniform", "torch-pruning bottleneck heads")
RATIOS = tuple(round(0.05 * step, 2) for step in range(1, 17))


def cut(
    method: str, model: nn.Module, ratio: float, batches: Iterable[tuple[torch.Tensor, torch.Tensor]], most: int = 10
) -> nn.Module:
    """A copy, pruned by one of `METHODS`; gradients of Taylor come from so many batches, as in the example."""
    import torch_pruning as tp

    module = copy.deepcopy(model).train(False)
    heads = method == "torch-pruning bottleneck heads"
    attentions = [one for one in module.modules() if hasattr(one, "num_heads")]
    ignored = [module.get_submodule("head")]
    if heads:
        ignored += [one.fc2 for one in module.modules() if hasattr(one, "fc2")]
        ignored += [one.proj for one in attentions] + list(module.get_submodule("stem"))
    pruner = tp.pruner.BasePruner(
        module,
        torch.zeros(1, 3, 32, 32),
        global_pruning=False,
        importance=tp.importance.GroupTaylorImportance(),
        pruning_ratio=ratio,
        ignored_layers=ignored,
        num_heads={one.qkv: one.num_heads for one in attentions},
        prune_num_heads=heads,
        prune_head_dims=not heads,
        head_pruning_ratio=ratio if heads else 0.0,
        round_to=2,
    )
    module.zero_grad()
    for place, (inputs, labels) in enumerate(batches):
        if place >= most:
            break
        F.cross_entropy(module(inputs), labels).backward()
    for group in pruner.step(interactive=True):
        group.prune()
    for one in attentions:
        one.num_heads = pruner.num_heads[one.qkv]
        one.head_dim = one.qkv.out_features // (3 * one.num_heads)
    module.zero_grad(set_to_none=True)
    return module.eval()
