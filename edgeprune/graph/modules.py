"""Attributes of torch's own modules that follow the shapes of their parameters."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd


@dataclass(frozen=True)
class ModuleFacts:
    """What tracing remembers of a module.

    Attributes:
        kind: ``conv``, ``conv_transpose``, ``linear``, ``norm``, ``group_norm``, ``layer_norm``, ``prelu`` or ``recurrent``.
        groups: Conv groups, groups of a group norm, or gates of a recurrent layer.
        cumulative: Whether a batch norm averages cumulatively (``momentum=None``), which a program does not show.
    """

    kind: str
    groups: int = 1
    cumulative: bool = False


def module_facts(model: nn.Module) -> dict[str, ModuleFacts]:
    """Facts of all modules of a model whose attributes we know, by path."""
    facts: dict[str, ModuleFacts] = {}
    for path, module in model.named_modules():
        if isinstance(module, _ConvTransposeNd):
            facts[path] = ModuleFacts("conv_transpose", groups=module.groups)
        elif isinstance(module, _ConvNd):
            facts[path] = ModuleFacts("conv", groups=module.groups)
        elif isinstance(module, nn.Linear):
            facts[path] = ModuleFacts("linear")
        elif isinstance(module, _NormBase):
            facts[path] = ModuleFacts("norm", cumulative=module.momentum is None)
        elif isinstance(module, nn.GroupNorm):
            facts[path] = ModuleFacts("group_norm", groups=module.num_groups)
        elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
            facts[path] = ModuleFacts("layer_norm")
        elif isinstance(module, nn.PReLU):
            facts[path] = ModuleFacts("prelu")
        elif isinstance(module, nn.RNNBase):
            facts[path] = ModuleFacts("recurrent", groups={"LSTM": 4, "GRU": 3}.get(module.mode, 1))
    return facts


def attribute_of(model: nn.Module, name: str, shape: tuple[int, ...]) -> tuple[str, str]:
    """Path of the module that has a tensor, and the tensor's name there.

    A tensor from which a weight is computed (weight norm, spectral norm, masks of ``torch.nn.utils.prune``) counts as the weight
    where it has its shape.
    """
    path, _, leaf = name.rpartition(".")
    owner, computed, attribute = f".{path}".rpartition(".parametrizations.")
    if computed and leaf in ("original", "original1"):
        owner = owner.removeprefix(".")
    elif leaf in ("weight_orig", "weight_v"):
        owner, attribute = path, "weight"
    else:
        return path, leaf
    found = getattr(model.get_submodule(owner), attribute, None)
    return (owner, attribute) if found is not None and tuple(found.shape) == shape else (path, leaf)


def attributes_after(
    facts: ModuleFacts, old: tuple[int, ...], new: tuple[int, ...], stays: npt.NDArray[np.bool_]
) -> dict[str, int | list[int]]:
    """New attribute values of a module whose weight went from one shape to another.

    A conv with one input channel per conv group (depthwise) loses whole groups; any other grouped conv keeps its
    groups and loses the same number of channels in each.

    Args:
        facts: Of the module.
        old: Shape of its weight.
        new: Shape of what is left of it.
        stays: Which indices stay along the first axis, shape (old[0],).
    """
    if facts.kind == "linear":
        return {"in_features": new[1], "out_features": new[0]}
    if facts.kind == "norm":
        return {"num_features": new[0]}
    if facts.kind == "group_norm":
        return {"num_channels": new[0], "num_groups": int(stays.reshape(facts.groups, -1).any(axis=1).sum())}
    if facts.kind == "layer_norm":
        return {"normalized_shape": list(new)}
    if facts.kind == "prelu":
        return {"num_parameters": new[0]}
    if facts.kind == "recurrent":
        return {"input_size": new[1], "hidden_size": new[0] // facts.groups}
    if facts.kind == "conv":
        groups = facts.groups * new[0] // old[0] if facts.groups > 1 and old[1] == 1 else facts.groups
        return {"out_channels": new[0], "in_channels": new[1] * groups, "groups": groups}
    groups = facts.groups * new[0] // old[0] if facts.groups == old[0] and facts.groups > 1 else facts.groups
    return {"in_channels": new[0], "out_channels": new[1] * groups, "groups": groups}
