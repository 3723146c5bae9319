"""The same model through Torch-Pruning with its documented defaults: local L2 magnitude, ratio 0.5, outputs ignored."""

from __future__ import annotations

import signal
from importlib import metadata
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from graph_coverage import zoo
from graph_coverage.recording import Record

RATIO = 0.5
_LAYERS = (nn.Linear, nn.modules.conv._ConvNd)


def measure(name: str, record: Record, limit_s: float, times_only: bool) -> None:
    """Write down what Torch-Pruning makes of a model.

    Args:
        name: The model, see `graph_coverage.zoo`.
        record: Where to.
        limit_s: Longest time for constructor and step together; the process ends there.
        times_only: Stop when the model is cut.
    """
    import torch_pruning

    with record.step("build"):
        model, inputs = zoo.build(name)
    _warm_up()
    dense = _count(model)
    record.say(parameters=dense, version=metadata.version("torch-pruning"))
    with record.step("find_last"):
        ignored = last_layers(model, inputs)
        names = {module: name for name, module in model.named_modules()}
        record.say(ignored=[names[layer] for layer in ignored])
    # The default action of this signal ends the process, whatever it is busy with.
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    with record.step("construct"):
        pruner = torch_pruning.pruner.BasePruner(
            model,
            inputs,
            importance=torch_pruning.importance.MagnitudeImportance(p=2),
            pruning_ratio=RATIO,
            ignored_layers=ignored,
        )
    with record.step("step"):
        pruner.step()
    signal.setitimer(signal.ITIMER_REAL, 0)
    if times_only:
        return
    record.say(left=_count(model), removed=1 - _count(model) / dense)
    with record.step("run"):
        outputs = _forward(model, inputs)
    record.say(finite=all(bool(tensor.isfinite().all()) for tensor in outputs))


def _warm_up() -> None:
    """As on the other side: import what the first use imports."""
    import torch_pruning

    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4)).eval()
    importance = torch_pruning.importance.MagnitudeImportance(p=2)
    sample = torch.randn(1, 3, 8, 8)
    torch_pruning.pruner.BasePruner(net, sample, importance, pruning_ratio=RATIO, ignored_layers=[net[-1]]).step()


def last_layers(model: nn.Module, inputs: Any) -> list[nn.Module]:
    """The linear and convolution layers that make the outputs: the first ones on every way back from them.

    A user of Torch-Pruning names them by hand (``ignored_layers=[model.fc]``), so that the outputs keep their size.
    """
    owner = {}
    for module in model.modules():
        if isinstance(module, _LAYERS) and isinstance(module.weight, nn.Parameter):
            owner[id(module.weight)] = module
    outputs = [leaf for leaf in pytree.tree_leaves(_call(model, inputs)) if isinstance(leaf, torch.Tensor)]
    pending = [tensor.grad_fn for tensor in outputs if tensor.grad_fn is not None]
    seen = set(pending)
    found: dict[nn.Module, None] = {}
    while pending:
        function = pending.pop()
        parents = [parent for parent, _ in function.next_functions if parent is not None]
        layers = [owner[weight] for parent in parents for weight in _weights(parent) if weight in owner]
        if layers:
            found.update(dict.fromkeys(layers))
            continue
        for parent in parents:
            if parent not in seen:
                seen.add(parent)
                pending.append(parent)
    return list(found)


def _weights(function: Any) -> list[int]:
    """The parameter behind a gradient accumulator, also behind the transpose that a linear layer puts before it."""
    if hasattr(function, "variable"):
        return [id(function.variable)]
    if type(function).__name__ in ("TBackward0", "TransposeBackward0"):
        return [id(parent.variable) for parent, _ in function.next_functions if hasattr(parent, "variable")]
    return []


def _call(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def _forward(model: nn.Module, inputs: Any) -> list[torch.Tensor]:
    with torch.no_grad():
        leaves = pytree.tree_leaves(_call(model.eval(), inputs))
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
