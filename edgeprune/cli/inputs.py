"""Example inputs from the command line: made from shapes, or read from an ``.npz`` file; always at deployment batch."""

from __future__ import annotations

import difflib
import inspect
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgeprune.errors import InputError
from edgeprune.near_files import near_files

if TYPE_CHECKING:
    import torch

_SPEC = re.compile(r"(?P<name>[^=\s]+)=(?P<shape>\d+(?:[xX,]\d+)*)(?::(?P<dtype>\w+))?")
_FORM = "NAME=1x3x32x32:float32"
_DTYPES = ("float32", "float16", "float64", "int64", "int32", "int16", "int8", "uint8", "bool")
_REASON_CHARS = 200


def example_inputs(
    model: torch.nn.Module, specs: Sequence[str] | None, file: Path | None, *, seed: int = 0
) -> tuple[torch.Tensor, ...] | dict[str, torch.Tensor]:
    """The model's example inputs, checked by running the model once.

    Args:
        model: In eval form.
        specs: ``NAME=1x3x32x32:float32`` each. Floating-point inputs are normally distributed, others are 0.
        file: An ``.npz`` with one array per input, instead of `specs`.
        seed: Of the random values.

    Returns:
        A dict by parameter name where all names are parameters of the model's ``forward``, else a tuple in their order.

    Raises:
        InputError: If there are no inputs, a text or file cannot be read, or the model does not take them.
    """
    if bool(specs) == (file is not None):
        found = "both" if specs else "neither"
        raise InputError(
            f"example inputs must come from --input or from --inputs, found {found}.", hint=f"--input {_FORM}"
        )
    named = _from_file(file) if file is not None else _from_specs(specs or (), seed)
    inputs = _arranged(model, named)
    _run_once(model, inputs, named)
    return inputs


def _from_specs(specs: Sequence[str], seed: int) -> dict[str, torch.Tensor]:
    import torch

    generator = torch.Generator().manual_seed(seed)
    named: dict[str, torch.Tensor] = {}
    for text in specs:
        match = _SPEC.fullmatch(text.strip())
        if match is None:
            named_after_all = re.fullmatch(r"\d+(?:[xX,]\d+)*(?::\w+)?", text.strip())
            hint = f"--input x={text.strip()}, with the input's name" if named_after_all else f"--input {_FORM}"
            raise InputError(f"an input must be written {_FORM}, found {text!r}.", hint=hint)
        name, dtype_name = match["name"], match["dtype"] or "float32"
        if dtype_name not in _DTYPES:
            near = difflib.get_close_matches(dtype_name, _DTYPES, n=1)
            raise InputError(
                f"the dtype of input {name!r} must be one of {', '.join(_DTYPES)}, found {dtype_name!r}.",
                hint=f"--input {name}={match['shape']}:{near[0] if near else 'float32'}",
            )
        if name in named:
            raise InputError(
                f"each input must be given once, {name!r} was given twice.", hint="another name for one of them"
            )
        shape = tuple(int(size) for size in re.split("[xX,]", match["shape"]))
        if 0 in shape:
            raise InputError(
                f"the sizes of input {name!r} must be at least 1, found {match['shape']}.", hint=f"--input {_FORM}"
            )
        dtype = getattr(torch, dtype_name)
        if dtype.is_floating_point:
            named[name] = torch.randn(shape, generator=generator).to(dtype)
        else:
            named[name] = torch.zeros(shape, dtype=dtype)
    return named


def _from_file(path: Path) -> dict[str, torch.Tensor]:
    import numpy as np
    import torch

    if not path.is_file():
        raise InputError(f"--inputs must name an .npz file, there is no {path}.", hint=near_files(path, ".npz"))
    try:
        with np.load(path, allow_pickle=False) as arrays:
            named = {name: torch.from_numpy(np.array(arrays[name])) for name in arrays.files}
    except (ValueError, OSError, zipfile.BadZipFile, AttributeError, TypeError) as error:
        raise InputError(f"{path} must be an .npz file of plain arrays.", hint="numpy.savez(path, x=array)") from error
    if not named:
        raise InputError(f"{path} must hold one array per input, it holds none.")
    return named


def _arranged(
    model: torch.nn.Module, named: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, ...] | dict[str, torch.Tensor]:
    parameters = inspect.signature(model.forward).parameters
    if all(name in parameters for name in named):
        # In the order of forward, as batches that come by position have them.
        return {name: named[name] for name in parameters if name in named}
    return tuple(named.values())


def _run_once(
    model: torch.nn.Module,
    inputs: tuple[torch.Tensor, ...] | dict[str, torch.Tensor],
    named: dict[str, torch.Tensor],
) -> None:
    import torch

    try:
        with torch.no_grad():
            if isinstance(inputs, dict):
                model(**inputs)
            else:
                model(*inputs)
    except Exception as error:
        given = ", ".join(f"{name} {'x'.join(map(str, value.shape))}" for name, value in named.items())
        reason = " ".join(str(error).split())
        reason = reason if len(reason) <= _REASON_CHARS else reason[:_REASON_CHARS].rstrip() + " ..."
        raise InputError(
            f"the model must run on its example inputs, with {given} it raised {type(error).__name__}: {reason}",
            hint=_wanted(model, error) or f"--input {_FORM} with the shape that the model takes, batch first",
        ) from error


def _wanted(model: torch.nn.Module, error: BaseException) -> str | None:
    """What the layer takes that refused its input, by the traceback; None where it is no layer of which that is known."""
    from torch import nn

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
        takes = f"whole numbers below {layer.num_embeddings} (--input NAME=1x16:int64)"
    else:
        return None
    first = next((name for name, module in model.named_modules() if not [*module.children()]), "")
    where = "the first layer" if names[id(layer)] == first else "the layer"
    made = "" if where == "the first layer" else ", which comes of another size of the input"
    return f"--input {_FORM}; {where} {names[id(layer)] or 'that is the model'} ({type(layer).__name__}) takes {takes}{made}"
