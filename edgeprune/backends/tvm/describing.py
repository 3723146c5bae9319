"""What stands behind the code of an engine: what it is for, its inputs and outputs, and the kernel of each of its calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from edgeprune.backends._base import OperatorGraph
from edgeprune.backends.tvm import engine_file, kernels
from edgeprune.backends.tvm.building import Library
from edgeprune.backends.tvm.target import SERIES, TvmTarget
from edgeprune.errors import CompileError
from edgeprune.spec import Kernel, TensorSpec


def described(
    library: Library,
    target: TvmTarget,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    made: Sequence[Kernel | None],
    graph: OperatorGraph,
) -> bytes:
    """The engine file of compiled code.

    Args:
        library: The code.
        target: What it was compiled for.
        inputs: Of the network.
        outputs: Of the network.
        made: Kernel of each call; None of views, and where it is not known.
        graph: Operators of the network; empty where they are not known.

    Raises:
        CompileError: The linker wrote a library for another architecture.
    """
    found = engine_file.architecture_of(library.content)
    if found != target.architecture:
        raise CompileError(
            f"the linker must write a library for {target.architecture}, {target.linker()} wrote one for {found}."
        )
    return engine_file.packed(
        library.content,
        {
            "architecture": target.architecture,
            "isa": list(target.isa),
            "series": SERIES,
            "glibc": engine_file.glibc_of(library.content),
            "target": target.llvm,
            "inputs": [_tensor(spec) for spec in inputs],
            "outputs": [_tensor(spec) for spec in outputs],
            "weights": [
                {"shape": list(shape), "dtype": dtype, "scale": scale} for shape, dtype, scale in library.weights
            ],
            "calls": [
                [function, None if kernel is None else kernel.key]
                for function, kernel in zip(library.functions, made, strict=True)
            ],
            "graph": kernels.as_json(graph),
            **({"searched": list(library.searched)} if library.searched else {}),
        },
    )


def _tensor(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "shape": list(spec.shape), "dtype": spec.dtype}
