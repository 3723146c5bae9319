"""From an ONNX model to TVM's fused functions, each joined to the ONNX nodes that it computes.

TVM decides what is fused; nothing here predicts it. The importer leaves a mark on what each ONNX node became, and after
`FuseOps` every function is matched, call by call, with the unfused program: by the operation it calls and the values it
reads. Names would not do, because TVM shares one function between equal blocks.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import onnx

from edgeprune.backends.tvm.target import TvmTarget
from edgeprune.errors import CompileError

if TYPE_CHECKING:
    import torch


def fused(model: onnx.ModelProto, target: TvmTarget) -> tuple[Any, list[tuple[str, ...]]]:
    """The fused program of a model, and which nodes each of its calls computes, in the order in which they run.

    Args:
        model: Weights must be initializers; all shapes fixed.
        target: What it is compiled for.

    Returns:
        A relax module after `FuseOps`, and for each call of its ``main`` the names of its ONNX nodes.

    Raises:
        CompileError: TVM cannot import the model; names the operation.
    """
    module, marks = _imported(model)
    plain, joined = _joined(module, target)
    owners = _owners(plain["main"], marks)
    return joined, _calls(joined, plain["main"], owners)


def fused_program(program: torch.export.ExportedProgram, target: TvmTarget) -> Any:
    """The fused program of what torch has exported, without ONNX between: which layer a call computes is not told.

    Args:
        program: All shapes fixed; in eval form.
        target: What it is compiled for.

    Returns:
        A relax module after `FuseOps`.

    Raises:
        CompileError: TVM cannot import the program; names the operation.
    """
    from tvm.relax.frontend.torch import from_exported_program

    with _quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            module = from_exported_program(program, unwrap_unit_return_tuple=True)
        # As for ONNX: whatever its asserts and torch's decompositions raise.
        except Exception as error:
            reason = " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
            raise CompileError(
                f"TVM must be able to import torch's program, it says: {reason}.", hint="--frontend onnx"
            ) from error
    return _joined(module, target)[1]


def _joined(module: Any, target: TvmTarget) -> tuple[Any, Any]:
    """A relax module before and after `FuseOps`."""
    import tvm
    from tvm import relax

    with tvm.target.Target(target.llvm), _quiet():
        plain = tvm.transform.Sequential(
            [
                relax.transform.DecomposeOpsForInference(),
                relax.transform.LegalizeOps(),
                relax.transform.AnnotateTIROpPattern(),
                relax.transform.FoldConstant(),
                relax.transform.DeadCodeElimination(),
            ]
        )(module)
        return plain, relax.transform.FuseOps()(plain)


def _imported(model: onnx.ModelProto) -> tuple[Any, dict[str, str]]:
    """A relax module, and name of a variable to name of the ONNX node whose result it is."""
    from tvm import relax
    from tvm.relax.frontend.onnx import onnx_frontend

    nodes = list(model.graph.node)
    marks: dict[str, str] = {}

    class Marking(onnx_frontend.ONNXGraphImporter):  # type: ignore[misc]
        """Gives what each node became a variable of its own, so that none is computed twice, and remembers it."""

        position = 0

        def _convert_operator(self, op_name: str, inputs: Any, attrs: Any, opset: int) -> Any:
            node = nodes[self.position]
            try:
                result = super()._convert_operator(op_name, inputs, attrs, opset)
            # The converters raise whatever their asserts and tensor libraries raise; each means the same to the user.
            except Exception as error:
                reason = " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
                raise CompileError(
                    f"TVM must be able to import {node.op_type} {node.name!r}, it says: {reason}.",
                    hint="--backend onnxruntime",
                ) from error
            if isinstance(result, relax.Call):
                result = self.bb.emit(result, name_hint=f"node{self.position}")
            fields = result.fields if isinstance(result, relax.Tuple) else [result]
            marks.update({field.name: node.name for field in fields if isinstance(field, relax.Var)})
            self.position += 1
            return result

    opset = max(int(item.version) for item in model.opset_import if item.domain in ("", "ai.onnx"))
    importer = Marking({}, "float32", False)
    with _quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importer.from_onnx(model.graph, opset), marks
        except CompileError:
            raise
        # The importer's own checks share no base class but Exception (onnx.checker's, tvm.error's, ValueError).
        except Exception as error:
            reason = " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
            raise CompileError(
                f"TVM must be able to import the exported model, it says: {reason}.", hint="--backend onnxruntime"
            ) from error


def _bindings(function: Any) -> Iterator[Any]:
    for block in function.body.blocks:
        yield from block.bindings


def _owners(main: Any, marks: dict[str, str]) -> dict[str, str]:
    """Variable of the unfused program to the ONNX node that it belongs to: the next one that is marked, else the last."""
    owners: dict[str, str] = {}
    waiting: list[str] = []
    last = ""
    for binding in _bindings(main):
        name = binding.var.name
        waiting.append(name)
        if name in marks:
            last = marks[name]
            owners |= dict.fromkeys(waiting, last)
            waiting = []
    return owners | dict.fromkeys(waiting, last)


def _calls(module: Any, plain: Any, owners: dict[str, str]) -> list[tuple[str, ...]]:
    """The ONNX nodes of each call of the fused ``main``, matched with the calls of the unfused one."""
    waiting: dict[tuple[Any, ...], list[str]] = {}
    alias: dict[str, Any] = {}
    for binding in _bindings(plain):
        key = _key(binding.value, alias)
        name = binding.var.name
        if key is None:
            alias[name] = _value(binding.value, alias)
        else:
            waiting.setdefault(key, []).append(name)
    order = {owner: index for index, owner in enumerate(dict.fromkeys(owners.values()))}
    found: list[tuple[str, ...]] = []
    known: dict[str, Any] = {}
    for binding in _bindings(module["main"]):
        value, name = binding.value, binding.var.name
        group = _group(module, value)
        if group is None:
            key = _key(value, known)
            if key is None:
                known[name] = _value(value, known)
                continue
            members = [_taken(waiting, key)]
            known[name] = members[0]
        else:
            inner = {
                parameter.name: _value(argument, known)
                for parameter, argument in zip(group.params, value.args, strict=True)
            }
            members = []
            for part in _bindings(group):
                key = _key(part.value, inner)
                if key is None:
                    inner[part.var.name] = _value(part.value, inner)
                else:
                    members.append(_taken(waiting, key))
                    inner[part.var.name] = members[-1]
            result = group.body.body
            known[name] = _value(result, inner)
        found.append(tuple(sorted({owners[member] for member in members}, key=order.__getitem__)))
    return found


def _group(module: Any, value: Any) -> Any:
    """The function that a binding calls, where `FuseOps` has made it."""
    import tvm
    from tvm import relax

    if isinstance(value, relax.Call) and isinstance(value.op, tvm.ir.GlobalVar):
        function = module[value.op]
        return function if isinstance(function, relax.Function) else None
    return None


def _key(value: Any, known: dict[str, Any]) -> tuple[Any, ...] | None:
    """Operation and operands of a call; None of what only names a value."""
    from tvm import relax

    if not isinstance(value, relax.Call):
        return None
    operands = value.args[1] if getattr(value.op, "name", "") == "relax.call_tir" else relax.Tuple(value.args)
    callee = value.args[0].name_hint if getattr(value.op, "name", "") == "relax.call_tir" else str(value.op)
    return (callee, _value(operands, known))


def _value(value: Any, known: dict[str, Any]) -> Any:
    """What identifies a value: the variable of the unfused program, or the memory of a constant."""
    from tvm import ir, relax

    if isinstance(value, relax.Var):
        return known.get(value.name, value.name)
    if isinstance(value, ir.GenericConst):
        return ("constant", value.value.data_ptr())
    if isinstance(value, relax.Tuple):
        return tuple(_value(field, known) for field in value.fields)
    if isinstance(value, relax.TupleGetItem):
        source = _value(value.tuple_value, known)
        return source[value.index] if isinstance(source, tuple) else (source, value.index)
    return str(value)


def _taken(waiting: dict[tuple[Any, ...], list[str]], key: tuple[Any, ...]) -> str:
    if not waiting.get(key):
        raise CompileError(
            f"every fused call of TVM must be one of the unfused program's, found {key[0]} which is none.",
            hint="pip install 'edgeprune[tvm]', whose TVM is the one that this was tried with",
        )
    return waiting[key].pop(0)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """TVM prints to standard output what it also raises; events and results must not be mixed with that."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
