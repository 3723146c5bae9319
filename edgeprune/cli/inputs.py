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
FORM = "NAME=1x3x32x32:float32"
"""How an input is written on the command line."""
_DTYPES = ("float32", "float16", "float64", "int64", "int32", "int16", "int8", "uint8", "bool")


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
        A dict by parameter name where all names are parameters of the model's ``forward``; where none is, a tuple in their order.

    Raises:
        InputError: If there are no inputs, a text or file cannot be read, or the model does not take them.
    """
    from edgeprune.graph.running import require_runs

    if bool(specs) == (file is not None):
        found = "both" if specs else "neither"
        raise InputError(
            f"example inputs must come from --input or from --inputs, found {found}.", hint=f"--input {FORM}"
        )
    named = _from_file(file) if file is not None else _from_specs(specs or (), seed)
    inputs = _arranged(model, named)
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
    require_runs(model, args, kwargs, names=tuple(named), form=f"--input {FORM}", whole="--input NAME=1x16:int64")
    return inputs


def _from_specs(specs: Sequence[str], seed: int) -> dict[str, torch.Tensor]:
    import torch

    generator = torch.Generator().manual_seed(seed)
    named: dict[str, torch.Tensor] = {}
    for text in specs:
        match = _SPEC.fullmatch(text.strip())
        if match is None:
            named_after_all = re.fullmatch(r"\d+(?:[xX,]\d+)*(?::\w+)?", text.strip())
            hint = f"--input x={text.strip()}, with the input's name" if named_after_all else f"--input {FORM}"
            raise InputError(f"an input must be written {FORM}, found {text!r}.", hint=hint)
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
                f"the sizes of input {name!r} must be at least 1, found {match['shape']}.", hint=f"--input {FORM}"
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
    strange = [name for name in named if name not in parameters]
    if not strange:
        # In the order of forward, as batches that come by position have them.
        return {name: named[name] for name in parameters if name in named}
    if len(strange) < len(named):
        raise InputError(
            f"inputs must all be named as the parameters of forward are ({', '.join(parameters)}), or none of them, found "
            f"{', '.join(named)}.",
            hint=f"name {strange[0]} as forward does",
        )
    return tuple(named.values())
