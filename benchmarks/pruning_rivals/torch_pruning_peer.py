"""Torch-Pruning at a latency: its global ratio is searched until the cut model takes what was asked for.

Its selection is also written down as a plan of ours wherever our groups can say it, so that its models get the same closed-form
recovery as all others. A plan counts only if the model cut by it computes what Torch-Pruning's does.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import edgeprune
from edgeprune.errors import EdgepruneError
from edgeprune.surgery.plan import PruningPlan, make_plan

RATIOS = tuple(round(0.05 * step, 2) for step in range(1, 19))
FINEST = 0.004
"""How far apart ratios are, at most, where a target is met."""
METHODS = tuple(
    f"torch-pruning {importance} {rounding}"
    for importance in ("magnitude", "taylor")
    for rounding in ("plain", "round_to=8", "round_to=16")
)


def gradients(model: nn.Module, batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Of the summed loss of all batches in eval form, by parameter; the model stays as it is."""
    module = copy.deepcopy(model).train(False)
    for inputs, labels in batches:
        F.cross_entropy(module(inputs), labels, reduction="sum").backward()
    return {name: value.grad for name, value in module.named_parameters() if value.grad is not None}


def cut(method: str, model: nn.Module, last: str, ratio: float, taylor: Mapping[str, torch.Tensor]) -> nn.Module:
    """A copy, globally pruned by one of `METHODS`; scores of Taylor come from the gradients of `gradients`."""
    import torch_pruning as tp

    _, importance, rounding = method.split(" ")
    module = copy.deepcopy(model).train(False)
    example = torch.zeros(1, 3, 32, 32)
    if importance == "taylor":
        for name, value in module.named_parameters():
            value.grad = taylor[name].clone() if name in taylor else None
    chosen = (
        tp.importance.GroupMagnitudeImportance(p=2)
        if importance == "magnitude"
        else tp.importance.GroupTaylorImportance()
    )
    tp.pruner.BasePruner(
        module,
        example,
        importance=chosen,
        global_pruning=True,
        pruning_ratio=ratio,
        round_to=int(rounding.removeprefix("round_to=")) if rounding != "plain" else None,
        ignored_layers=[module.get_submodule(last)],
    ).step()
    module.zero_grad(set_to_none=True)
    return module.eval()


def as_plan(graph: edgeprune.ChannelGraph, pruned: nn.Module) -> PruningPlan | None:
    """The plan that makes the same model, by the running statistics of the channels that are left; None if there is none."""
    before, after = dict(graph.model.named_buffers()), dict(pruned.named_buffers())
    kept: dict[str, list[int]] = {}
    for group in graph.groups:
        for member in group.members:
            if member.parameter.endswith("running_mean") and all(len(indices) == 1 for indices in member.indices):
                values, left = before[member.parameter].numpy(), after[member.parameter].numpy()
                kept[group.name] = [
                    unit for unit, (index,) in enumerate(member.indices) if np.any(left == values[index])
                ]
                break
    try:
        plan = make_plan(graph, kept)
        own = edgeprune.apply(graph.model, plan).eval()
        with torch.no_grad():
            x = torch.randn(4, 3, 32, 32)
            return plan if torch.allclose(own(x), pruned(x), rtol=1e-3, atol=1e-4) else None
    except (EdgepruneError, RuntimeError):
        return None


def mildest(target: float, curve: dict[str, float], look: Callable[[float], float]) -> Iterator[float]:
    """Ratios that meet a target, the mildest first; below the first one of the grid others are tried down to `FINEST`.

    Args:
        target: Share of the dense latency.
        curve: Ratio to measured share of the dense latency; grows with what is looked at.
        look: Measures a ratio.
    """
    fitting = sorted(float(ratio) for ratio, share in curve.items() if share <= target * 1.01)
    if not fitting:
        return
    high = fitting[0]
    low = max((float(ratio) for ratio in curve if float(ratio) < high), default=0.0)
    while high - low > FINEST:
        middle = round((low + high) / 2, 4)
        if look(middle) <= target * 1.01:
            high = middle
        else:
            low = middle
    yield from sorted({high, *fitting})
