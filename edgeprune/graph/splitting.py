"""Find the parts of a model that can be traced where the whole cannot."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from edgeprune.errors import PlanError
from edgeprune.nesting import read_nesting
from edgeprune.parts import Leaf, Part, tensors_of

log = logging.getLogger("edgeprune.graph")

Exports = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], bool]
"""Whether a module can be exported with such arguments."""
_Key = tuple[int, int]
"""Identity of a tensor and how often it was written to: what is changed in place is another value."""


@dataclass
class _Call:
    """What a submodule was called with, and the tensors that it gave back."""

    path: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: list[_Key] = field(default_factory=list)
    outputs: list[torch.Tensor] = field(default_factory=list)
    results: list[_Key] = field(default_factory=list)


def find_parts(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], exports: Exports
) -> tuple[tuple[Part, ...], tuple[torch.Tensor, ...]]:
    """The largest submodules with parameters that can be exported with the arguments that they get in a run of the model.

    A submodule is no part if anything outside of it uses its weights or a tensor that is made inside of it, other than its
    results; then its own submodules are tried. The model is run once per level of its module tree that has to be opened.

    Args:
        model: In eval form; running it must not change what anybody else sees.
        args: Positional arguments of its forward.
        kwargs: Keyword arguments.
        exports: Whether a submodule can be exported.

    Returns:
        The parts in the order in which they run, and their inputs. Where one part takes the very tensor that another
        gave back, that is no input. No parts where nothing can be exported.

    Raises:
        Exception: Whatever the model raises when it is run.
    """
    chosen = _exportable(model, _children(model, ""), args, kwargs, exports)
    while chosen:
        calls, leaking = _calls(model, chosen, args, kwargs)
        leaking |= _tied_outside(model, chosen)
        if not leaking:
            return _connected(calls)
        below = [child for path in sorted(leaking) for child in _children(model, path)]
        chosen = [path for path in chosen if path not in leaking]
        chosen += _exportable(model, below, args, kwargs, exports)
    return (), ()


def _exportable(
    model: nn.Module, level: list[str], args: tuple[Any, ...], kwargs: dict[str, Any], exports: Exports
) -> list[str]:
    """Of some submodules those that can be exported, and below the others theirs."""
    found = []
    while level:
        calls: dict[str, list[_Call]] = {}
        for call in _calls(model, level, args, kwargs)[0]:
            calls.setdefault(call.path, []).append(call)
        opened = []
        for path in level:
            own = calls.get(path, [])
            module = model.get_submodule(path)
            # A list of modules is never called; what these inputs do not reach is left alone.
            if own and all(_is_plain(call) and exports(module, call.args, call.kwargs) for call in _distinct(own)):
                found.append(path)
            else:
                opened.append(path)
        level = [child for path in opened for child in _children(model, path)]
    return found


def _children(model: nn.Module, path: str) -> list[str]:
    """Paths of the direct submodules that have parameters."""
    return [
        f"{path}.{name}" if path else name
        for name, child in model.get_submodule(path).named_children()
        if any(True for _ in child.parameters())
    ]


def _tied_outside(model: nn.Module, chosen: Sequence[str]) -> set[str]:
    """Parts with a weight that also has a name outside of all parts, where nobody would expect it cut."""

    def part_of(name: str) -> str | None:
        return next((path for path in chosen if name.startswith(f"{path}.")), None)

    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    outside = {id(tensor) for name, tensor in named if part_of(name) is None}
    return {path for name, tensor in named if id(tensor) in outside and (path := part_of(name)) is not None}


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes which parts' insides are used while none of them runs."""

    def __init__(self, model: nn.Module, paths: Iterable[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.running: str | None = None
        self.leaking: set[str] = set()
        self._inside = WeakTensorKeyDictionary()
        for path in paths:
            module = model.get_submodule(path)
            for tensor in (*module.parameters(), *module.buffers()):
                self._inside[tensor] = path

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = tensors_of((args, kwargs or {}))
        if self.running is None:
            self.leaking.update(path for tensor in given if (path := self._inside.get(tensor)) is not None)  # type: ignore[no-untyped-call]
        found = func(*args, **(kwargs or {}))
        if self.running is not None:
            for tensor in tensors_of(found):
                if not any(tensor is other for other in given):
                    self._inside[tensor] = self.running
        return found

    def release(self, tensors: Iterable[torch.Tensor]) -> None:
        """These are results, which anybody may use."""
        for tensor in tensors:
            self._inside.pop(tensor, None)  # type: ignore[no-untyped-call]


def _calls(
    model: nn.Module, paths: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[_Call], set[str]]:
    """Calls of some submodules in one run, in order, and those whose inside is used from outside.

    Calls from within another of them are not among them.
    """
    calls: list[_Call] = []
    inside: list[_Call | None] = []
    watch = _Watch(model, paths)

    def enter(path: str) -> Any:
        def hook(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            call = _Call(path, given, dict(named), _keys((given, named))) if not inside else None
            inside.append(call)
            if call is not None:
                calls.append(call)
                watch.running = path

        return hook

    def leave(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any], found: Any) -> None:
        call = inside.pop()
        if call is not None:
            call.outputs, call.results = tensors_of(found), _keys(found)
            watch.running = None
            watch.release(call.outputs)

    own_args, own_kwargs = pytree.tree_map_only(torch.Tensor, torch.clone, (args, kwargs))
    with ExitStack() as hooks, torch.no_grad(), watch:
        for path in paths:
            module = model.get_submodule(path)
            hooks.callback(module.register_forward_pre_hook(enter(path), with_kwargs=True, prepend=True).remove)
            hooks.callback(module.register_forward_hook(leave, with_kwargs=True, always_call=True).remove)
        model(*own_args, **own_kwargs)
    return calls, watch.leaking


def _keys(tree: Any) -> list[_Key]:
    return [(id(tensor), -1 if tensor.is_inference() else tensor._version) for tensor in tensors_of(tree)]


def _is_plain(call: _Call) -> bool:
    """Whether the arguments are tensors and plain values, nested in a way that can be written down."""
    leaves, nesting = pytree.tree_flatten((call.args, call.kwargs))
    plain = (torch.Tensor, bool, int, float, str, type(None))
    if not all(isinstance(leaf, plain) for leaf in leaves) or not tensors_of(leaves):
        return False
    try:
        return read_nesting(pytree.treespec_dumps(nesting)) == nesting
    except (PlanError, NotImplementedError, TypeError, ValueError) as error:
        log.debug("the arguments of %s cannot be written down: %s", call.path, error)
        return False


def _distinct(calls: list[_Call]) -> list[_Call]:
    """One call of each form, so that a head that runs on five levels of features is not tried five times."""
    forms = {
        str(pytree.tree_map_only(torch.Tensor, lambda t: (t.ndim, t.dtype), (call.args, call.kwargs))): call
        for call in reversed(calls)
    }
    return list(forms.values())


def _connected(calls: list[_Call]) -> tuple[tuple[Part, ...], tuple[torch.Tensor, ...]]:
    inputs: list[torch.Tensor] = []
    source: dict[_Key, Leaf] = {}
    parts = []
    for index, call in enumerate(calls):
        leaves, nesting = pytree.tree_flatten((call.args, call.kwargs))
        keys = iter(call.inputs)
        found: list[Leaf] = []
        for leaf in leaves:
            if not isinstance(leaf, torch.Tensor):
                found.append(("value", leaf))
                continue
            key = next(keys)
            if key not in source:
                source[key] = ("input", len(inputs))
                inputs.append(leaf)
            found.append(source[key])
        parts.append(Part(call.path, pytree.treespec_dumps(nesting), tuple(found)))
        source |= {key: ("part", (index, place)) for place, key in enumerate(call.results)}
    return tuple(parts), tuple(tensor.detach() for tensor in inputs)
