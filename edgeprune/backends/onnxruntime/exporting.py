"""From a module to an ONNX file that remembers which traced node each of its tensors comes from."""

from __future__ import annotations

import ast
import json
import logging
import operator
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.backends.onnxruntime.versions import WRITTEN, OnnxVersions
from edgeprune.errors import ExportError
from edgeprune.files import replacing
from edgeprune.spec import TensorSpec

if TYPE_CHECKING:
    import onnx
    import torch

SOURCES_KEY = "edgeprune.sources"
"""Key of the model's metadata: JSON of tensor name to name of the node in the traced program."""

MOST_BYTES = (1 << 31) - (1 << 20)
"""What protocol buffers can hold, less what is no weights. Engines carry their weights inside: one file is hashed, sent and
switched."""

_TAKEN_IN = frozenset(("Add", "Relu", "LeakyRelu", "Clip", "Sigmoid", "HardSigmoid", "Tanh"))
"""What ONNX Runtime computes as part of a convolution."""

logger = logging.getLogger("edgeprune.backends.onnxruntime")


def export(
    module: torch.nn.Module, example_inputs: tuple[torch.Tensor, ...], path: Path, versions: OnnxVersions = WRITTEN
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Write `module` in eval form as a checked ONNX file with static shapes.

    The exporter's own defaults (opset 20 and IR version 10) are refused by older runtimes.

    Args:
        module: What to export; its mode is put back afterwards.
        example_inputs: Positional tensors at the deployment batch.
        path: File to write; it appears whole or not at all.
        versions: Opset and IR version; opsets below the exporter's are converted to.

    Returns:
        Inputs and outputs of the file.

    Raises:
        ExportError: The module cannot be exported.
    """
    import onnx

    from edgeprune.backends.onnxruntime.older_opsets import converted

    model, sources = _program(module, example_inputs)
    size = sum(tensor.ByteSize() for tensor in model.graph.initializer)
    if size > MOST_BYTES:
        raise ExportError(
            f"a model's weights must fit into one ONNX file, which holds {MOST_BYTES / 1e9:.2f} GB, found {size / 1e9:.2f} GB.",
            hint="prune it further",
        )
    if versions.opset < WRITTEN.opset:
        model = converted(model, versions)
    for value in _small_metadata(sources):
        entry = model.metadata_props.add()
        entry.key, entry.value = value
    model.ir_version = versions.ir_version
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"the exported ONNX model must pass the ONNX checker, {_first_line(error)}.") from error
    with replacing(path) as partial:
        partial.write_bytes(model.SerializeToString())
    return _specs(model.graph.input), _specs(model.graph.output)


def module_paths(model: onnx.ModelProto) -> dict[str, str]:
    """Name of each node to the path of the module that called it, where one did: the exporter's scopes end with the call."""
    paths = {}
    for node in model.graph.node:
        noted = [entry.value for entry in node.metadata_props if entry.key == "pkg.torch.onnx.name_scopes"]
        scopes = [str(scope) for scope in ast.literal_eval(noted[0])] if noted else []
        if len(scopes) > 2:
            paths[node.name] = scopes[-2]
    return paths


def modules_behind(model: onnx.ModelProto) -> dict[str, str]:
    """Name of each tensor to the module whose call makes it, what a runtime computes together with that call among it.

    A convolution that takes in a sum or an activation is named after what that makes.
    """
    paths = module_paths(model)
    found: dict[str, str] = {}
    for node in model.graph.node:
        near = [found[name] for name in node.input if name in found] if node.op_type in _TAKEN_IN else []
        # Of two branches that are summed the later one takes the sum.
        path = paths.get(node.name) or (near[-1] if near else None)
        if path is not None:
            found |= dict.fromkeys(filter(None, node.output), path)
    return found


def _program(
    module: torch.nn.Module, example_inputs: tuple[torch.Tensor, ...]
) -> tuple[onnx.ModelProto, dict[str, str]]:
    import torch

    from edgeprune.backends.onnxruntime.attention import with_four_axes

    training = module.training
    module.eval()
    noisy = logging.getLogger("torch.onnx")
    level = noisy.level
    noisy.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad(), _operators_kept():
            warnings.simplefilter("ignore")
            program = torch.export.export(module, example_inputs, strict=False)
            with_four_axes(program)
            exported = torch.onnx.export(program, dynamo=True, verbose=False, opset_version=WRITTEN.opset)
    # The exporters raise whatever the user's forward raised, besides their own errors; each means the same to the user.
    except Exception as error:
        raise ExportError(
            f"the model must be exportable to ONNX, torch says: {_first_line(error)}.",
            hint="edgeprune explain MODEL",
        ) from error
    finally:
        noisy.setLevel(level)
        module.train(training)
    assert exported is not None
    return exported.model_proto, _sources(program, exported.exported_program)


@contextmanager
def _operators_kept() -> Iterator[None]:
    """Within, torch finds out once in a process which of its operators ONNX has, and not anew for each export.

    It reads the source of five hundred functions for that, which is most of what the export of a small network takes
    (`ONNXRegistry.from_torchlib` in torch/onnx/_internal/exporter/_registration.py). The exports of others are left alone: they
    may add operators to theirs. Where torch has no such function, there is nothing to keep.
    """
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry
    except ImportError:
        yield
        return
    its_own, find = vars(ONNXRegistry).get("from_torchlib"), getattr(ONNXRegistry, "from_torchlib", None)
    if its_own is None or find is None:
        yield
        return
    setattr(ONNXRegistry, "from_torchlib", staticmethod(lambda opset_version: _operators(find, opset_version)))  # noqa: B010
    try:
        yield
    finally:
        setattr(ONNXRegistry, "from_torchlib", its_own)  # noqa: B010


@lru_cache(maxsize=4)
def _operators(find: Callable[..., Any], opset: int) -> Any:
    return find(opset_version=opset)


def _sources(traced: torch.export.ExportedProgram, decomposed: torch.export.ExportedProgram | None) -> dict[str, str]:
    """Name of each tensor that may be in the file to the node of the traced program that it is the value of.

    A node of the decomposed program remembers which node it was made from. Of an operation with several results
    (chunk, split, unbind) that is the operation for all of them; which result it is, says its place among them.
    """
    sources: dict[str, str] = {}
    nodes = () if decomposed is None else decomposed.graph.nodes
    for node in nodes:
        origin: list[Any] = node.meta.get("from_node", [])
        while origin:
            sources[node.name] = origin[-1].name
            origin = origin[-1].from_node
    whole = {node.name: node for node in traced.graph.nodes}
    parts = {node.args: node.name for node in traced.graph.nodes if node.target is operator.getitem}
    for node in nodes:
        if node.target is not operator.getitem:
            continue
        made, place = node.args
        source = whole.get(sources.get(made.name, made.name))
        part = parts.get((source, place))
        if part is not None and _shapes(made) == _shapes(source):
            # The exporter names what stays a list by the list, and so it does the outputs of a Split that takes its place
            # (torch/onnx/_internal/exporter/_core.py; split_to_sequence in onnxscript/optimizer/_constant_folding.py).
            sources |= dict.fromkeys((node.name, f"{made.name}__{place}", f"{made.name}_split_{place}"), part)
    return sources


def _shapes(node: torch.fx.Node | None) -> list[tuple[int, ...]] | None:
    """Shapes of the results of an operation that has several; None of any other."""
    values = None if node is None else node.meta.get("val")
    return [tuple(getattr(value, "shape", ())) for value in values] if isinstance(values, (list, tuple)) else None


def _small_metadata(sources: dict[str, str]) -> list[tuple[str, str]]:
    return [(SOURCES_KEY, json.dumps(sources, sort_keys=True, separators=(",", ":")))]


def _specs(values: Any) -> tuple[TensorSpec, ...]:
    import onnx

    return tuple(
        TensorSpec(
            value.name,
            tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim),
            onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name,
        )
        for value in values
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(".")
