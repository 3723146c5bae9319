"""Torch's exported program as what an engine is made from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgeprune.errors import ExportError
from edgeprune.spec import TensorSpec

if TYPE_CHECKING:
    import torch


def exported(
    module: torch.nn.Module, example_inputs: tuple[torch.Tensor, ...]
) -> tuple[torch.export.ExportedProgram, tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """A module in eval form as a program with fixed shapes, and its inputs and outputs.

    Args:
        module: Its mode is put back afterwards.
        example_inputs: Positional tensors at the deployment batch.

    Raises:
        ExportError: The module cannot be exported.
    """
    import torch

    training = module.training
    module.eval()
    try:
        with torch.no_grad():
            program = torch.export.export(module, example_inputs, strict=False)
    # Whatever the user's forward raises, besides torch's own errors; each means the same to the user.
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(".")
        raise ExportError(
            f"torch must be able to export the model, it says: {reason}.", hint="edgeprune explain MODEL"
        ) from error
    finally:
        module.train(training)
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    told = program.graph_signature
    return program, _specs(told.user_inputs, values, "input"), _specs(told.user_outputs, values, "output")


def _specs(names: Any, values: dict[str, Any], kind: str) -> tuple[TensorSpec, ...]:
    found = [str(name) for name in names]
    # One value may be two outputs; names of tensors are unique.
    unique = found if len(set(found)) == len(found) else [f"{kind}_{place}" for place in range(len(found))]
    return tuple(
        TensorSpec(name, tuple(values[source].shape), str(values[source].dtype).removeprefix("torch."))
        for name, source in zip(unique, found, strict=True)
    )
