"""From TVM's fused program to a shared library."""

from __future__ import annotations

import contextlib
import io
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeprune.backends.tvm import scheduling
from edgeprune.backends.tvm.target import TvmTarget
from edgeprune.backends.tvm.tuned_functions import tuned_functions
from edgeprune.backends.tvm.tuning import Tuning
from edgeprune.errors import CompileError

_LARGE = 64
"""Constants of more elements than this are weights."""
_LINK_TIMEOUT_S = 300.0

MAIN = "main"
EMPTY = "empty"
"""A function of every engine that returns its argument: what a call costs by itself."""


@dataclass(frozen=True)
class Library:
    """Compiled code.

    Attributes:
        content: The shared library.
        functions: Name of the function behind each call of the program, in order.
        weights: Shape, NumPy dtype and scale of the weights that became inputs, behind the network's own.
        searched: Names of the functions whose schedule was found by search.
    """

    content: bytes
    functions: tuple[str, ...]
    weights: tuple[tuple[tuple[int, ...], str, float], ...]
    searched: tuple[str, ...] = ()


def built(
    module: Any,
    calls: int | None,
    target: TvmTarget,
    *,
    weights_inside: bool,
    searched: bool = False,
    tuning: Tuning | None = None,
) -> Library:
    """Compile and link a fused program.

    Args:
        module: From `importing.fused`.
        calls: Number of its calls, where it is known.
        target: What it is compiled for.
        weights_inside: False makes weights inputs: an engine for timing stays small, whatever it multiplies by. The functions
            take weights as arguments either way, so their code is the same.
        searched: Take the schedules that tuning has found, where there are some.
        tuning: Tune first.

    Raises:
        CompileError: TVM or the linker fails, or the tuning does.
    """
    import tvm
    from tvm import relax

    linker = target.linker()
    with tvm.target.Target(target.llvm), contextlib.redirect_stdout(io.StringIO()):
        module = relax.transform.FuseTIR()(module)
        functions = _functions(module)
        if calls is not None and len(functions) != calls:
            raise CompileError(f"TVM must keep the {calls} calls of the fused program, found {len(functions)}.")
    # Outside: a tuning speaks to the user, whose terminal may be standard output.
    known = tuned_functions(module, functions, target, tuning) if searched or tuning is not None else None
    with tvm.target.Target(target.llvm), contextlib.redirect_stdout(io.StringIO()):
        module, found = scheduling.scheduled(module, target.isa, known)
        weights: tuple[tuple[tuple[int, ...], str, float], ...] = ()
        if not weights_inside:
            module, weights = _lifted(module)
        module[EMPTY] = _empty()
        pipeline = tvm.transform.Sequential(
            [
                relax.transform.RewriteDataflowReshape(),
                relax.transform.ToNonDataflow(),
                relax.transform.RemovePurityChecking(),
                relax.transform.CallTIRRewrite(),
                relax.transform.StaticPlanBlockMemory(),
                relax.transform.LowerAllocTensor(),
                relax.transform.KillAfterLastUse(),
                relax.transform.LowerRuntimeBuiltin(),
                relax.transform.ComputePrimValue(),
                relax.transform.VMShapeLower(),
                relax.transform.AttachGlobalSymbol(),
            ]
        )
        try:
            executable = tvm.compile(module, target=tvm.target.Target(target.llvm), relax_pipeline=pipeline)
        # Passes raise tvm.error classes, ValueError and TypeError alike; each means that this program cannot be compiled.
        except Exception as error:
            raise CompileError(
                f"TVM must be able to compile the model for {target.triple}, it says: {_short(error)}.",
                hint="--backend onnxruntime",
            ) from error
        return Library(linked(executable, linker), functions, weights, tuple(sorted(found)))


def linked(executable: Any, linker: str) -> bytes:
    """The shared library of what TVM has compiled.

    Args:
        executable: From ``tvm.compile``.
        linker: C compiler for its target.

    Raises:
        CompileError: The linker fails.
    """
    with tempfile.TemporaryDirectory(prefix="edgeprune-") as folder:
        library = Path(folder) / "engine.so"
        executable.export_library(
            str(library),
            fcompile=lambda path, objects, **_: _link(linker, path, objects),
            workspace_dir=folder,
        )
        return library.read_bytes()


def _link(linker: str, path: str, objects: list[str]) -> None:
    """Objects to a shared library that is the same for the same objects: no build id, no names of temporary files."""
    command = [linker, "-shared", "-fPIC", "-s", "-Wl,--build-id=none", "-Wl,--as-needed", "-o", path, *objects, "-lm"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_LINK_TIMEOUT_S, check=False, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CompileError(f"{linker} must link TVM's code within {_LINK_TIMEOUT_S:.0f} s, found: {error}.") from error
    if done.returncode != 0:
        said = " ".join(done.stderr.split())[-300:] or f"exit code {done.returncode}"
        # Debian's cross compiler comes without the C library that it links with, unless recommended packages are installed.
        bare = "aarch64" in linker and "crti.o" in done.stderr
        hint = "apt-get install libc6-dev-arm64-cross" if bare else None
        raise CompileError(f"{linker} must link TVM's code, it says: {said}.", hint=hint)


def _functions(module: Any) -> tuple[str, ...]:
    """Name of the function behind each call of ``main``."""
    from tvm import relax

    return tuple(
        binding.value.args[0].name_hint if getattr(binding.value.op, "name", "") == "relax.call_tir" else ""
        for block in module[MAIN].body.blocks
        for binding in block.bindings
        if isinstance(binding.value, relax.Call)
    )


def _lifted(module: Any) -> tuple[Any, tuple[tuple[tuple[int, ...], str, float], ...]]:
    """The module with its large constants as further parameters of ``main``."""
    import tvm
    from tvm import relax

    class Lift(relax.expr_functor.PyExprMutator):  # type: ignore[misc]
        """Replaces each use of a large constant by a parameter of its own."""

        def __init__(self) -> None:
            super().__init__()
            self.parameters: list[Any] = []
            self.found: list[tuple[tuple[int, ...], str, float]] = []

        def visit_generic_const_(self, op: Any) -> Any:
            shape = tuple(int(size) for size in op.value.shape)
            size = 1
            for length in shape:
                size *= length
            if size <= _LARGE:
                return op
            variable = relax.Var(f"weight{len(self.parameters)}", relax.TensorType(shape, str(op.value.dtype)))
            # Bounds that keep activations near one from layer to layer (He et al. 2015, "Delving deep into rectifiers").
            fan_in = (size // shape[0]) if len(shape) > 2 else shape[0] if len(shape) == 2 else 6
            self.parameters.append(variable)
            self.found.append((shape, str(op.value.dtype), (6.0 / fan_in) ** 0.5))
            return variable

    lift = relax.expr_functor.mutator(Lift)()
    main = module[MAIN]
    body = lift.visit_expr(main.body)
    changed = relax.Function([*main.params, *lift.parameters], body, main.ret_ty, main.is_pure, main.attrs)
    result = tvm.IRModule({**dict(module.functions.items()), module.get_global_var(MAIN): changed})
    return result, tuple(lift.found)


def _empty() -> Any:
    from tvm import relax

    builder = relax.BlockBuilder()
    value = relax.Var("x", relax.TensorType((1,), "float32"))
    with builder.function(EMPTY, [value]):
        builder.emit_func_output(value)
    return builder.get()[EMPTY].with_attr("global_symbol", EMPTY)


def _short(error: BaseException) -> str:
    return (" ".join(str(error).split())[-200:] or type(error).__name__).rstrip(".")
