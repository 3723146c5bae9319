"""Golden data: inputs, and what the module in PyTorch makes of them; every engine is held against it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeprune.errors import InputError, SurgeryError

if TYPE_CHECKING:
    import torch

EDGE_CASES = ("zeros", "extremes", "denormals")
"""All zeros; the largest magnitude of the samples with random signs; numbers below the smallest normal float."""

INT8_EDGE_CASES = ("zeros", "denormals")
"""Those that do not leave the range of calibration data, which an int8 engine clips to by design."""
SAMPLES = 32
"""Fewest golden samples."""

SAMPLE = "sample"

_SAMPLES_HINT = (
    "a --task whose batches have the shape and type of the example inputs (--input); golden_inputs= in Python"
)


@dataclass(frozen=True)
class Golden:
    """Cases, each one run of the engine.

    Attributes:
        kinds: Per case ``"sample"`` or the name of an edge case.
        inputs: Per input an array of shape (cases, *deployment shape).
        outputs: Per output an array of shape (cases, *output shape), computed in float32 on the CPU.
    """

    kinds: tuple[str, ...]
    inputs: tuple[np.ndarray[Any, Any], ...]
    outputs: tuple[np.ndarray[Any, Any], ...]

    def save(self, path: Path) -> None:
        """Write an ``.npz`` without anything pickled: ``kinds``, ``input_0``, ..., ``output_0``, ..."""
        arrays = {f"input_{index}": array for index, array in enumerate(self.inputs)}
        arrays.update((f"output_{index}", array) for index, array in enumerate(self.outputs))
        with path.open("wb") as stream:
            np.savez_compressed(stream, allow_pickle=False, kinds=np.array(self.kinds, dtype=np.str_), **arrays)


def make_golden(
    module: torch.nn.Module,
    example_inputs: Sequence[torch.Tensor],
    samples: Any = None,
    *,
    count: int = SAMPLES,
    edge_cases: Sequence[str] = EDGE_CASES,
    seed: int = 0,
) -> Golden:
    """Choose golden inputs and compute the golden outputs.

    Args:
        module: The module as pruned; it is not changed.
        example_inputs: Positional tensors at the deployment batch; they give shapes and dtypes, and where there are no
            samples the range of values too.
        samples: Calibration data, an array or tensor per input: shape (samples, ...) to be cut into deployment batches, or
            (cases, *deployment shape). Where they are fewer than `count`, random ones with their mean and deviation follow.
        count: Fewest samples.
        edge_cases: Names out of `EDGE_CASES`.
        seed: Of everything random.

    Raises:
        InputError: Samples do not fit the example inputs, or the module's outputs on them are not finite.
    """
    for name in edge_cases:
        if name not in EDGE_CASES:
            raise InputError(f"an edge case must be one of {', '.join(EDGE_CASES)}, found {name!r}.")
    examples = [tensor.detach().cpu().numpy() for tensor in example_inputs]
    if not examples:
        raise InputError("a module must have at least one example input, found none.")
    rng = np.random.default_rng(seed)
    given = [] if samples is None else _cut(_arrays(samples), examples)
    batch = examples[0].shape[0] if examples[0].ndim else 1
    wanted = ceil(count / max(batch, 1))
    columns = []
    for index, example in enumerate(examples):
        cases = given[index][:wanted] if given else example[np.newaxis][:0]
        source = cases if len(cases) else example
        columns.append(np.concatenate([cases, _random(rng, source, (wanted - len(cases), *example.shape))]))
    kinds = [SAMPLE] * wanted
    edges = [name for name in edge_cases if name != "denormals" or any(array.dtype.kind == "f" for array in columns)]
    inputs = tuple(
        np.concatenate([array, *(_edge(rng, name, array)[np.newaxis] for name in edges)]).astype(array.dtype)
        for array in columns
    )
    return Golden((*kinds, *edges), inputs, _outputs(module, inputs, wanted))


def cut(samples: Any, example_inputs: Sequence[torch.Tensor]) -> list[np.ndarray[Any, Any]]:
    """Samples as whole deployment batches: an array per input, of shape (cases, *deployment shape).

    Args:
        samples: As in `make_golden`.
        example_inputs: Positional tensors at the deployment batch.

    Raises:
        InputError: Samples do not fit the example inputs.
    """
    return _cut(_arrays(samples), [tensor.detach().cpu().numpy() for tensor in example_inputs])


def positional(module: torch.nn.Module, example_inputs: Any) -> tuple[torch.Tensor, ...]:
    """Example inputs (a tensor, a tuple or list, or a dict by parameter name) in the order of ``forward``.

    Raises:
        InputError: They are no tensors, or ``forward`` does not take them.
    """
    import inspect

    import torch

    from edgeprune.surgery.program_module import ProgramModule

    if isinstance(example_inputs, torch.Tensor):
        return (example_inputs,)
    values: Sequence[Any]
    if isinstance(example_inputs, Mapping) and isinstance(module, ProgramModule):
        try:
            values = module.in_order(example_inputs)
        except SurgeryError as error:
            raise InputError(error.message) from error
    elif isinstance(example_inputs, Mapping):
        try:
            bound = inspect.signature(module.forward).bind(**example_inputs)
        except TypeError as error:
            raise InputError(
                f"forward must take the example inputs {sorted(example_inputs)}, found: {error}."
            ) from error
        if bound.kwargs:
            raise InputError(f"example inputs must be positional parameters of forward, found {sorted(bound.kwargs)}.")
        values = bound.args
    else:
        values = tuple(example_inputs)
    for value in values:
        if not isinstance(value, torch.Tensor):
            raise InputError(f"example inputs must be tensors, found {type(value).__name__}.")
    return tuple(values)


def _arrays(samples: Any) -> list[np.ndarray[Any, Any]]:
    if isinstance(samples, Mapping):
        samples = tuple(samples.values())
    columns = samples if isinstance(samples, (tuple, list)) else (samples,)
    return [np.asarray(column.detach().cpu() if hasattr(column, "detach") else column) for column in columns]


def _cut(samples: list[np.ndarray[Any, Any]], examples: list[np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
    """Samples as whole cases; a last chunk that does not fill a deployment batch is left out."""
    if len(samples) != len(examples):
        raise InputError(
            f"golden inputs must be given for {len(examples)} inputs, found {len(samples)}.", hint=_SAMPLES_HINT
        )
    columns = []
    for index, (array, example) in enumerate(zip(samples, examples, strict=True)):
        if array.shape[1:] == example.shape:
            cases = array
        elif example.ndim and array.shape[1:] == example.shape[1:]:
            batch = example.shape[0]
            cases = array[: len(array) // batch * batch].reshape(-1, *example.shape)
        else:
            raise InputError(
                f"golden inputs must have shape (samples, {', '.join(map(str, example.shape[1:]))}) for input {index}, "
                f"found {array.shape}.",
                hint=_SAMPLES_HINT,
            )
        if not np.can_cast(array.dtype, example.dtype, "same_kind"):
            raise InputError(
                f"golden inputs must be {example.dtype} for input {index}, found {array.dtype}.", hint=_SAMPLES_HINT
            )
        columns.append(cases.astype(example.dtype))
    if len({len(cases) for cases in columns}) != 1:
        raise InputError(f"golden inputs must be as many for each input, found {[len(cases) for cases in columns]}.")
    return columns


def _random(rng: np.random.Generator, source: np.ndarray[Any, Any], shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Values like those of `source`; integers and booleans are drawn from it, so that indices stay valid."""
    if source.dtype.kind != "f":
        return rng.choice(source.reshape(-1), size=shape).astype(source.dtype)
    deviation = float(source.std()) if source.size > 1 else 0.0
    # Constant example inputs (zeros, ones) say nothing about the data.
    mean, deviation = (float(source.mean()), deviation) if deviation > 0 else (0.0, 1.0)
    return (mean + deviation * rng.standard_normal(shape)).astype(source.dtype)


