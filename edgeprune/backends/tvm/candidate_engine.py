"""A candidate of tuning as an engine file of its own, for boards: a library with the one function."""

from __future__ import annotations

from typing import Any

from edgeprune.backends.tvm import engine_file
from edgeprune.backends.tvm.building import linked

FUNCTION = "main"


def engine_of(module: Any, target: Any, linker: str) -> bytes:
    """The engine file of a scheduled function, as a board's runner times it.

    Args:
        module: Of `workloads.normalized`, scheduled.
        target: ``tvm.target.Target`` of the board.
        linker: C compiler for that target.

    Raises:
        CompileError: The linker refuses it.
        Exception: TVM cannot build it, in any of its classes.
    """
    import tvm
    from tvm.s_tir.meta_schedule.arg_info import ArgInfo

    library = linked(tvm.compile(module, target=target), linker)
    told = [argument.as_json() for argument in ArgInfo.from_prim_func(module[FUNCTION])]
    arguments = [{"shape": [int(size) for size in shape], "dtype": str(dtype)} for _, dtype, shape in told]
    described = {"architecture": engine_file.architecture_of(library), "function": FUNCTION, "arguments": arguments}
    return engine_file.packed(library, described)
