"""Capture a model with ``torch.export``: one ATen program, its inputs, and where each operation comes from."""

from __future__ import annotations

import inspect
import io
import logging
import re
import sys
import traceback
from collections.abc import Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from edgeprune.copying import copied
from edgeprune.errors import InputError, TraceError
from edgeprune.graph.decomposing import take_apart
from edgeprune.graph.inlining import put_in_line
from edgeprune.graph.running import require_runs
from edgeprune.graph.splitting import find_parts
from edgeprune.nesting import make_known
from edgeprune.parts import Part, core_of

log = logging.getLogger("edgeprune.graph")

_TORCH = str(Path(torch.__file__).parent)
_PACKAGE = Path(__file__).parents[1]
_OWN = tuple(str(_PACKAGE / part) for part in ("graph", "parts.py", "surgery"))
"""Where lines are ours and not the user's."""
_UNKNOWN_TYPE = "which is not a known type"
"""Part of what torch.export says of an output that is neither a tensor nor a way to nest some."""
_EXPORT_ERRORS = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError, ArithmeticError)


@dataclass(frozen=True)
class Capture:
    """A captured model.

    Attributes:
        program: ATen program in eval form, not decomposed.
        inputs: Example inputs as flat positional tensors at the deployment batch.
        input_names: Their names, in the program.
        batch: Deployment batch.
        dynamic_batch: Whether the program works for every batch.
        note: Why the batch is fixed, or ``""``.
        parts: What the program consists of where the model as a whole cannot be exported; its inputs are those of the parts.
        failure: Why the model as a whole cannot be exported, or None.
    """

    program: ExportedProgram
    inputs: tuple[torch.Tensor, ...]
    input_names: tuple[str, ...]
    batch: int
    dynamic_batch: bool
    note: str = ""
    parts: tuple[Part, ...] = ()
    failure: TraceError | None = None


def call_arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of the model's forward.

    Args:
        example_inputs: A tensor (one argument), a tuple or list (positional), or a dict (by name).

    Raises:
        InputError: If it is none of these, or holds no tensor.
    """
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(example_inputs, torch.Tensor):
        args = (example_inputs,)
    elif isinstance(example_inputs, Mapping):
        kwargs = dict(example_inputs)
    elif isinstance(example_inputs, tuple | list):
        args = tuple(example_inputs)
    else:
        raise InputError(
            f"example inputs must be a tensor, a tuple or a dict, found {type(example_inputs).__name__}.",
            hint="example_inputs=torch.randn(1, 3, 224, 224)",
        )
    make_known((args, kwargs))
    if not any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves((args, kwargs))):
        raise InputError("example inputs must hold at least one tensor, found none.")
    return args, kwargs


def eval_copy(model: nn.Module) -> nn.Module:
    """A copy of the module tree in eval form that shares parameters and buffers with the original.

    Raises:
        TraceError: If the model cannot be copied.
    """
    shared: dict[int, Any] = {id(p): p for p in model.parameters()}
    shared.update((id(b), b) for b in model.buffers())
    return copied(model, shared, TraceError).eval()


def capture(model: nn.Module, example_inputs: Any) -> Capture:
    """Export a model in eval form; the model itself is not touched.

    The batch is the first axis of every tensor input. It is exported as a dynamic dimension; where that fails the
    program is captured for the deployment batch alone, and `Capture.note` says why. A model that cannot be exported as a
    whole (its post-processing depends on values, say) is captured in parts, see `edgeprune.parts`.

    Raises:
        InputError: If the model is no module, or does not run on the example inputs.
        TraceError: If the model cannot be exported, nor any part of it; the message names the user's line.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"the model must be a torch.nn.Module, found {type(model).__name__}.")
    _require_plain(model)
    args, kwargs = call_arguments(example_inputs)
    _require_arguments_of(model, args, kwargs)
    kwargs = _as_in_forward(model, kwargs)
    try:
        return _whole(eval_copy(model), args, kwargs)
    except TraceError as failure:
        try:
            with torch.random.fork_rng(devices=[]):
                parts, inputs = find_parts(_runnable_copy(model), args, kwargs, _exports)
        # Whatever the user's forward raises; where it does not run at all, that is what has to be said.
        except Exception as error:
            log.debug("the parts of the model do not run: %s", error)
            with torch.random.fork_rng(devices=[]):
                require_runs(_runnable_copy(model), args, kwargs)
            raise failure from error
        if not parts:
            raise
        try:
            captured = _whole(core_of(eval_copy(model), parts), inputs, {})
        except TraceError as error:
            log.debug("the parts cannot be exported together: %s", error.message)
            raise failure from error
        return replace(captured, parts=parts, failure=failure)