def _edge(rng: np.random.Generator, name: str, cases: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    shape, dtype = cases.shape[1:], cases.dtype
    if name == "zeros":
        return np.zeros(shape, dtype)
    if dtype.kind != "f":
        return np.full(shape, cases.max(), dtype) if name == "extremes" else cases[0]
    signs = rng.choice(np.array([-1.0, 1.0]), size=shape)
    if name == "extremes":
        magnitude = np.full(shape, float(np.abs(cases).max()))
    else:
        magnitude = float(np.finfo(dtype).smallest_subnormal) * rng.integers(1, 1000, size=shape)
    edge: np.ndarray[Any, Any] = (signs * magnitude).astype(dtype)
    return edge


def _outputs(
    module: torch.nn.Module, inputs: tuple[np.ndarray[Any, Any], ...], samples: int
) -> tuple[np.ndarray[Any, Any], ...]:
    import torch
    from torch.utils._pytree import tree_leaves

    # A copy: neither the user's training flags, device nor running statistics may change.
    eager = copy.deepcopy(module).cpu().float().eval()
    cases = []
    with torch.no_grad():
        for case in range(len(inputs[0])):
            found = eager(*(torch.from_numpy(array[case].copy()) for array in inputs))
            leaves = [leaf for leaf in tree_leaves(found) if isinstance(leaf, torch.Tensor)]
            # Copies: a module may hand out one and the same buffer each time.
            cases.append([leaf.cpu().numpy().copy() for leaf in leaves])
    if not cases[0]:
        raise InputError("a module must return tensors, found none.")
    outputs = tuple(np.stack([case[index] for case in cases]) for index in range(len(cases[0])))
    for index, array in enumerate(outputs):
        if array.dtype.kind == "f" and not np.isfinite(array[:samples]).all():
            raise InputError(
                f"the module's output {index} must be finite on the golden samples, found NaN or infinity."
            )
    return outputs
