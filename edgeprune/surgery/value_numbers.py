"""Proof that two modules compute the same from the same tensors, without computing anything.

Both are run on tensors without values (PyTorch's meta device). Every operation that reaches PyTorch's dispatcher is given a
*value number*: a name for its operator, its arguments' numbers and its constants (global value numbering: Alpern, Wegman and
Zadeck, "Detecting equality of variables in programs", POPL 1988). Equal numbers mean equal values, whatever the weights are,
for what goes through the dispatcher. Not seen are native code that reads memory itself, a forward that takes another branch on
tensors without values, and one that seeds its draws twice with the same seed. The reverse does not hold: two modules may
compute the same in different ways, and then other means must tell.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

_META = torch.device("meta")
_BATCH_NORM = torch.ops.aten.native_batch_norm.default
_STATISTICS, _TRAINING = (3, 4), 5
"""Positions among its arguments."""
_TO_COPY = torch.ops.aten._to_copy.default


class UnseenValueError(RuntimeError):
    """A value came from somewhere that was not seen."""


def _number(table: dict[Hashable, int], key: Hashable) -> int:
    """The number of a key, a new one where it has none."""
    return table.setdefault(key, len(table))


class WithoutValues:
    """Copies of modules whose parameters and buffers have shapes and no values; what modules share, their copies share.

    The modules themselves are not touched, not even by a forward that puts things aside.
    """

    def __init__(self) -> None:
        self._table: dict[Hashable, int] = {}
        self._given: dict[int, int] = {}
        self._alive: list[torch.Tensor] = []
        self._known: dict[int, Any] = {}
        self._bases: dict[int, torch.Tensor] = {}

    def copy(self, module: nn.Module) -> nn.Module:
        """Another copy, with the tensors of the earlier ones; plain tensor attributes keep their values.

        Raises:
            RuntimeError: If a parameter or buffer has no memory of the usual kind, as sparse ones.
        """
        for tensor in (*module.parameters(), *module.buffers()):
            if id(tensor) not in self._known:
                self._known[id(tensor)] = self._without(tensor)
        return copy.deepcopy(module, dict(self._known))

    def _without(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same view of the same memory, as far as two tensors share some."""
        if tensor.is_conj() or tensor.is_neg():
            raise UnseenValueError("a view that conjugates or negates its memory cannot be made without values")
        memory = tensor.untyped_storage()
        base = self._bases.get(memory._cdata)
        if base is None:
            base = self._bases[memory._cdata] = torch.empty(memory.nbytes(), dtype=torch.uint8, device=_META)
            self._given[_memory(base)] = _number(self._table, ("given", len(self._given)))
        view = torch.empty(0, dtype=tensor.dtype, device=_META)
        view.set_(base.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())
        self._alive += (base, tensor)
        return nn.Parameter(view, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else view

    def inputs(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Inputs of a forward, without values; every module must get these very ones."""
        return [self._without(tensor) for tensor in tensors]

    @contextmanager
    def running(self) -> Iterator[_Numbering]:
        """Run a copy meanwhile; parameters, buffers and inputs start as they were given, whatever ran before."""
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.default_generator.manual_seed(0)
            with _Numbering(self._table, dict(self._given)) as numbering:
                yield numbering


class _Numbering(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Numbers the contents of every piece of memory; a tensor is a view of one, and writing gives it another number.

    Whatever device is asked for, results have no values, but for those of constants alone: they are computed, since forward may
    keep them for a later run, and are told by their values. So are plain tensor attributes.
    """

    def __init__(self, table: dict[Hashable, int], contents: dict[int, int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._table, self._contents = table, contents
        self._alive: list[torch.Tensor] = []
        self._draws = 0
        self._moved: set[int] = set()

    def of(self, value: Any) -> Hashable:
        """What a value, or a list of some, is: equal for equal values.

        Raises:
            UnseenValueError: If a tensor in it was made by something that was not seen, or it is a generator.
        """
        if isinstance(value, torch.Tensor):
            if not value.is_meta:
                return (value.dtype, value.shape, value.detach().cpu().contiguous().numpy().tobytes())
            contents = self._contents.get(_memory(value))
            if contents is None:
                raise UnseenValueError("a value came from somewhere that was not seen")
            signs = (value.is_conj(), value.is_neg())
            return (contents, value.dtype, value.shape, value.stride(), value.storage_offset(), *signs)
        if isinstance(value, torch.Generator):
            raise UnseenValueError("what a generator draws next is not seen")
        if isinstance(value, (list, tuple)):
            return tuple(map(self.of, value))
        return "a device" if isinstance(value, torch.device) else (type(value), repr(value))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        seeded = torch.Tag.nondeterministic_seeded in func.tags
        values = _tensors((*args, *kwargs.values()))
        if not seeded and not any(tensor.is_meta for tensor in values) and kwargs.get("device") != _META:
            return func(*args, **kwargs)
        key: Hashable = (func, self.of(args), *((name, self.of(value)) for name, value in kwargs.items()))
        if seeded:
            # What is drawn depends on all that was drawn before.
            key = self._draws = _number(self._table, (key, torch.initial_seed(), self._draws))
        moves = func is _TO_COPY and kwargs.get("device") not in (None, _META)
        if "device" in kwargs:
            kwargs["device"] = _META
        written = [
            (place, tensor) for place in _written(func) for tensor in _tensors(_argument(func, place, args, kwargs))
        ]
        if func is _BATCH_NORM and args[_TRAINING]:
            # Its schema does not say so.
            written += [(place, tensor) for place in _STATISTICS for tensor in _tensors(args[place])]
        if any(not tensor.is_meta or _memory(tensor) in self._moved for _, tensor in written):
            raise UnseenValueError("what is written has values, or is on another device")
        args, kwargs = _plain(args), {name: _plain(value) for name, value in kwargs.items()}
        found = _plain(_normalized(*args) if func is _BATCH_NORM else func(*args, **kwargs))
        for number, (place, tensor) in enumerate(written):
            self._contents[_memory(tensor)] = _number(self._table, (key, "written", place, number))
        if moves:
            # On the device where it is already, it would be the same memory.
            self._moved |= {_memory(tensor) for tensor in (*values, found)}
        for place, tensor in enumerate(_tensors(found)):
            self._alive.append(tensor)
            if _memory(tensor) not in self._contents:
                self._contents[_memory(tensor)] = _number(self._table, (key, place))
        return found


def _argument(func: torch._ops.OpOverload, place: int, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    return args[place] if place < len(args) else kwargs.get(func._schema.arguments[place].name)


def _plain(value: Any) -> Any:
    """The same without values."""
    if isinstance(value, torch.Tensor):
        return value if value.is_meta else value.to(_META)
    return type(value)(map(_plain, value)) if type(value) in (list, tuple) else value


@cache
def _written(func: torch._ops.OpOverload) -> tuple[int, ...]:
    """Positions of the arguments that an operation writes to."""
    aliases = [argument.alias_info for argument in func._schema.arguments]
    return tuple(place for place, alias in enumerate(aliases) if alias is not None and alias.is_write)


def _normalized(
    value: torch.Tensor, weight: Any, bias: Any, mean: Any, variance: Any, training: bool, momentum: float, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Shapes of a batch norm: PyTorch finds them on the meta device by decomposing it, which takes milliseconds for each."""
    saved = value.shape[1] if training else 0
    return torch.empty_like(value), value.new_empty(saved), value.new_empty(saved)


def _memory(tensor: torch.Tensor) -> int:
    """Identity of what a tensor is a view of, as long as it lives."""
    return int(tensor.untyped_storage()._cdata)


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for item in value for tensor in _tensors(item)] if isinstance(value, (list, tuple)) else []