def _require_plain(model: nn.Module) -> None:
    """Refuse what TorchScript or ``torch.compile`` made of a model: its modules are what can be traced and cut."""
    if isinstance(model, torch.jit.ScriptModule):
        raise InputError(
            f"the model must be a Python module, found one of TorchScript ({type(model).__name__}).",
            hint="the module that it was made of",
        )
    if isinstance(getattr(model, "_orig_mod", None), nn.Module):
        raise InputError(
            "the model must be the module itself, found what torch.compile made of it.", hint="model._orig_mod"
        )


def _require_arguments_of(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse example inputs that forward has no place for, or too few of them."""
    if model._forward_pre_hooks:
        return  # they may change the arguments
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        named = list(signature.parameters)
        takes = ", ".join(named if len(named) <= 8 else [*named[:8], "..."])
        found = [f"{len(args)} by position"] * bool(args) + [repr(name) for name in kwargs]
        raise InputError(
            f"example inputs must be arguments of forward({takes}), found {', '.join(found)} ({error}).",
            hint="a tuple of positional arguments, or a dict by name",
        ) from error


def _as_in_forward(model: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Named inputs in the order of forward, so that they are the same ones when a program is called by position."""
    try:
        order = list(inspect.signature(model.forward).parameters)
    except (TypeError, ValueError):
        return kwargs
    return {
        name: kwargs[name]
        for name in sorted(kwargs, key=lambda name: order.index(name) if name in order else len(order))
    }


def _runnable_copy(model: nn.Module) -> nn.Module:
    """A copy in eval form with buffers of its own: a forward may write to them, and the model must not see that."""
    return copied(model, {id(parameter): parameter for parameter in model.parameters()}, TraceError).eval()


def _exports(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    try:
        _export(module, args, kwargs, None)
    except Exception as error:  # noqa: BLE001 (whatever the user's forward raises: this part cannot be exported, others may)
        log.debug("a part cannot be exported: %s", error)
        return False
    return True


def _whole(twin: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Capture:
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    sizes = {tensor.shape[0] for tensor in tensors if tensor.ndim > 0}
    note = ""
    if len(sizes) != 1:
        note = f"the inputs have different first axes {sorted(sizes)}, so there is no common batch"
    else:
        (batch,) = sizes
        dynamic = Dim("batch", max=1 << 20)
        wide_args, wide_kwargs = pytree.tree_map_only(
            torch.Tensor, lambda t: torch.cat([t, t]) if batch < 2 and t.ndim else t, (args, kwargs)
        )
        shapes = pytree.tree_map(
            lambda leaf: {0: dynamic} if isinstance(leaf, torch.Tensor) and leaf.ndim else None,
            (tuple(wide_args), wide_kwargs),
        )
        try:
            program = _export(twin, tuple(wide_args), wide_kwargs, _by_name(twin, shapes))
        except _EXPORT_ERRORS as error:
            note = f"the program does not work for every batch ({_first_line(error)})"
        else:
            return _captured(program, tensors, batch, True, "")
    try:
        program = _export(twin, args, kwargs, None)
    except _EXPORT_ERRORS as error:
        where = user_line(error)
        place = f" at {where}" if where else ""
        raise TraceError(
            f"the model must be exportable with torch.export, found{place}: {_first_line(error)}",
            hint=_hint(error),
        ) from error
    return _captured(program, tensors, min(sizes, default=1), False, note)


def _export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any) -> ExportedProgram:
    hook = model.register_forward_hook(lambda module, given, found: make_known(found))
    try:
        with torch.no_grad(), redirect_stderr(_WithoutGraphs(sys.stderr)):
            program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
    finally:
        hook.remove()
    put_in_line(program)
    take_apart(program)
    return program


class _WithoutGraphs(io.TextIOBase):
    """Standard error without the graphs of what could not be exported, which torch prints; its error says what matters."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._left_out = False

    def write(self, text: str, /) -> int:
        """Pass on everything else; the end of a line that was left out goes with it."""
        self._left_out = "def forward(self, arg0_1" in text or (self._left_out and text == "\n")
        return len(text) if self._left_out else self._stream.write(text)

    def flush(self) -> None:
        """As of any stream."""
        self._stream.flush()


def _by_name(model: nn.Module, shapes: tuple[tuple[Any, ...], dict[str, Any]]) -> dict[str, Any]:
    """Dynamic shapes as ``torch.export`` wants them: by the names of forward's parameters, ``*args`` as one tuple."""
    positional, named = shapes
    return dict(inspect.signature(model.forward).bind(*positional, **named).arguments)


def _captured(program: ExportedProgram, tensors: list[torch.Tensor], batch: int, dynamic: bool, note: str) -> Capture:
    names = []
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    for name in program.graph_signature.user_inputs:
        if isinstance(name, str) and isinstance(values.get(name), torch.Tensor):
            names.append(name)
    inputs = tuple(tensor.detach() for tensor in tensors)
    return Capture(program, inputs, tuple(names), batch, dynamic, note)


def concrete(value: Any, batch: int) -> Any:
    """Replace symbolic sizes by their values at one batch; nested lists and tuples are followed."""
    if isinstance(value, torch.SymInt):
        return _evaluated(value.node.expr, batch)
    if isinstance(value, list | tuple):
        return type(value)(concrete(item, batch) for item in value)
    return value


@lru_cache(maxsize=1 << 12)
def _evaluated(expression: Any, batch: int) -> int:
    """A program has few different sizes, and to evaluate one takes long."""
    return int(expression.xreplace(dict.fromkeys(expression.free_symbols, batch)))


def shape_of(value: torch.Tensor, batch: int) -> tuple[int, ...]:
    """Shape of a (fake) tensor at one batch."""
    return tuple(int(concrete(size, batch)) for size in value.shape)


def source_of(node: torch.fx.Node) -> str:
    """``file:line`` of the user's code that a node comes from, or ``""``."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or _trace_inside(node))
    for path, line in reversed(frames):
        if not path.startswith((_TORCH, "torch/", *_OWN)):
            return f"{path}:{line}"
    return ""


def _trace_inside(node: torch.fx.Node) -> str:
    """Where the first operation of a region comes from, which is a node without a line of its own (autocast, a branch)."""
    for holder in node.all_input_nodes:
        region = getattr(node.graph.owning_module, str(holder.target), None) if holder.op == "get_attr" else None
        if isinstance(region, torch.fx.GraphModule):
            return next(
                (str(inner.meta["stack_trace"]) for inner in region.graph.nodes if "stack_trace" in inner.meta), ""
            )
    return ""


def module_path(node: torch.fx.Node) -> str:
    """Path of the innermost module that a node belongs to, ``""`` for the model itself."""
    for path, _ in reversed(list((node.meta.get("nn_module_stack") or {}).values())):
        if not path.startswith("_empty_nn_module_stack"):
            return str(path)
    return ""


def user_line(error: BaseException) -> str:
    """``file:line`` of the innermost frame that is neither torch's nor ours, or ``""``."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith((_TORCH, *_OWN, "<")) and "/concurrent/" not in frame.filename:
            return f"{frame.filename}:{frame.lineno}"
    return ""


def _hint(error: BaseException) -> str:
    if _UNKNOWN_TYPE in str(error):
        return "return tensors in tuples, lists, dicts or dataclasses; a cache of transformers is left out by use_cache=False"
    return "run the model once on the same inputs; avoid control flow that depends on tensor values"


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and lines[0].startswith("Constraints violated"):
        # The first says how to see more, the next one why.
        lines = [line.removeprefix("- ").partition(". ")[0] for line in lines[1:]] or lines
    elif lines and _UNKNOWN_TYPE in lines[0]:
        lines = [lines[0].partition(_UNKNOWN_TYPE)[0] + _UNKNOWN_TYPE]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
