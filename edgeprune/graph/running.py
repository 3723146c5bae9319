"""Whether a model runs on its example inputs, and what the layer takes that refused them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from edgeprune.errors import InputError

_REASON_CHARS = 200


def require_runs(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    names: Sequence[str] | None = None,
    form: str = "example_inputs=torch.randn(1, 3, 32, 32)",
    whole: str = "torch.zeros(1, 16, dtype=torch.int64)",
) -> None:
    """Run a model once on its example inputs, without gradients.

    Args:
        model: In eval form.
        args: Positional arguments of its forward.
        kwargs: Named ones.
        names: What the inputs are called, in order; those of forward's parameters when None.
        form: How example inputs are written where the caller is, for the hint.
        whole: The same of whole numbers.

    Raises:
        InputError: It does not take them; the hint says what the layer takes that refused them, where that is known.
    """
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    except Exception as error:
        called = (names or _parameters(model))[: len(args)]
        values = {**dict(zip(called, args, strict=False)), **kwargs}
        given = ", ".join(
            f"{name} {'x'.join(map(str, value.shape)) if isinstance(value, torch.Tensor) else type(value).__name__}"
            for name, value in values.items()
        )
        reason = " ".join(str(error).split())
        reason = reason if len(reason) <= _REASON_CHARS else reason[:_REASON_CHARS].rstrip() + " ..."
        taken = _wanted(model, error, whole)
        raise InputError(
            f"the model must run on its example inputs, with {given} it raised {type(error).__name__}: {reason}",
            hint=f"{form} with the shape that the model takes, batch first" if taken is None else f"{form}; {taken}",
        ) from error


def _parameters(model: nn.Module) -> list[str]:
    return list(inspect.signature(model.forward).parameters)


def _wanted(model: nn.Module, error: BaseException, whole: str) -> str | None:
    """What the layer takes that refused its input, by the traceback; None where it is no layer of which that is known."""
    names = {id(module): name for name, module in model.named_modules()}
    layer: nn.Module | None = None
    step = error.__traceback__
    while step is not None:
        found = step.tb_frame.f_locals.get("self")
        if isinstance(found, nn.Module) and id(found) in names:
            layer = found
        step = step.tb_next
    if layer is None:
        return None
    convolutions = {nn.Conv1d: "length", nn.Conv2d: "height x width", nn.Conv3d: "depth x height x width"}
    sizes = next((told for kind, told in convolutions.items() if isinstance(layer, kind)), None)
    if sizes is not None:
        takes = f"batch x {layer.in_channels} x {sizes}"
    elif isinstance(layer, nn.Linear):
        takes = f"{layer.in_features} features last"
    elif isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
        takes = f"{layer.num_features} channels, second"
    elif isinstance(layer, nn.LayerNorm):
        takes = f"{' x '.join(map(str, layer.normalized_shape))} last"
    elif isinstance(layer, nn.Embedding):
        takes = f"whole numbers below {layer.num_embeddings} ({whole})"
    else:
        return None
    first = next((name for name, module in model.named_modules() if not [*module.children()]), "")
    where = "the first layer" if names[id(layer)] == first else "the layer"
    made = "" if where == "the first layer" else ", which comes of another size of the input"
    return f"{where} {names[id(layer)] or 'that is the model'} ({type(layer).__name__}) takes {takes}{made}"
